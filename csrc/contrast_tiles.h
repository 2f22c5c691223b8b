// What the drivers of contrastive losses (nt_xent.cpp, info_nce.cpp) ask of an instruction set's kernels: one pair (I, J)
// of row blocks at a time, with S = z_I z_J^T. The two blocks may come from one matrix or from two.
#pragma once

#include "common.h"

namespace ssl_fast::contrast {

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

constexpr int kNoDiagonal = 1 << 20;  // outside every tile

// One tile of S. The operands are z of a block, packed as the engine wants them. Elements are left out where
// j == i + diagonal within the tile, and where the ids (null, or padded to kRowMultiple) are equal.
struct Tile {
  const void *left_i, *right_j;
  int64_t depth;  // D
  int rows, cols;
  int diagonal;
  const int32_t *ids_i, *ids_j;
  float scale;  // log2(e) / t
  float* work;
};

struct ForwardTile : Tile {  // work: (kBlock, kStride)
  TileSums *i, *j;           // over rows and over columns
};

// W_ij = 2^((s_ij - shift_i) scale) weight_i + 2^((s_ij - shift_j) scale) weight_j, and its products with z; shifts are
// 0 where `fixed_shift`. Where labels (null, or padded) are equal, positive_i + positive_j is added.
struct BackwardTile : Tile {  // work: Kernels::backward_work
  const void *product_i, *product_j;
  const float *weight_i, *weight_j, *shift_i, *shift_j;
  const int32_t *labels_i, *labels_j;
  const float *positive_i, *positive_j;
  float *dz_i, *dz_j;  // (rows, ld_dz): W z_J, W^T z_I; dz_j is null where nobody wants it
  bool add_i, add_j;   // to what is there
  int64_t ld_dz;
};

// One step of attention: the sums of rows, as in TileSums, and out, the sum of 2^((s - max) scale) z_J, from those of
// the tiles before. Columns keep no sums.
struct AttendTile : Tile {  // work: Kernels::backward_work
  const void* product_j;
  TileSums* i;
  float* out;  // (rows, ld_out)
  int64_t ld_out;
  bool first;  // nothing came before: `i` and `out` are not read
};

struct Kernels {
  void (*forward)(const ForwardTile&, bool fixed_shift);
  void (*backward)(const BackwardTile&, bool fixed_shift);
  void (*attend)(const AttendTile&, bool fixed_shift);
  int64_t (*backward_work)(int64_t depth);  // floats
};

// The kernels for z of a dtype on this machine; bf16: in bf16 arithmetic, else in fp32 on widened rows.
struct Engine {
  const Kernels& kernels;
  bool bf16;
};
Engine choose_engine(torch::headeronly::ScalarType dtype);

}  // namespace ssl_fast::contrast
