// Log-sum-exps between the rows of two matrices x (N, D) and y (K, D) on the CPU, and what follows from them; S = x y^T
// is never held. U' = 2 N K D flop, one product:
//   info_nce_fwd        lse of rows, and of columns, from each tile                                U'
//   info_nce_bwd        W from S, recomputed; dx_I += W y_J; dy_J += W^T x_I                       3 U'
//   info_nce_one_pass   lse of rows and softmax(S) y together, for keys without gradient           2 U'
//   sup_con_fwd, _bwd   y = x, so that one tile serves both its blocks                             0.5 U', 1.5 U'
// against 3 U' and passes over N x K matrices for autograd of the dense expression (6 U' for both directions of CLIP).
#include "contrast_rows.h"

#include <numeric>
#include <optional>
#include <tuple>

namespace ssl_fast::contrast {
namespace {

enum Stat { kLse, kShift, kLogSum, kMean, kPositives, kCount };  // rows of the stats tensors

// (n,) int64 as small numbers, equal where the values are, that fill vectors; padded. Two tensors share their numbers.
class Ids {
 public:
  Ids(const Tensor& a, int64_t n, const Tensor& b, int64_t k) : of_a_(read(a, n)), of_b_(read(b, k)) {
    std::vector<int64_t> values(of_a_);
    values.insert(values.end(), of_b_.begin(), of_b_.end());
    std::sort(values.begin(), values.end());
    values.erase(std::unique(values.begin(), values.end()), values.end());
    count = static_cast<int64_t>(values.size());
    a_ = numbered(of_a_, values);
    b_ = numbered(of_b_, values);
  }

  const int32_t* a() const { return a_.data(); }
  const int32_t* b() const { return b_.data(); }
  int64_t count;  // of different values

 private:
  static std::vector<int64_t> read(const Tensor& ids, int64_t n) {
    STD_TORCH_CHECK(ids.is_cpu() && ids.dim() == 1 && ids.size(0) == n && ids.scalar_type() == ScalarType::Long,
                    "info_nce (native CPU): ids and labels must be int64, one for each row, on the CPU");
    std::vector<int64_t> values(n);
    const auto* data = static_cast<const int64_t*>(ids.data_ptr());
    for (int64_t i = 0; i < n; ++i) values[i] = data[i * ids.stride(0)];
    return values;
  }
  static std::vector<int32_t> numbered(const std::vector<int64_t>& ids, const std::vector<int64_t>& values) {
    std::vector<int32_t> numbers(round_up(static_cast<int64_t>(ids.size()), kBlock));
    for (size_t i = 0; i < ids.size(); ++i)
      numbers[i] = static_cast<int32_t>(std::lower_bound(values.begin(), values.end(), ids[i]) - values.begin());
    return numbers;
  }

  std::vector<int64_t> of_a_, of_b_;
  std::vector<int32_t> a_, b_;
};

// Which columns a row may not see.
struct LeftOut {
  LeftOut(const std::optional<Tensor>& x_ids, const std::optional<Tensor>& y_ids, std::optional<int64_t> diagonal,
          int64_t n, int64_t k)
      : diagonal(diagonal) {
    if (x_ids && y_ids) ids.emplace(*x_ids, n, *y_ids, k);
  }

  void set(Tile& tile, int64_t i, int64_t j) const {
    tile.diagonal = kNoDiagonal;
    if (diagonal) {
      const int64_t within = (i - j) * kBlock + *diagonal;
      if (std::abs(within) < kBlock) tile.diagonal = static_cast<int>(within);
    }
    tile.ids_i = ids ? ids->a() + i * kBlock : nullptr;
    tile.ids_j = ids ? ids->b() + j * kBlock : nullptr;
  }

  std::optional<int64_t> diagonal;
  std::optional<Ids> ids;
};

struct Problem : Scale {
  Problem(const Tensor& x, const Tensor& y, const Tensor& temperature, bool normalize)
      : Scale(temperature, check(x, y)),
        x(x, normalize),
        y(y, normalize),
        n(x.size(0)),
        k(y.size(0)),
        dims(x.size(1)),
        threads(n * k * dims < kWorthThreads ? 1 : torch::stable::get_num_threads()) {
    choose_shift([&] { return this->x.largest_norm() * this->y.largest_norm(); });
  }

