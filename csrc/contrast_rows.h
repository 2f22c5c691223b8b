// Rows of the caller's tensors as the kernels of contrastive losses want them, and back: L2 normalisation and its
// tangent, operands packed for an engine, sums over tiles merged into a row's log-sum-exp.
#pragma once

#include "contrast_blocks.h"
#include "transpose.h"

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

namespace ssl_fast::contrast {

constexpr float kNormEps = 1e-12f;  // F.normalize's

// Where 1 and every |s| are at most 40 t, no exp((s - 1) / t) underflows or overflows: the shift 1 / t serves every row.
// Beside similarities much smaller than 1 it would round their mean away.
constexpr float kFixedShiftRange = 40, kFixedShiftLeast = 0.5f;

// Multiply-adds of S below which waking a second thread takes longer than it saves.
constexpr int64_t kWorthThreads = int64_t{1} << 20;

inline float dot(const float* a, const float* b, int64_t count) {
  constexpr int kSums = 16;  // independent chains, which the compiler turns into vectors
  float sums[kSums] = {};
  int64_t k = 0;
  for (; k + kSums <= count; k += kSums)
    for (int s = 0; s < kSums; ++s) sums[s] += a[k + s] * b[k + s];
  for (; k < count; ++k) sums[k % kSums] += a[k] * b[k];
  float sum = 0;
  for (float s : sums) sum += s;
  return sum;
}

inline float* float_data(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// (n,) fp32 on the CPU, possibly expanded.
struct RowValues {
  const float* data;
  int64_t stride;
  RowValues(const Tensor& values, int64_t n, const char* name) : data(float_data(values)) {
    STD_TORCH_CHECK(values.is_cpu() && values.scalar_type() == ScalarType::Float && values.dim() == 1 &&
                        values.size(0) == n,
                    name, " (native CPU): got another shape, dtype or device, allowed: float32 of shape (", n, ",)");
    stride = values.stride(0);
  }
  float operator[](int64_t i) const { return data[i * stride]; }
};

// A matrix (n, dims) of any strides and dtype, read as fp32 rows. It does not keep the tensor alive.
class Matrix {
 public:
  Matrix(const Tensor& tensor, bool normalize)
      : blocks(tensor.size(0)),
        dims(tensor.size(1)),
        dtype_(tensor.scalar_type()),
        data_(tensor.data_ptr()),
        row_step_(tensor.stride(0)),
        dim_step_(tensor.stride(1)),
        normalize_(normalize) {}

  // The rows of a block into out (round_up(rows, kRowMultiple), row_stride(dims)), the padding zeroed, and 1 / |x|.
  void read(int64_t b, float* out, float* inverse_norm) const {
    const int64_t rows = blocks.rows(b), ld = row_stride(dims);
    dispatch_float(dtype(), "contrastive loss", [&](auto type) {
      for (int64_t r = 0; r < rows; ++r) inverse_norm[r] = read_as(type, blocks.first(b) + r, out + r * ld);
    });
    std::fill(out + rows * ld, out + round_up(rows, kRowMultiple) * ld, 0.0f);
  }

  // One row into out, (row_stride(dims),).
  void read_row(int64_t row, float* out) const {
    dispatch_float(dtype(), "contrastive loss", [&](auto type) { read_as(type, row, out); });
  }

  // The gradient of x from that of its unit row z: (dz - (dz . z) z) / |x|, or dz / eps where F.normalize divides by
  // eps. In place.
  void through_normalization(float* dz, const float* z, float inverse_norm) const {
    if (!normalize_) return;
    const float along = inverse_norm < 1.0f / kNormEps ? dot(dz, z, dims) : 0.0f;
    for (int64_t d = 0; d < dims; ++d) dz[d] = (dz[d] - along * z[d]) * inverse_norm;
  }

  ScalarType dtype() const { return dtype_; }

  // At least the length of every row as it is read.
  float largest_norm() const {
    if (normalize_) return 1;
    std::vector<float> of_block(blocks.count);
    torch::stable::parallel_for(0, blocks.count, 8, [&](int64_t begin, int64_t end) {
      std::vector<float> z(row_stride(dims));
      for (int64_t b = begin; b < end; ++b)
        for (int64_t r = 0; r < blocks.rows(b); ++r) {
          read_row(blocks.first(b) + r, z.data());
          const float squares = dot(z.data(), z.data(), dims);
          if (!(squares <= of_block[b])) of_block[b] = squares;  // NaN stays
        }
    });
    float largest = 0;
    for (float squares : of_block)
      if (!(squares <= largest)) largest = squares;
    return std::sqrt(largest);
  }

  Blocks blocks;
  int64_t dims;

 private:
  template <class T>
  float read_as(T, int64_t row, float* out) const {
    const T* x = static_cast<const T*>(data_) + row * row_step_;
    if (dim_step_ == 1)
      for (int64_t d = 0; d < dims; ++d) out[d] = static_cast<float>(x[d]);  // which the compiler vectorises
    else
      for (int64_t d = 0; d < dims; ++d) out[d] = static_cast<float>(x[d * dim_step_]);
    std::fill(out + dims, out + row_stride(dims), 0.0f);
    if (!normalize_) return 1.0f;
    float norm = std::sqrt(dot(out, out, dims));
    if (norm < kNormEps) norm = kNormEps;  // NaN stays NaN
    const float inverse = 1.0f / norm;
    for (int64_t d = 0; d < dims; ++d) out[d] *= inverse;
    return inverse;
  }

  ScalarType dtype_;
  const void* data_;
  int64_t row_step_, dim_step_;
  bool normalize_;
};

// What a loss derives from its temperature and the dtype of its embeddings.
struct Scale {
  Scale(const Tensor& temperature, ScalarType dtype) : engine(choose_engine(dtype)) {
    STD_TORCH_CHECK(temperature.is_cpu() && temperature.scalar_type() == ScalarType::Float && temperature.numel() == 1,
                    "contrastive loss (native CPU): temperature must be one float32 on the CPU");
    t = *static_cast<const float*>(temperature.data_ptr());
    scale = kLog2E / t;
  }

  // bound() >= |s| for all similarities; looked at where t is large enough. NaN gives false.
  template <class Bound>
  void choose_shift(const Bound& bound) {
    if (!(1 <= kFixedShiftRange * t)) return;
    const float largest = bound();
    fixed_shift = kFixedShiftLeast <= largest && largest <= kFixedShiftRange * t;
  }

  Engine engine;
  float t, scale;
  bool fixed_shift = false;
};

// z of the blocks of a matrix, packed as the engine reads it:
//   left, right   the operands of S. In fp32 a block transposed, (dims, kStride), serves as either one
//   product       z in the products with W; bf16 alone
// In fp32 the tiles that multiply by z read its rows afresh for each pair: that takes 2% of their time, and a copy of z
// would be the largest thing in memory.
class Packed {
 public:
  enum Use { kLeft = 1, kRight = 2, kProduct = 4 };

  Packed(const Engine& engine, const Blocks& blocks, int64_t dims, int uses)
      : bf16_(engine.bf16),
        dims_(dims),
        left_size_(bf16_ && uses & (kLeft | kRight | kProduct) ? kBlock * bf16_stride(dims) / 2 : 0),
        right_size_(!bf16_           ? round_up(dims, 4) * kStride
                    : uses & kRight ? round_up(dims, 32) / 2 * kStride
                                    : 0),
        product_size_(bf16_ && uses & kProduct ? kBlock / 2 * pairs_stride(dims) : 0),
        left_(blocks.count * left_size_),
        right_(blocks.count * right_size_),
        product_(blocks.count * product_size_) {}

  // z: (padded, row_stride(dims)).
  void pack(int64_t b, const float* z, int64_t padded) const {
    bf16_ ? pack_bf16(b, z, padded) : transpose(z, row_stride(dims_), padded, round_up(dims_, 4), right_block(b), kStride);
  }

  const void* left(int64_t b) const { return bf16_ ? left_block(b) : right_block(b); }
  const void* right(int64_t b) const { return right_block(b); }
  const void* product(int64_t b) const { return product_block(b); }

 private:
  float* left_block(int64_t b) const { return left_.get() + b * left_size_; }
  float* right_block(int64_t b) const { return right_.get() + b * right_size_; }
  float* product_block(int64_t b) const { return product_.get() + b * product_size_; }

  void pack_bf16(int64_t b, const float* z, int64_t padded) const {
    const int64_t ld = row_stride(dims_), ld_left = bf16_stride(dims_), ld_product = pairs_stride(dims_);
    const int64_t padded_dims = round_up(dims_, 32);
    uint16_t* rows = reinterpret_cast<uint16_t*>(left_block(b));
    for (int64_t r = 0; r < padded; ++r)
      for (int64_t d = 0; d < padded_dims; ++d) rows[r * ld_left + d] = d < dims_ ? BFloat16(z[r * ld + d]).x : 0;
    if (right_size_) transpose(left_block(b), ld_left / 2, padded, padded_dims / 2, right_block(b), kStride);
    if (product_size_ == 0) return;
    uint32_t* pairs = reinterpret_cast<uint32_t*>(product_block(b));
    for (int64_t k = 0; k < padded / 2; ++k) {
      const uint16_t* low = rows + (k / 16 * 32 + k % 16) * ld_left;
      const uint16_t* high = low + 16 * ld_left;
      for (int64_t d = 0; d < padded_dims; ++d)
        pairs[k * ld_product + d] = low[d] | static_cast<uint32_t>(high[d]) << 16;
    }
  }

  bool bf16_;
  int64_t dims_, left_size_, right_size_, product_size_;  // floats of a block
  Buffer<float> left_, right_, product_;
};

// The sums of each row, as in TileSums: the row's sum of exp(s / t) is exp(max / t) sum.
struct RowSums {
  RowSums(int64_t rows, const Scale& scale)
      : scale(scale.scale),
        fixed_shift(scale.fixed_shift),
        max(rows, fixed_shift ? 1.0f : -std::numeric_limits<float>::max()),
        sum(rows),
        moment(rows) {}

  void add(int64_t first, int rows, const TileSums& tile) {
    fixed_shift ? add_fixed(first, rows, tile) : add_online(first, rows, tile);
  }

  void add_fixed(int64_t first, int rows, const TileSums& tile) {
    for (int r = 0; r < rows; ++r) sum[first + r] += tile.sum[r];
    for (int r = 0; r < rows; ++r) moment[first + r] += tile.moment[r];
  }

  // Moving the reference from m to m' multiplies the sum by c = exp((m - m') / t) and makes the moment
  // c (moment + sum log2 c).
  void add_online(int64_t first, int rows, const TileSums& tile) {
    for (int r = 0; r < rows; ++r) {
      if (tile.sum[r] == 0) continue;
      float &m = max[first + r], &z = sum[first + r], &y = moment[first + r];
      const float reference = std::max(m, tile.max[r]);
      const float down = (m - reference) * scale, tile_down = (tile.max[r] - reference) * scale;
      const float keep = std::exp2(down), tile_keep = std::exp2(tile_down);
      y = (z > 0 ? keep * (y + down * z) : 0.0f) + tile_keep * (tile.moment[r] + tile_down * tile.sum[r]);
      z = keep * z + tile_keep * tile.sum[r];
      m = reference;
    }
  }

  float scale;
  bool fixed_shift;
  std::vector<float> max, sum, moment;
};

// Sums over j of W_ij z_j, (rows, ld) of each block. fp32 gradients accumulate where they are returned. 16-bit ones need
// fp32 room, and what the bf16 engine would write beyond: a block's room is freed once its gradient is written.
class Gradient {
 public:
  Gradient(const Engine& engine, const Blocks& blocks, const Tensor& out)
      : ld(engine.bf16 ? round_up(out.size(1), 32) : out.size(1)),
        room_(blocks.count),
        block_(blocks.count) {
    const bool same = out.scalar_type() == ScalarType::Float && ld == out.size(1);
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t rows = engine.bf16 ? kBlock : blocks.rows(b);
      const bool in_place = same && rows == blocks.rows(b);
      if (!in_place) room_[b] = std::make_unique<Buffer<float>>(rows * ld, kMapRoomFrom);
      block_[b] = in_place ? float_data(out) + blocks.first(b) * ld : room_[b]->get();
    }
  }

  float* operator[](int64_t b) const { return block_[b]; }

  // Adds what is missing to each row of a block, add(r, row), takes it through x's normalisation and writes it to `out`
  // in its dtype. z: (rows, row_stride), the unit rows.
  template <class Add>
  void finish(int64_t b, const Matrix& x, const Tensor& out, const float* z, const float* inverse_norm,
              const Add& add) {
    dispatch_float(out.scalar_type(), "contrastive loss", [&](auto type) {
      using T = decltype(type);
      T* to = static_cast<T*>(out.data_ptr()) + x.blocks.first(b) * x.dims;
      float* row = block_[b];
      for (int64_t r = 0; r < x.blocks.rows(b); ++r, row += ld, to += x.dims) {
        add(r, row);
        x.through_normalization(row, z + r * row_stride(x.dims), inverse_norm[r]);
        if (room_[b] == nullptr) continue;
        for (int64_t d = 0; d < x.dims; ++d) to[d] = static_cast<T>(row[d]);
      }
    });
    room_[b].reset();
  }

  int64_t ld;

 private:
  static constexpr size_t kMapRoomFrom = size_t{256} << 10;

  std::vector<std::unique_ptr<Buffer<float>>> room_;
  std::vector<float*> block_;
};

}  // namespace ssl_fast::contrast
