// NT-Xent on the CPU. M = 2N rows z = cat(z1, z2), L2-normalised here if asked; S = z z^T is never held.
//
// With e_ij = exp(s_ij / t) and the positive p of row i masked like the self term, S is symmetric, so one tile of S
// serves both its row block and its column block (U = 2 M^2 D flop, the whole product):
//   forward    Z_i, Z_j from one tile of the upper triangle                                   0.5 U
//   backward   W_ij = a_i P_ij + a_j P_ji recomputed once; dz_I += W z_J, dz_J += W^T z_I     0.5 U + 1 U
// against 3 U and eight passes over an M x M matrix for autograd of the dense expression.
//
// The pairs of row blocks are visited in the rounds of a round-robin tournament: in a round no block plays twice, so
// threads write straight into the sums and gradients of their two blocks, and each block takes its contributions in the
// same order whatever the number of threads. No partial sums, no atomics on floats, equal to the bit.
#include "nt_xent_blocks.h"
#include "nt_xent_engines.h"

#include <cmath>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>

namespace ssl_fast::nt_xent {
namespace {

float dot(const float* a, const float* b, int64_t count) {
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

constexpr float kNormEps = 1e-12f;  // F.normalize's

// Rows of z = cat(z1, z2) from tensors of any strides and dtype.
class Rows {
 public:
  Rows(const Tensor& z1, const Tensor& z2, bool normalize)
      : halves_{z1, z2}, dims_(z1.size(1)), normalize_(normalize) {}

  // Rows first .. first + rows of a half into out (round_up(rows, kRowMultiple), ld), the padding zeroed, and 1 / |x|.
  void read(int64_t half, int64_t first, int64_t rows, float* out, int64_t ld, float* inverse_norm) const {
    dispatch_float(halves_[half].scalar_type(), "nt_xent", [&](auto type) {
      using T = decltype(type);
      const int64_t row_stride = halves_[half].stride(0), dim_stride = halves_[half].stride(1);
      const T* x = static_cast<const T*>(halves_[half].data_ptr()) + first * row_stride;
      for (int64_t r = 0; r < rows; ++r, x += row_stride, out += ld) {
        if (dim_stride == 1)
          for (int64_t d = 0; d < dims_; ++d) out[d] = static_cast<float>(x[d]);  // which the compiler turns into vectors
        else
          for (int64_t d = 0; d < dims_; ++d) out[d] = static_cast<float>(x[d * dim_stride]);
        std::fill(out + dims_, out + ld, 0.0f);
        inverse_norm[r] = normalize_ ? normalize_row(out) : 1.0f;
      }
      std::fill(out, out + (round_up(rows, kRowMultiple) - rows) * ld, 0.0f);
    });
  }

 private:
  float normalize_row(float* row) const {
    float norm = std::sqrt(dot(row, row, dims_));
    if (norm < kNormEps) norm = kNormEps;  // NaN stays NaN
    const float inverse = 1.0f / norm;
    for (int64_t d = 0; d < dims_; ++d) row[d] *= inverse;
    return inverse;
  }

  Tensor halves_[2];
  int64_t dims_;
  bool normalize_;
};

// With unit rows, down to this temperature no exp((s - 1) / t) is lost to underflow: the shift 1 / t serves every row.
constexpr float kFixedShiftTemperature = 0.025f;

// Multiply-adds of S below which waking a second thread takes longer than it saves.
constexpr int64_t kWorthThreads = int64_t{1} << 20;

// What both directions derive from their arguments.
struct Problem {
  Problem(const Tensor& z1, const Tensor& z2, const Tensor& temperature, bool normalize)
      : rows(z1, z2, normalize),
        blocks(z1.size(0)),
        n(z1.size(0)),
        dims(z1.size(1)),
        threads(4 * n * n * dims < kWorthThreads ? 1 : torch::stable::get_num_threads()),
        engine(choose_engine(z1.scalar_type())),
        normalize(normalize) {
    STD_TORCH_CHECK(z1.is_cpu() && z2.is_cpu() && temperature.is_cpu(),
                    "nt_xent (native CPU): z1, z2 and temperature must be on the CPU");
    STD_TORCH_CHECK(z1.dim() == 2 && z2.dim() == 2 && z2.size(0) == n && z2.size(1) == dims && n > 0 && dims > 0,
                    "nt_xent (native CPU): z1 and z2 must have one shape (N, D), N >= 1, D >= 1");
    STD_TORCH_CHECK(z1.scalar_type() == z2.scalar_type(), "nt_xent (native CPU): z1 and z2 must have one dtype");
    STD_TORCH_CHECK(temperature.scalar_type() == ScalarType::Float && temperature.numel() == 1,
                    "nt_xent (native CPU): temperature must be one float32");
    t = *static_cast<const float*>(temperature.data_ptr());
    scale = kLog2E / t;
    fixed_shift = normalize && t >= kFixedShiftTemperature;
  }

  Rows rows;
  Blocks blocks;
  int64_t n, dims, threads;
  Engine engine;
  bool normalize, fixed_shift;
  float t, scale;
};

enum class Direction { kForward, kBackward };

// f(b, padded, z, z_other, inverse_norm) for each block, with its fp32 rows and those of its positives, both
// (padded, row_stride).
template <class F>
void for_each_block(const Problem& p, const F& f) {
  const int64_t ld = row_stride(p.dims), half_size = kBlock * ld;
  torch::stable::parallel_for(0, p.blocks.per_half, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> z(2 * half_size), inverse_norm(2 * kBlock);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t rows = p.blocks.rows(b), padded = round_up(rows, kRowMultiple);
      for (int64_t half = 0; half < 2; ++half)
        p.rows.read(half, p.blocks.first(b), rows, z.get() + half * half_size, ld, inverse_norm.get() + half * kBlock);
      for (int64_t half = 0; half < 2; ++half)
        f(half * p.blocks.per_half + b, padded, z.get() + half * half_size, z.get() + (1 - half) * half_size,
          inverse_norm.get() + half * kBlock);
    }
  });
}

// z of every block, packed as the engine reads it in one direction, and s_ip. An engine's formats are in its header. In
// fp32 the backward has no use for it: it multiplies long enough with a block to read its rows afresh for each pair.
class Operands {
 public:
  Operands(const Problem& p, Direction direction)
      : positive(p.n),
        left_size_(p.engine.bf16 ? kBlock * bf16_stride(p.dims) / 2 : 0),
        right_size_(p.engine.bf16 ? round_up(p.dims, 32) / 2 * kStride : round_up(p.dims, 4) * kStride),
        product_size_(direction == Direction::kBackward ? kBlock / 2 * pairs_stride(p.dims) : 0),
        left_(p.blocks.count() * left_size_),
        right_(p.blocks.count() * right_size_),
        product_(p.blocks.count() * product_size_) {
    for_each_block(p, [&](int64_t b, int64_t padded, const float* z, const float* z_other, const float*) {
      if (p.engine.bf16)
        pack_bf16(b, z, padded, p.dims);
      else
        transpose(z, row_stride(p.dims), padded, round_up(p.dims, 4), right_block(b), kStride);
      if (p.blocks.half(b) == 1) return;
      const int64_t ld = row_stride(p.dims);
      for (int r = 0; r < p.blocks.rows(b); ++r)
        positive[p.blocks.first(b) + r] = dot(z + r * ld, z_other + r * ld, p.dims);
    });
  }