  static ScalarType check(const Tensor& x, const Tensor& y) {
    STD_TORCH_CHECK(x.is_cpu() && y.is_cpu() && x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1) &&
                        x.size(0) > 0 && y.size(0) > 0 && x.size(1) > 0,
                    "info_nce (native CPU): x and y must be (N, D) and (K, D), N, K and D >= 1, on the CPU");
    STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), "info_nce (native CPU): x and y must have one dtype");
    return x.scalar_type();
  }

  Matrix x, y;
  int64_t n, k, dims, threads;
};

// f(b, padded, z, inverse_norm) for each block of a matrix, with its fp32 rows (padded, row_stride).
template <class F>
void for_each_block(const Matrix& matrix, const F& f) {
  torch::stable::parallel_for(0, matrix.blocks.count, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> z(std::min<int64_t>(kBlock, matrix.blocks.padded) * row_stride(matrix.dims));
    float inverse_norm[kBlock];
    for (int64_t b = begin; b < end; ++b) {
      matrix.read(b, z.get(), inverse_norm);
      f(b, round_up(matrix.blocks.rows(b), kRowMultiple), z.get(), inverse_norm);
    }
  });
}

struct PackedMatrix : Packed {
  PackedMatrix(const Engine& engine, const Matrix& matrix, int uses) : Packed(engine, matrix.blocks, matrix.dims, uses) {
    for_each_block(matrix, [&](int64_t b, int64_t padded, const float* z, const float*) { pack(b, z, padded); });
  }
};

float* stat(const Tensor& stats, Stat which) { return float_data(stats) + which * stats.size(1); }

// The stats of rows first .. first + rows from their sums, which start at `from`.
void write_stats(const Tensor& stats, int64_t first, int64_t rows, const float* max, const float* sum,
                 const float* moment, float t) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  float *const lse = stat(stats, kLse), *const shift = stat(stats, kShift);
  float *const log_sum = stat(stats, kLogSum), *const mean = stat(stats, kMean);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t i = first + r;
    const bool none = sum[r] == 0;
    shift[i] = none ? -kInfinity : max[r];
    log_sum[i] = std::log(sum[r]);
    lse[i] = none ? -kInfinity : static_cast<float>(double{max[r]} / t + std::log(double{sum[r]}));
    mean[i] = none ? 0.0f : max[r] + moment[r] / sum[r] * static_cast<float>(M_LN2) * t;
  }
}

Tensor nan_tensor(int64_t rows, int64_t cols) {
  Tensor tensor = empty({rows, cols});
  std::fill(float_data(tensor), float_data(tensor) + rows * cols, std::numeric_limits<float>::quiet_NaN());
  return tensor;
}

std::tuple<Tensor, Tensor> info_nce_fwd(Tensor x, Tensor y, Tensor temperature, std::optional<Tensor> x_ids,
                                        std::optional<Tensor> y_ids, std::optional<int64_t> diagonal, bool normalize,
                                        bool columns) {
  const Problem p(x, y, temperature, normalize);
  const int64_t k = columns ? p.k : 0;
  if (!(p.t > 0)) return {nan_tensor(4, p.n), nan_tensor(4, k)};
  const LeftOut left_out(x_ids, y_ids, diagonal, p.n, p.k);
  const PackedMatrix left(p.engine, p.x, Packed::kLeft), right(p.engine, p.y, Packed::kRight);

  struct Work {
    TileSums i, j;
    float logits[kBlock * kStride];
  };
  RowSums of_x(p.x.blocks.padded, p), of_y(columns ? p.y.blocks.padded : 0, p);
  const Meeting pairs{p.x.blocks.count, p.y.blocks.count};
  for_each_pair(pairs, p.threads, sizeof(Work), [&](const Pair& pair, void* scratch) {
    Work& w = *static_cast<Work*>(scratch);
    ForwardTile tile{};
    tile.left_i = left.left(pair.i);
    tile.right_j = right.right(pair.j);
    tile.depth = p.dims;
    tile.rows = p.x.blocks.rows(pair.i);
    tile.cols = p.y.blocks.rows(pair.j);
    left_out.set(tile, pair.i, pair.j);
    tile.scale = p.scale;
    tile.work = w.logits;
    tile.i = &w.i;
    tile.j = &w.j;
    p.engine.kernels.forward(tile, p.fixed_shift);
    of_x.add(p.x.blocks.first(pair.i), tile.rows, w.i);
    if (columns) of_y.add(p.y.blocks.first(pair.j), tile.cols, w.j);
  });
  Tensor x_stats = empty({4, p.n}), y_stats = empty({4, k});
  write_stats(x_stats, 0, p.n, of_x.max.data(), of_x.sum.data(), of_x.moment.data(), p.t);
  write_stats(y_stats, 0, k, of_y.max.data(), of_y.sum.data(), of_y.moment.data(), p.t);
  return {x_stats, y_stats};
}

