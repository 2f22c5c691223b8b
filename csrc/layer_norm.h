// What the drivers and the kernels of layer norm on the CPU agree on.
//
// Memory is N blocks of D rows of L numbers, with statistics over D for each of N L positions. With L = 1, as under
// channels_last, a unit of work is a row of D numbers; else it is a tile of the positions of one of the N, D rows of it.
#pragma once

#include "activations.h"
#include "common.h"

namespace ssl_fast::layer_norm {

struct Problem {
  ScalarType dtype;
  int64_t N, D, L;
  int64_t tile, tiles;  // positions in a tile, and tiles of each of the N
  int64_t activation;
  const void *x, *residual, *dy;
  void *y, *dx, *dresidual;
  const float *weight, *bias;  // D each, which may be read a vector beyond
  float* stats;                // (3, N L): mean, what its rounding left out, 1 / sqrt(var + eps)
  double eps;
  bool stream;  // write y, dx and dresidual past the caches
};

struct Kernels {
  int64_t (*work)(const Problem&);  // floats that a block of units needs
  void (*forward)(const Problem&, int64_t first, int64_t last, float* work);
  // The sums over the units of dz * xhat and of dz into (2, D) floats, unless there are none.
  void (*backward)(const Problem&, int64_t first, int64_t last, float* sums, float* work);
};

}  // namespace ssl_fast::layer_norm