  const void* left(int64_t b) const { return left_size_ ? left_block(b) : right_block(b); }  // fp32: one for both
  const void* right(int64_t b) const { return right_block(b); }
  const void* product(int64_t b) const { return product_block(b); }

  Buffer<float> positive;  // (N,)

 private:
  float* left_block(int64_t b) const { return left_.get() + b * left_size_; }
  float* right_block(int64_t b) const { return right_.get() + b * right_size_; }
  float* product_block(int64_t b) const { return product_.get() + b * product_size_; }

  void pack_bf16(int64_t b, const float* z, int64_t padded, int64_t dims) const {
    const int64_t ld = row_stride(dims), ld_left = bf16_stride(dims), ld_product = pairs_stride(dims);
    const int64_t padded_dims = round_up(dims, 32);
    uint16_t* rows = reinterpret_cast<uint16_t*>(left_block(b));
    for (int64_t r = 0; r < padded; ++r)
      for (int64_t d = 0; d < padded_dims; ++d) rows[r * ld_left + d] = d < dims ? to_bf16(z[r * ld + d]) : 0;
    transpose(left_block(b), ld_left / 2, padded, padded_dims / 2, right_block(b), kStride);
    if (product_size_ == 0) return;
    uint32_t* pairs = reinterpret_cast<uint32_t*>(product_block(b));
    for (int64_t k = 0; k < padded / 2; ++k) {
      const uint16_t* low = rows + (k / 16 * 32 + k % 16) * ld_left;
      const uint16_t* high = low + 16 * ld_left;
      for (int64_t d = 0; d < padded_dims; ++d)
        pairs[k * ld_product + d] = low[d] | static_cast<uint32_t>(high[d]) << 16;
    }
  }