// What each row brings to W (see BackwardTile): g_i P_ij / t with P = exp((s - shift) / t - log_sum), padded.
struct Weights {
  Weights(const Scale& scale, const std::optional<Tensor>& grad, const Tensor& stats, int64_t n)
      : weight(round_up(n, kBlock)), shift(weight.size()) {
    if (!grad) return;
    const RowValues g(*grad, n, "info_nce_bwd: the gradient of lse");
    const float *const shifts = stat(stats, kShift), *const log_sum = stat(stats, kLogSum);
    for (int64_t i = 0; i < n; ++i) {
      if (shifts[i] == -std::numeric_limits<float>::infinity()) continue;  // sees nothing
      shift[i] = shifts[i];
      // The fixed shift is folded into the weight: |s / t| <= 40 bounds the sum of the two, if neither of them.
      const float exponent = scale.fixed_shift ? log_sum[i] + shifts[i] / scale.t : log_sum[i];
      weight[i] = g[i] / scale.t * std::exp(-exponent);
    }
  }
  std::vector<float> weight, shift;
};

void check_stats(const Tensor& stats, int64_t rows, int64_t n, const char* name) {
  STD_TORCH_CHECK(stats.is_cpu() && stats.scalar_type() == ScalarType::Float && stats.dim() == 2 &&
                      stats.size(0) == rows && stats.size(1) == n && stats.is_contiguous(),
                  name, " (native CPU): got another shape, dtype or device, allowed: what the forward returned");
}

// The operands of the products of a pair: packed for the bf16 engine, in fp32 read afresh into the scratch behind `work`.
class ProductOperands {
 public:
  ProductOperands(const Problem& p, const Matrix& x, const Matrix& y, int left_uses) : x_(x), y_(y), same_(&x == &y) {
    work_size_ = p.engine.kernels.backward_work(p.dims);
    block_size_ = kBlock * row_stride(p.dims);
    if (!p.engine.bf16) return;
    const int all = Packed::kRight | Packed::kProduct;
    left_.emplace(p.engine, x, same_ ? all | left_uses : left_uses);
    if (!same_) right_.emplace(p.engine, y, all);
  }

  int64_t scratch_bytes() const { return (work_size_ + (left_ ? 0 : 2 * block_size_)) * sizeof(float); }
  float* block_i(void* scratch) const { return static_cast<float*>(scratch) + work_size_; }

  // Sets the left operand; in fp32 also `product`, the same rows.
  void set_left(Tile& tile, const void** product, int64_t i, void* scratch) const {
    tile.work = static_cast<float*>(scratch);
    if (left_) {
      tile.left_i = left_->left(i);
      if (product) *product = left_->product(i);
      return;
    }
    float inverse_norm[kBlock];
    x_.read(i, block_i(scratch), inverse_norm);
    tile.left_i = block_i(scratch);
    if (product) *product = tile.left_i;
  }
  void set_right(Tile& tile, const void** product, int64_t i, int64_t j, void* scratch) const {
    if (left_) {
      const PackedMatrix& right = same_ ? *left_ : *right_;
      tile.right_j = right.right(j);
      *product = right.product(j);
      return;
    }
    if (same_ && i == j) {
      *product = tile.left_i;
      return;
    }
    float inverse_norm[kBlock];
    float* const z = block_i(scratch) + block_size_;
    y_.read(j, z, inverse_norm);
    *product = z;
  }

 private:
  const Matrix &x_, &y_;
  bool same_;
  int64_t work_size_, block_size_;
  std::optional<PackedMatrix> left_, right_;
};

