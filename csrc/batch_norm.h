// What the drivers and the kernels of batch norm on the CPU agree on.
//
// A dense x is `lines` of `length` elements: rows of channels (channels_last), or a plane for each image and channel.
// Images of short planes are rows too, each of whose elements is a channel here. A block is a part of the lines, or of all
// of them so many channels, with one set of statistics; how a tensor is cut into blocks follows from its shape alone, so
// that sums come out the same to the bit whatever the number of threads.
#pragma once

#include "activations.h"
#include "common.h"

namespace ssl_fast::batch_norm {

// (S, C) arrays, each row padded to `stride` floats, all of which may be read.
//   u = (x - mean) * scale + shift        dx = dz * scale + (x - mean) * slope + offset
struct Channels {
  const float *mean, *scale, *shift, *slope, *offset;
  int64_t stride;
};

struct Problem {
  ScalarType dtype;
  bool planes;
  int64_t channels, length;  // `length` of a line
  int64_t part;              // of each line, what sums take
  int64_t activation;
  const void *x, *residual, *dy;
  const uint8_t* mask;  // of the backward
  void *y, *dx, *dresidual;
  uint8_t* new_mask;
  bool batch;   // of the backward: the statistics are the batch's, and follow x
  bool stream;  // write y, dx and dresidual past the caches
  Channels per;
};

// Of `channels` channels: rows `first` to `first + count`, or the planes of so many images.
struct Block {
  int64_t split, first, count, first_channel, channels;
  int64_t ahead = 0;  // elements from its lines to those of the next block, which apply and backward fetch; 0 for none
};

// Of each channel of a block.
struct Moments {
  double *mean, *m2;
};
struct Sums {
  double *dz, *dz_x;  // of dz, and of dz * (x - mean)
};

struct Kernels {
  int64_t (*work)(const Problem&, int64_t channels);  // floats that moments and sums of a block need
  void (*moments)(const Problem&, const Block&, const Moments&, float* work);
  void (*apply)(const Problem&, const Block&);
  void (*sums)(const Problem&, const Block&, const Sums&, float* work);
  void (*backward)(const Problem&, const Block&);
};

}  // namespace ssl_fast::batch_norm
