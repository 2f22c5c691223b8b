// NT-Xent on the CPU. M = 2N rows z = cat(z1, z2), L2-normalised here if asked; S = z z^T is never held.
//
// With e_ij = exp(s_ij / t) and the positive p of row i masked like the self term, S is symmetric, so one tile of S
// serves both its row block and its column block (U = 2 M^2 D flop, the whole product):
//   forward    Z_i, Z_j from one tile of the upper triangle                                   0.5 U
//   backward   W_ij = a_i P_ij + a_j P_ji recomputed once; dz_I += W z_J, dz_J += W^T z_I     0.5 U + 1 U
// against 3 U and eight passes over an M x M matrix for autograd of the dense expression.
#include "contrast_rows.h"

#include <numeric>
#include <optional>
#include <tuple>

namespace ssl_fast::contrast {
namespace {

// What both directions derive from their arguments. Blocks of z2 follow those of z1, so that a row and its positive have
// the same place in blocks b and b + half.
struct Problem : Scale {
  Problem(const Tensor& z1, const Tensor& z2, const Tensor& temperature, bool normalize)
      : Scale(temperature, check(z1, z2)),
        halves{{z1, normalize}, {z2, normalize}},
        n(z1.size(0)),
        dims(z1.size(1)),
        half(halves[0].blocks.count),
        threads(4 * n * n * dims < kWorthThreads ? 1 : torch::stable::get_num_threads()) {
    choose_shift([&] {
      const float largest = std::max(halves[0].largest_norm(), halves[1].largest_norm());
      return largest * largest;
    });
  }

  const Matrix& matrix(int64_t b) const { return halves[b / half]; }
  int rows(int64_t b) const { return matrix(b).blocks.rows(b % half); }
  int64_t first(int64_t b) const { return matrix(b).blocks.first(b % half); }  // row of its half
  void read(int64_t b, float* z, float* inverse_norm) const { matrix(b).read(b % half, z, inverse_norm); }
  // Arrays over rows hold each half padded.
  int64_t packed(int64_t b) const { return b / half * halves[0].blocks.padded + first(b); }
  int64_t packed_row(int64_t i) const { return i < n ? i : halves[0].blocks.padded + i - n; }
  // Self terms and positives.
  int diagonal(const Pair& pair) const { return pair.i == pair.j || pair.i + half == pair.j ? 0 : kNoDiagonal; }
  Tournament pairs() const { return {2 * half}; }

  static ScalarType check(const Tensor& z1, const Tensor& z2) {
    STD_TORCH_CHECK(z1.is_cpu() && z2.is_cpu() && z1.dim() == 2 && z2.dim() == 2 && z1.size(0) == z2.size(0) &&
                        z1.size(1) == z2.size(1) && z1.size(0) > 0 && z1.size(1) > 0,
                    "nt_xent (native CPU): z1 and z2 must have one shape (N, D), N >= 1, D >= 1, on the CPU");
    STD_TORCH_CHECK(z1.scalar_type() == z2.scalar_type(), "nt_xent (native CPU): z1 and z2 must have one dtype");
    return z1.scalar_type();
  }

  Matrix halves[2];
  int64_t n, dims, half, threads;
};

// f(b, padded, z, z_other, inverse_norm) for each block, with its fp32 rows and those of its positives, both
// (padded, row_stride).
template <class F>
void for_each_block(const Problem& p, const F& f) {
  torch::stable::parallel_for(0, p.half, 1, [&](int64_t begin, int64_t end) {
    const int64_t block_size = std::min<int64_t>(kBlock, p.halves[0].blocks.padded) * row_stride(p.dims);
    Buffer<float> z(2 * block_size), inverse_norm(2 * kBlock);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t padded = round_up(p.rows(b), kRowMultiple);
      for (int64_t h = 0; h < 2; ++h)
        p.read(h * p.half + b, z.get() + h * block_size, inverse_norm.get() + h * kBlock);
      for (int64_t h = 0; h < 2; ++h)
        f(h * p.half + b, padded, z.get() + h * block_size, z.get() + (1 - h) * block_size,
          inverse_norm.get() + h * kBlock);
    }
  });
}

// z of both halves, packed, and s_ip.
struct Operands {
  Operands(const Problem& p, int uses)
      : half(p.half),
        halves{{p.engine, p.halves[0].blocks, p.dims, uses}, {p.engine, p.halves[1].blocks, p.dims, uses}},
        positive(p.n) {
    for_each_block(p, [&](int64_t b, int64_t padded, const float* z, const float* z_other, const float*) {
      halves[b / half].pack(b % half, z, padded);
      if (b >= half) return;
      const int64_t ld = row_stride(p.dims);
      for (int r = 0; r < p.rows(b); ++r) positive[p.first(b) + r] = dot(z + r * ld, z_other + r * ld, p.dims);
    });
  }