std::tuple<Tensor, Tensor> info_nce_bwd(Tensor grad_lse, std::optional<Tensor> grad_column_lse, Tensor x, Tensor y,
                                        Tensor temperature, Tensor of_rows, Tensor of_columns,
                                        std::optional<Tensor> x_ids, std::optional<Tensor> y_ids,
                                        std::optional<int64_t> diagonal, bool normalize) {
  const Problem p(x, y, temperature, normalize);
  check_stats(of_rows, 4, p.n, "of_rows");
  if (grad_column_lse) check_stats(of_columns, 4, p.k, "of_columns");
  const LeftOut left_out(x_ids, y_ids, diagonal, p.n, p.k);
  const Weights rows(p, grad_lse, of_rows, p.n), columns(p, grad_column_lse, of_columns, p.k);
  const Tensor out_x = empty({p.n, p.dims}), out_y = empty({p.k, p.dims});
  Gradient dx(p.engine, p.x.blocks, out_x), dy(p.engine, p.y.blocks, out_y);
  {
    const ProductOperands operands(p, p.x, p.y, Packed::kLeft | Packed::kProduct);
    const Meeting pairs{p.x.blocks.count, p.y.blocks.count};
    for_each_pair(pairs, p.threads, operands.scratch_bytes(), [&](const Pair& pair, void* scratch) {
      const auto [i, j, turn_i, turn_j] = pair;
      BackwardTile tile{};
      operands.set_left(tile, &tile.product_i, i, scratch);
      operands.set_right(tile, &tile.product_j, i, j, scratch);
      tile.depth = p.dims;
      tile.rows = p.x.blocks.rows(i);
      tile.cols = p.y.blocks.rows(j);
      left_out.set(tile, i, j);
      tile.scale = p.scale;
      tile.weight_i = &rows.weight[i * kBlock];
      tile.weight_j = &columns.weight[j * kBlock];
      tile.shift_i = &rows.shift[i * kBlock];
      tile.shift_j = &columns.shift[j * kBlock];
      tile.dz_i = dx[i];
      tile.dz_j = dy[j];
      tile.add_i = turn_i > 0;
      tile.add_j = turn_j > 0;
      tile.ld_dz = dx.ld;
      p.engine.kernels.backward(tile, p.fixed_shift);
    });
  }
  const auto finish = [](Gradient& dz, const Matrix& matrix, const Tensor& out) {
    for_each_block(matrix, [&](int64_t b, int64_t, const float* z, const float* inverse_norm) {
      dz.finish(b, matrix, out, z, inverse_norm, [](int64_t, float*) {});
    });
  };
  finish(dx, p.x, out_x);
  finish(dy, p.y, out_y);
  return {out_x, out_y};
}

// A task is a block of x and a part of y's blocks; the parts' sums are merged in order. Enough parts for many threads,
// few enough that their results, (N, D) each, stay small.
std::tuple<Tensor, Tensor> info_nce_one_pass(Tensor x, Tensor y, Tensor temperature, std::optional<Tensor> x_ids,
                                             std::optional<Tensor> y_ids, std::optional<int64_t> diagonal,
                                             bool normalize) {
  const Problem p(x, y, temperature, normalize);
  if (!(p.t > 0)) return {nan_tensor(4, p.n), nan_tensor(p.n, p.dims)};
  const LeftOut left_out(x_ids, y_ids, diagonal, p.n, p.k);
  constexpr int64_t kTasks = 64;
  const int64_t blocks = p.x.blocks.count, parts = std::min(p.y.blocks.count, ceil_div(kTasks, blocks));
  const int64_t ld = p.engine.bf16 ? round_up(p.dims, 32) : p.dims;
  const int64_t out_size = (p.engine.bf16 ? kBlock : std::min<int64_t>(kBlock, p.n)) * ld;
  Buffer<float> out(parts * blocks * out_size);
  std::vector<TileSums> sums(parts * blocks);
  const ProductOperands operands(p, p.x, p.y, Packed::kLeft);
  Failure failure;
  torch::stable::parallel_for(0, p.threads == 1 ? 1 : parts * blocks, 1, [&](int64_t begin, int64_t end) {
    if (p.threads == 1) end = parts * blocks;
    failure.guard([&] {
      const Scratch scratch(operands.scratch_bytes());
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task / blocks, i = task % blocks;
        TileSums& s = sums[task];
        const float reference = p.fixed_shift ? 1.0f : -std::numeric_limits<float>::max();
        std::fill(s.max, s.max + kBlock, reference);
        std::fill(s.sum, s.sum + kBlock, 0.0f);
        std::fill(s.moment, s.moment + kBlock, 0.0f);
        AttendTile tile{};
        operands.set_left(tile, nullptr, i, scratch.get());
        tile.depth = p.dims;
        tile.rows = p.x.blocks.rows(i);
        tile.scale = p.scale;
        tile.i = &s;
        tile.out = out.get() + task * out_size;
        tile.ld_out = ld;
        tile.first = true;
        for (int64_t j = part * p.y.blocks.count / parts; j < (part + 1) * p.y.blocks.count / parts; ++j) {
          operands.set_right(tile, &tile.product_j, i, j, scratch.get());
          tile.cols = p.y.blocks.rows(j);
          left_out.set(tile, i, j);
          p.engine.kernels.attend(tile, p.fixed_shift);
          tile.first = false;
        }
      }
    });
  });
  failure.rethrow();

  Tensor stats = empty({4, p.n}), mean = empty({p.n, p.dims});
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int rows = p.x.blocks.rows(i);
      RowSums merged(rows, p);
      for (int64_t part = 0; part < parts; ++part) merged.add(0, rows, sums[part * blocks + i]);
      write_stats(stats, p.x.blocks.first(i), rows, merged.max.data(), merged.sum.data(), merged.moment.data(), p.t);
      for (int r = 0; r < rows; ++r) {
        float* const to = float_data(mean) + (p.x.blocks.first(i) + r) * p.dims;
        std::fill(to, to + p.dims, 0.0f);
        for (int64_t part = 0; part < parts; ++part) {
          const TileSums& s = sums[part * blocks + i];
          if (s.sum[r] == 0) continue;
          const float share = std::exp2((s.max[r] - merged.max[r]) * p.scale) / merged.sum[r];
          const float* const from = out.get() + (part * blocks + i) * out_size + r * ld;
          for (int64_t d = 0; d < p.dims; ++d) to[d] += share * from[d];
        }
      }
    }
  });
  return {stats, mean};
}