  static uint16_t to_bf16(float x) { return BFloat16(x).x; }

  int64_t left_size_, right_size_, product_size_;  // floats of a block
  Buffer<float> left_, right_, product_;
};

// The negatives of each row, as in TileSums: Zneg_i = exp(max / t) sum. Rows packed as in Blocks.
struct NegativeSums {
  NegativeSums(int64_t rows, float max, float scale) : scale(scale), max(rows, max), sum(rows), moment(rows) {}

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
  std::vector<float> max, sum, moment;
};

NegativeSums negative_sums(const Problem& p, const Operands& z) {
  struct Scratch {
    TileSums i, j;
    float work[kBlock * kStride];
  };
  const Blocks& blocks = p.blocks;
  NegativeSums sums(2 * blocks.padded, p.fixed_shift ? 1.0f : -std::numeric_limits<float>::max(), p.scale);
  const auto add = p.fixed_shift ? &NegativeSums::add_fixed : &NegativeSums::add_online;
  for_each_pair(blocks.count(), p.threads, [&](const Pair& pair) {
    const auto [i, j, round] = pair;
    Scratch& s = *static_cast<Scratch*>(thread_scratch(sizeof(Scratch)));
    p.engine.kernels.forward({.left_i = z.left(i),
                              .right_j = z.right(j),
                              .depth = p.dims,
                              .rows = blocks.rows(i),
                              .cols = blocks.rows(j),
                              .diagonal = blocks.diagonal(pair),
                              .scale = p.scale,
                              .work = s.work,
                              .i = &s.i,
                              .j = &s.j},
                             p.fixed_shift);
    (sums.*add)(blocks.packed(i), blocks.rows(i), s.i);
    if (i != j) (sums.*add)(blocks.packed(j), blocks.rows(j), s.j);
  });
  return sums;
}

// loss, lse, q and r of a row. With d = log Zneg - s_ip / t: loss = log(1 + Zneg / e_ip) = softplus(d), q = sigmoid(d).
struct RowResult {
  float loss, lse, q, r;
};
RowResult finish_row(double max, double sum, double moment, double positive, double t) {
  const double d = (max - positive) / t + std::log(sum);
  const double loss = d > 0 ? d + std::log1p(std::exp(-d)) : std::log1p(std::exp(d));
  const double q = 1 / (1 + std::exp(-d));
  const double mean_gap = sum > 0 ? max - positive + moment / sum * M_LN2 * t : 0;  // E[s] of the negatives, less s_ip
  return {float(loss), float(loss + positive / t), float(q), float(q * mean_gap)};
}

// A contiguous CPU tensor. torch::stable::empty boxes its arguments for the dispatcher, which for the outputs of a tiny
// loss takes as long as all the rest.
Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype) {
  int64_t strides[2] = {1, 1};
  if (sizes.size() == 2) strides[0] = sizes.begin()[1];
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.begin(), strides, dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

float* float_data(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

// A tiny loss's mean costs as much as a node, or as an operator, of its own as all the rest: it is taken here.
Tensor reduce(const Tensor& loss, int64_t count, int64_t reduction) {
  if (reduction == 0) return loss;
  Tensor reduced = empty({}, aoti_torch_dtype_float32());
  const float* const data = float_data(loss);
  const double sum = std::accumulate(data, data + count, 0.0);
  *float_data(reduced) = static_cast<float>(reduction == 1 ? sum / static_cast<double>(count) : sum);
  return reduced;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> nt_xent_fwd(Tensor z1, Tensor z2, Tensor temperature, bool normalize,
                                                       int64_t reduction) {
  const Problem p(z1, z2, temperature, normalize);
  const auto rows = [&] { return empty({2 * p.n}, aoti_torch_dtype_float32()); };
  const Tensor outputs[] = {rows(), rows(), rows(), rows()};
  float *const loss = float_data(outputs[0]), *const lse = float_data(outputs[1]);
  float *const q = float_data(outputs[2]), *const r = float_data(outputs[3]);
  const auto finished = [&] {
    return std::tuple{reduce(outputs[0], 2 * p.n, reduction), outputs[1], outputs[2], outputs[3]};
  };
  if (!(p.t > 0)) {
    for (float* out : {loss, lse, q, r}) std::fill(out, out + 2 * p.n, std::numeric_limits<float>::quiet_NaN());
    return finished();
  }
  const Operands z(p, Direction::kForward);
  const NegativeSums sums = negative_sums(p, z);
  constexpr int64_t kGrain = 512;
  torch::stable::parallel_for(0, 2 * p.n, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = p.blocks.packed_row(i);
      const RowResult result = finish_row(sums.max[k], sums.sum[k], sums.moment[k], z.positive[i % p.n], p.t);
      loss[i] = result.loss;
      lse[i] = result.lse;
      q[i] = result.q;
      r[i] = result.r;
    }
  });
  return finished();
}

// (M,) fp32, possibly expanded.
struct RowValues {
  const float* data;
  int64_t stride;
  RowValues(const Tensor& values) : data(float_data(values)), stride(values.stride(0)) {}
  float operator[](int64_t i) const { return data[i * stride]; }
};

// What each row brings to W (see BackwardTile), and c_i / t.
struct RowWeights {
  explicit RowWeights(int64_t rows) : shift(rows), weight(rows), positive(rows) {}
  std::vector<float> shift, weight, positive;
};

// The fixed shift needs none here: |s / t| <= 40, so exp(s / t) and exp(-lse) are far from the ends of fp32, and lse is
// small enough for its rounding not to matter. Elsewhere logits may be so large that exp(s / t - lse) has no correct
// digit, so the normaliser is summed afresh, relative to the row's largest logit as softmax does it: 0.5 U more.
RowWeights row_weights(const Problem& p, const RowValues& g, const RowValues& h, const RowValues& lse,
                       const RowValues& q) {
  RowWeights w(2 * p.blocks.padded);
  for (int64_t i = 0; i < 2 * p.n; ++i) {
    const int64_t k = p.blocks.packed_row(i), other = i < p.n ? i + p.n : i - p.n;
    w.weight[k] = (g[i] + h[i]) / p.t;
    w.positive[k] = (h[i] * (1 - q[i]) + h[other] * (1 - q[other]) - (g[i] * q[i] + g[other] * q[other])) / p.t;
    if (p.fixed_shift) w.weight[k] *= std::exp(-lse[i]);
  }
  if (p.fixed_shift) return w;

  const Operands z(p, Direction::kForward);
  const NegativeSums negatives = negative_sums(p, z);
  for (int64_t i = 0; i < 2 * p.n; ++i) {
    const int64_t k = p.blocks.packed_row(i);
    const float max = negatives.max[k], positive = z.positive[i % p.n];
    w.shift[k] = std::max(max, positive);
    w.weight[k] /= negatives.sum[k] * std::exp((max - w.shift[k]) / p.t) + std::exp((positive - w.shift[k]) / p.t);
  }
  return w;
}

// Sums over j of W_ij z_j, (rows, ld) of each block. fp32 gradients accumulate where they are returned. 16-bit ones need
// fp32 room, and the bf16 engine whole blocks of it; a block's room is freed once its gradient is written.
struct Products {
  Products(const Problem& p, bool in_place, float* dz1, float* dz2)
      : ld(p.engine.bf16 ? round_up(p.dims, 32) : p.dims), room(p.blocks.count()), block(p.blocks.count()) {
    for (int64_t b = 0; b < p.blocks.count(); ++b) {
      const int64_t rows = p.engine.bf16 ? kBlock : p.blocks.rows(b);
      if (!in_place) room[b] = std::make_unique<Buffer<float>>(rows * ld, kMapRoomFrom);
      block[b] = in_place ? (p.blocks.half(b) ? dz2 : dz1) + p.blocks.first(b) * ld : room[b]->get();
    }
  }

  static constexpr size_t kMapRoomFrom = size_t{256} << 10;
  int64_t ld;
  std::vector<std::unique_ptr<Buffer<float>>> room;
  std::vector<float*> block;
};

void accumulate(const Problem& p, const RowWeights& weights, const Products& products) {
  const Blocks& blocks = p.blocks;
  std::optional<Operands> packed;
  if (p.engine.bf16) packed.emplace(p, Direction::kBackward);
  const int64_t work_size = p.engine.kernels.backward_work(p.dims), ld = row_stride(p.dims), block_size = kBlock * ld;
  const int64_t scratch_bytes = (work_size + (packed ? 0 : 2 * block_size)) * sizeof(float);
  for_each_pair(blocks.count(), p.threads, [&](const Pair& pair) {
    const auto [i, j, round] = pair;
    const int64_t ki = blocks.packed(i), kj = blocks.packed(j);
    float* const work = static_cast<float*>(thread_scratch(scratch_bytes));
    float inverse_norm[kBlock];
    const auto read = [&](int64_t b, float* z) {
      p.rows.read(blocks.half(b), blocks.first(b), blocks.rows(b), z, ld, inverse_norm);
      return z;
    };
    const void *z_i = nullptr, *z_j = nullptr;
    if (!packed) {
      z_i = read(i, work + work_size);
      z_j = i == j ? z_i : read(j, work + work_size + block_size);
    }
    p.engine.kernels.backward({.left_i = packed ? packed->left(i) : z_i,
                               .right_j = packed ? packed->right(j) : nullptr,
                               .product_i = packed ? packed->product(i) : z_i,
                               .product_j = packed ? packed->product(j) : z_j,
                               .depth = p.dims,
                               .rows = blocks.rows(i),
                               .cols = blocks.rows(j),
                               .diagonal = blocks.diagonal(pair),
                               .scale = p.scale,
                               .work = work,
                               .weight_i = &weights.weight[ki],
                               .weight_j = &weights.weight[kj],
                               .shift_i = &weights.shift[ki],
                               .shift_j = &weights.shift[kj],
                               .same_block = i == j,
                               .dz_i = products.block[i],
                               .dz_j = products.block[j],
                               .ld_dz = products.ld},
                              p.fixed_shift);
  });
}

// dz of a row from dzhat = products + c_i / t z_p, through the normalisation: (dzhat - (dzhat . z) z) / |x|, or
// dzhat / eps where F.normalize divides by eps. In place.
void finish_gradient(float* dz, const float* z, const float* z_positive, float positive_weight, float inverse_norm,
                     bool normalize, int64_t dims) {
  for (int64_t d = 0; d < dims; ++d) dz[d] += positive_weight * z_positive[d];
  if (!normalize) return;
  const float along = inverse_norm < 1.0f / kNormEps ? dot(dz, z, dims) : 0.0f;
  for (int64_t d = 0; d < dims; ++d) dz[d] = (dz[d] - along * z[d]) * inverse_norm;
}

std::tuple<Tensor, Tensor> nt_xent_bwd(Tensor grad_loss, Tensor grad_lse, Tensor z1, Tensor z2, Tensor temperature,
                                       Tensor lse, Tensor q, bool normalize) {
  const Problem p(z1, z2, temperature, normalize);
  const ScalarType dtype = z1.scalar_type();
  int32_t dtype_code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(z1.get(), &dtype_code));
  Tensor dz[2] = {empty({p.n, p.dims}, dtype_code), empty({p.n, p.dims}, dtype_code)};

  const bool in_place = dtype == ScalarType::Float;
  Products products(p, in_place, in_place ? float_data(dz[0]) : nullptr, in_place ? float_data(dz[1]) : nullptr);
  const RowWeights weights = row_weights(p, grad_loss, grad_lse, lse, q);
  accumulate(p, weights, products);

  dispatch_float(dtype, "nt_xent_bwd", [&](auto type) {
    using T = decltype(type);
    for_each_block(p, [&](int64_t b, int64_t, const float* z, const float* z_other, const float* inverse_norm) {
      T* out = static_cast<T*>(dz[p.blocks.half(b)].data_ptr()) + p.blocks.first(b) * p.dims;
      float* row = products.block[b];
      for (int r = 0; r < p.blocks.rows(b); ++r, row += products.ld, out += p.dims) {
        finish_gradient(row, z + r * row_stride(p.dims), z_other + r * row_stride(p.dims),
                        weights.positive[p.blocks.packed(b) + r], inverse_norm[r], normalize, p.dims);
        if (in_place) continue;
        for (int64_t d = 0; d < p.dims; ++d) out[d] = static_cast<T>(row[d]);
      }
      products.room[b].reset();
    });
  });
  return {dz[0], dz[1]};
}

STABLE_TORCH_LIBRARY_IMPL(ssl_fast_native, CPU, m) {
  m.impl("nt_xent_fwd", TORCH_BOX(&nt_xent_fwd));
  m.impl("nt_xent_bwd", TORCH_BOX(&nt_xent_bwd));
}

}  // namespace
}  // namespace ssl_fast::nt_xent
