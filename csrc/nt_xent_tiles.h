// What the NT-Xent driver (nt_xent.cpp) asks of an instruction set's kernels: one pair of row blocks (I, J) at a time.
#pragma once

#include "common.h"

namespace ssl_fast::nt_xent {

constexpr int kBlock = 192;       // rows of z in a block: W of one pair (147 KiB) stays in L2
constexpr int kStride = 208;      // of kBlock-wide buffers: an odd number of cache lines, so columns use every L1 set
constexpr int kRowMultiple = 96;  // rows are padded with zeros to whole register tiles of every instruction set
constexpr float kLog2E = 0x1.715476p+0f;

// Elements between rows: whole cache lines, an odd number of them.
constexpr int64_t odd_lines(int64_t elements, int64_t per_line) {
  return (ceil_div(elements, per_line) | 1) * per_line;
}
constexpr int64_t row_stride(int64_t dims) { return odd_lines(dims, 16); }                  // of fp32 rows
constexpr int64_t bf16_stride(int64_t dims) { return odd_lines(dims, 32); }                 // of bf16 rows
constexpr int64_t pairs_stride(int64_t dims) { return odd_lines(round_up(dims, 32), 16); }  // of pairs of bf16 rows

// Over one tile of S, for each of its rows (or columns), with x = (s - max) log2(e) / t <= 0: the largest s (unused
// where the shift is fixed: max = 1), the sum of 2^x, and its moment, the sum of 2^x x.
struct TileSums {
  alignas(64) float max[kBlock], sum[kBlock], moment[kBlock];
};

// One tile of S = z z^T. `diagonal` masks i == j: the self terms of a pair (I, I), and the positives of a pair
// (I, I + blocks / 2). The operands are z of a block, packed as the engine wants them.
struct ForwardTile {
  const void *left_i, *right_j;
  int64_t depth;  // D
  int rows, cols;
  bool diagonal;
  float scale;      // log2(e) / t
  float* work;      // (kBlock, kStride)
  TileSums *i, *j;  // over rows and over columns
};

// One tile of W_ij = a_i P_ij + a_j P_ji, and its products with z.
struct BackwardTile {
  const void *left_i, *right_j, *product_i, *product_j;
  int64_t depth;
  int rows, cols;
  bool diagonal;
  float scale;
  float* work;  // Kernels::backward_work
  // W_ij = 2^((s_ij - shift_i) scale) weight_i + 2^((s_ij - shift_j) scale) weight_j; shifts are 0 where `fixed_shift`.
  const float *weight_i, *weight_j, *shift_i, *shift_j;
  bool same_block;     // I = J: W is symmetric and holds both roles of z already
  float *dz_i, *dz_j;  // (rows, ld_dz): += W z_J, += W^T z_I; = W z_I where same_block
  int64_t ld_dz;
};

struct Kernels {
  void (*forward)(const ForwardTile&, bool fixed_shift);
  void (*backward)(const BackwardTile&, bool fixed_shift);
  int64_t (*backward_work)(int64_t depth);  // floats
};

}  // namespace ssl_fast::nt_xent