// For each row the sum of its similarities to the other rows of its label, and their number: a class's rows are summed
// once, so that this costs M D and no tile knows of labels.
void sum_positives(const Problem& p, const Ids& labels, float* positives, float* count) {
  std::vector<int64_t> order(p.n), first;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return labels.a()[a] < labels.a()[b]; });
  for (int64_t k = 0; k < p.n; ++k)
    if (k == 0 || labels.a()[order[k]] != labels.a()[order[k - 1]]) first.push_back(k);
  first.push_back(p.n);
  torch::stable::parallel_for(0, labels.count, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> z(row_stride(p.dims));
    std::vector<double> sum(p.dims);
    for (int64_t label = begin; label < end; ++label) {
      std::fill(sum.begin(), sum.end(), 0.0);
      for (int64_t k = first[label]; k < first[label + 1]; ++k) {
        p.x.read_row(order[k], z.data());
        for (int64_t d = 0; d < p.dims; ++d) sum[d] += z[d];
      }
      for (int64_t k = first[label]; k < first[label + 1]; ++k) {
        p.x.read_row(order[k], z.data());
        double others = 0;
        for (int64_t d = 0; d < p.dims; ++d) others += z[d] * (sum[d] - z[d]);
        const int64_t alone = first[label + 1] - first[label] == 1;
        positives[order[k]] = alone ? 0.0f : static_cast<float>(others);
        count[order[k]] = static_cast<float>(first[label + 1] - first[label] - 1);
      }
    }
  });
}

// Blocks of one matrix in a tournament; an odd number of them plays with one that is empty.
Tournament all_pairs(const Matrix& matrix) { return {round_up(matrix.blocks.count, 2)}; }

Tensor sup_con_fwd(Tensor z, std::optional<Tensor> labels, std::optional<Tensor> ids, Tensor temperature,
                   bool normalize) {
  const Problem p(z, z, temperature, normalize);
  STD_TORCH_CHECK(!(labels && ids), "sup_con: got labels and ids, allowed: one of them");
  const LeftOut left_out(ids, ids, 0, p.n, p.n);
  Tensor stats = nan_tensor(6, p.n);
  if (labels)
    sum_positives(p, Ids(*labels, p.n, *labels, p.n), stat(stats, kPositives), stat(stats, kCount));
  else
    std::fill(stat(stats, kPositives), stat(stats, kPositives) + 2 * p.n, 0.0f);
  if (!(p.t > 0)) return stats;
  const PackedMatrix packed(p.engine, p.x, Packed::kLeft | Packed::kRight);

  struct Work {
    TileSums i, j;
    float logits[kBlock * kStride];
  };
  RowSums sums(p.x.blocks.padded, p);
  for_each_pair(all_pairs(p.x), p.threads, sizeof(Work), [&](const Pair& pair, void* scratch) {
    if (pair.j >= p.x.blocks.count) return;
    Work& w = *static_cast<Work*>(scratch);
    ForwardTile tile{};
    tile.left_i = packed.left(pair.i);
    tile.right_j = packed.right(pair.j);
    tile.depth = p.dims;
    tile.rows = p.x.blocks.rows(pair.i);
    tile.cols = p.x.blocks.rows(pair.j);
    left_out.set(tile, pair.i, pair.j);
    tile.scale = p.scale;
    tile.work = w.logits;
    tile.i = &w.i;
    tile.j = &w.j;
    p.engine.kernels.forward(tile, p.fixed_shift);
    sums.add(p.x.blocks.first(pair.i), tile.rows, w.i);
    if (pair.i != pair.j) sums.add(p.x.blocks.first(pair.j), tile.cols, w.j);
  });
  write_stats(stats, 0, p.n, sums.max.data(), sums.sum.data(), sums.moment.data(), p.t);
  return stats;
}