  const void* left(int64_t b) const { return halves[b / half].left(b % half); }
  const void* right(int64_t b) const { return halves[b / half].right(b % half); }
  const void* product(int64_t b) const { return halves[b / half].product(b % half); }

  int64_t half;
  Packed halves[2];
  Buffer<float> positive;  // (N,)
};

// The negatives of each row: Zneg_i = exp(max / t) sum.
RowSums negative_sums(const Problem& p, const Operands& z) {
  struct Work {
    TileSums i, j;
    float logits[kBlock * kStride];
  };
  RowSums sums(2 * p.halves[0].blocks.padded, p);
  for_each_pair(p.pairs(), p.threads, sizeof(Work), [&](const Pair& pair, void* scratch) {
    Work& w = *static_cast<Work*>(scratch);
    ForwardTile tile{};
    tile.left_i = z.left(pair.i);
    tile.right_j = z.right(pair.j);
    tile.depth = p.dims;
    tile.rows = p.rows(pair.i);
    tile.cols = p.rows(pair.j);
    tile.diagonal = p.diagonal(pair);
    tile.scale = p.scale;
    tile.work = w.logits;
    tile.i = &w.i;
    tile.j = &w.j;
    p.engine.kernels.forward(tile, p.fixed_shift);
    sums.add(p.packed(pair.i), tile.rows, w.i);
    if (pair.i != pair.j) sums.add(p.packed(pair.j), tile.cols, w.j);
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

// A tiny loss's mean costs as much as a node, or as an operator, of its own as all the rest: it is taken here.
Tensor reduce(const Tensor& loss, int64_t count, int64_t reduction) {
  if (reduction == 0) return loss;
  Tensor reduced = empty({});
  const float* const data = float_data(loss);
  const double sum = std::accumulate(data, data + count, 0.0);
  *float_data(reduced) = static_cast<float>(reduction == 1 ? sum / static_cast<double>(count) : sum);
  return reduced;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> nt_xent_fwd(Tensor z1, Tensor z2, Tensor temperature, bool normalize,
                                                       int64_t reduction) {
  const Problem p(z1, z2, temperature, normalize);
  const Tensor outputs[] = {empty({2 * p.n}), empty({2 * p.n}), empty({2 * p.n}), empty({2 * p.n})};
  float *const loss = float_data(outputs[0]), *const lse = float_data(outputs[1]);
  float *const q = float_data(outputs[2]), *const r = float_data(outputs[3]);
  const auto finished = [&] {
    return std::tuple{reduce(outputs[0], 2 * p.n, reduction), outputs[1], outputs[2], outputs[3]};
  };
  if (!(p.t > 0)) {
    for (float* out : {loss, lse, q, r}) std::fill(out, out + 2 * p.n, std::numeric_limits<float>::quiet_NaN());
    return finished();
  }
  const Operands z(p, Packed::kLeft | Packed::kRight);
  const RowSums sums = negative_sums(p, z);
  constexpr int64_t kGrain = 512;
  torch::stable::parallel_for(0, 2 * p.n, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = p.packed_row(i);
      const RowResult result = finish_row(sums.max[k], sums.sum[k], sums.moment[k], z.positive[i % p.n], p.t);
      loss[i] = result.loss;
      lse[i] = result.lse;
      q[i] = result.q;
      r[i] = result.r;
    }
  });
  return finished();
}

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
  RowWeights w(2 * p.halves[0].blocks.padded);
  for (int64_t i = 0; i < 2 * p.n; ++i) {
    const int64_t k = p.packed_row(i), other = i < p.n ? i + p.n : i - p.n;
    w.weight[k] = (g[i] + h[i]) / p.t;
    w.positive[k] = (h[i] * (1 - q[i]) + h[other] * (1 - q[other]) - (g[i] * q[i] + g[other] * q[other])) / p.t;
    if (p.fixed_shift) w.weight[k] *= std::exp(-lse[i]);
  }
  if (p.fixed_shift) return w;

  const Operands z(p, Packed::kLeft | Packed::kRight);
  const RowSums negatives = negative_sums(p, z);
  for (int64_t i = 0; i < 2 * p.n; ++i) {
    const int64_t k = p.packed_row(i);
    const float max = negatives.max[k], positive = z.positive[i % p.n];
    w.shift[k] = std::max(max, positive);
    w.weight[k] /= negatives.sum[k] * std::exp((max - w.shift[k]) / p.t) + std::exp((positive - w.shift[k]) / p.t);
  }
  return w;
}

void accumulate(const Problem& p, const RowWeights& weights, const Gradient (&dz)[2]) {
  std::optional<Operands> packed;
  if (p.engine.bf16) packed.emplace(p, Packed::kLeft | Packed::kRight | Packed::kProduct);
  const int64_t work_size = p.engine.kernels.backward_work(p.dims), block_size = kBlock * row_stride(p.dims);
  const int64_t scratch_size = work_size + (packed ? 0 : 2 * block_size);
  for_each_pair(p.pairs(), p.threads, scratch_size * sizeof(float), [&](const Pair& pair, void* scratch) {
    const auto [i, j, turn_i, turn_j] = pair;
    const int64_t ki = p.packed(i), kj = p.packed(j);
    float* const work = static_cast<float*>(scratch);
    BackwardTile tile{};
    if (packed) {
      tile.left_i = packed->left(i);
      tile.right_j = packed->right(j);
      tile.product_i = packed->product(i);
      tile.product_j = packed->product(j);
    } else {
      float inverse_norm[kBlock];
      float *const z_i = work + work_size, *const z_j = i == j ? z_i : z_i + block_size;
      p.read(i, z_i, inverse_norm);
      if (i != j) p.read(j, z_j, inverse_norm);
      tile.left_i = tile.product_i = z_i;
      tile.product_j = z_j;
    }
    tile.depth = p.dims;
    tile.rows = p.rows(i);
    tile.cols = p.rows(j);
    tile.diagonal = p.diagonal(pair);
    tile.scale = p.scale;
    tile.work = work;
    tile.weight_i = &weights.weight[ki];
    tile.weight_j = &weights.weight[kj];
    tile.shift_i = &weights.shift[ki];
    tile.shift_j = &weights.shift[kj];
    tile.dz_i = dz[i / p.half][i % p.half];
    tile.dz_j = i == j ? nullptr : dz[j / p.half][j % p.half];  // W of (I, I) holds both roles of z already
    tile.add_i = i != j;                                        // and comes first
    tile.add_j = true;
    tile.ld_dz = dz[0].ld;
    p.engine.kernels.backward(tile, p.fixed_shift);
  });
}

std::tuple<Tensor, Tensor> nt_xent_bwd(Tensor grad_loss, Tensor grad_lse, Tensor z1, Tensor z2, Tensor temperature,
                                       Tensor lse, Tensor q, bool normalize) {
  const Problem p(z1, z2, temperature, normalize);
  int32_t dtype_code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(z1.get(), &dtype_code));
  const Tensor out[2] = {empty({p.n, p.dims}, dtype_code), empty({p.n, p.dims}, dtype_code)};
  Gradient dz[2] = {{p.engine, p.halves[0].blocks, out[0]}, {p.engine, p.halves[1].blocks, out[1]}};

  const int64_t M = 2 * p.n;
  const RowWeights weights =
      row_weights(p, {grad_loss, M, "grad_loss"}, {grad_lse, M, "grad_lse"}, {lse, M, "lse"}, {q, M, "q"});
  accumulate(p, weights, dz);

  for_each_block(p, [&](int64_t b, int64_t, const float* z, const float* z_other, const float* inverse_norm) {
    // dz of a unit row: the products, and c_i / t z_p.
    dz[b / p.half].finish(b % p.half, p.matrix(b), out[b / p.half], z, inverse_norm, [&](int64_t r, float* row) {
      const float weight = weights.positive[p.packed(b) + r];
      const float* const positive = z_other + r * row_stride(p.dims);
      for (int64_t d = 0; d < p.dims; ++d) row[d] += weight * positive[d];
    });
  });
  return {out[0], out[1]};
}

STABLE_TORCH_LIBRARY_IMPL(ssl_fast_native, CPU, m) {
  m.impl("nt_xent_fwd", TORCH_BOX(&nt_xent_fwd));
  m.impl("nt_xent_bwd", TORCH_BOX(&nt_xent_bwd));
}

}  // namespace
}  // namespace ssl_fast::contrast