// W_ij = (g_i P_ij + g_j P_ji) / t, and h_i + h_j where the labels are equal: in the tile, since a confident class's two
// terms nearly cancel, and would not once each had been rounded to 16 bits.
Tensor sup_con_bwd(Tensor grad_lse, std::optional<Tensor> grad_positives, Tensor z, std::optional<Tensor> labels,
                   std::optional<Tensor> ids, Tensor temperature, Tensor stats, bool normalize) {
  const Problem p(z, z, temperature, normalize);
  check_stats(stats, 6, p.n, "stats");
  const LeftOut left_out(ids, ids, 0, p.n, p.n);
  const Weights weights(p, grad_lse, stats, p.n);
  std::optional<Ids> classes;
  std::vector<float> positive(round_up(p.n, kBlock));
  if (labels && grad_positives) {
    classes.emplace(*labels, p.n, *labels, p.n);
    const RowValues h(*grad_positives, p.n, "grad_positives");
    for (int64_t i = 0; i < p.n; ++i) positive[i] = h[i];
  }
  const Tensor out = empty({p.n, p.dims});
  Gradient dz(p.engine, p.x.blocks, out);
  {
    const ProductOperands operands(p, p.x, p.x, Packed::kLeft);
    for_each_pair(all_pairs(p.x), p.threads, operands.scratch_bytes(), [&](const Pair& pair, void* scratch) {
      const auto [i, j, turn_i, turn_j] = pair;
      if (j >= p.x.blocks.count) return;
      BackwardTile tile{};
      operands.set_left(tile, &tile.product_i, i, scratch);
      operands.set_right(tile, &tile.product_j, i, j, scratch);
      tile.depth = p.dims;
      tile.rows = p.x.blocks.rows(i);
      tile.cols = p.x.blocks.rows(j);
      left_out.set(tile, i, j);
      tile.scale = p.scale;
      tile.weight_i = &weights.weight[i * kBlock];
      tile.weight_j = &weights.weight[j * kBlock];
      tile.shift_i = &weights.shift[i * kBlock];
      tile.shift_j = &weights.shift[j * kBlock];
      tile.labels_i = classes ? classes->a() + i * kBlock : nullptr;
      tile.labels_j = classes ? classes->a() + j * kBlock : nullptr;
      tile.positive_i = &positive[i * kBlock];
      tile.positive_j = &positive[j * kBlock];
      tile.dz_i = dz[i];
      tile.dz_j = i == j ? nullptr : dz[j];  // W of (I, I) holds both roles of z already
      tile.add_i = i != j;                   // and comes first
      tile.add_j = true;
      tile.ld_dz = dz.ld;
      p.engine.kernels.backward(tile, p.fixed_shift);
    });
  }
  for_each_block(p.x, [&](int64_t b, int64_t, const float* rows, const float* inverse_norm) {
    dz.finish(b, p.x, out, rows, inverse_norm, [](int64_t, float*) {});
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ssl_fast_native, CPU, m) {
  m.impl("info_nce_fwd", TORCH_BOX(&info_nce_fwd));
  m.impl("info_nce_bwd", TORCH_BOX(&info_nce_bwd));
  m.impl("info_nce_one_pass", TORCH_BOX(&info_nce_one_pass));
  m.impl("sup_con_fwd", TORCH_BOX(&sup_con_fwd));
  m.impl("sup_con_bwd", TORCH_BOX(&sup_con_bwd));
}

}  // namespace
}  // namespace ssl_fast::contrast
