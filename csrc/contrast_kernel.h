// Contrastive losses on one pair of row blocks: exponentials, sums and weights on register tiles of logits, in fp32. No
// include guard: included once per instruction set, after simd.h and an engine (contrast_fp32.h, contrast_bf16.h) that has
//   kRows, kVectors, kCols                      the register tile, kRows x (kVectors kLanes)
//   for_each_register_tile(tile, finish)        S = z_I z_J^T, as finish(logits of a register tile, i, j)
//   multiply_weights(tile)                      the products with W, which finish has left in tile.work
//   backward_work(depth)                        floats of work space
//
//   forward    S, 2^x and both sums                                      2 B^2 D flop for a tile of B x B
//   backward   W from S, recomputed; dz_I += W z_J; dz_J += W^T z_I      6 B^2 D flop
//   attend     S, 2^x, the sums of rows and out += 2^x z_J               4 B^2 D flop

// Which elements of the tile's row i, columns j .. j + kLanes count.
struct TileMask {
  int rows, cols, diagonal;
  const int32_t *ids_i, *ids_j;

  explicit TileMask(const Tile& t) : rows(t.rows), cols(t.cols), diagonal(t.diagonal), ids_i(t.ids_i), ids_j(t.ids_j) {}

  SSL_FAST_INLINE bool touches(int i, int j) const {
    const int left_out = i + diagonal;
    return ids_i != nullptr || i + kRows > rows || j + kCols > cols || (left_out < j + kCols && j < left_out + kRows);
  }
  SSL_FAST_INLINE VInt at(int i, int j) const {
    const VInt column = lane_index() + j;
    VInt counts = (column < (i < rows ? cols : 0)) & (column != i + diagonal);
    if (ids_i != nullptr) counts &= load_int(ids_j + j) != ids_i[i];
    return counts;
  }
};

// out[r] = sum of partial[r], four rows at a time.
SSL_FAST_INLINE void reduce_lanes(const float (*partial)[kLanes], int rows, float* out) {
  for (int r = 0; r < rows; r += 4) {
    Quad sums[4];
    for (int q = 0; q < 4; ++q) {
      sums[q] = load_quad(partial[r + q]);
      for (int lane = 4; lane < kLanes; lane += 4) sums[q] += load_quad(partial[r + q] + lane);
    }
    transpose_quads(sums);
    store_quad(out + r, (sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
}

// Adds a register tile's 2^x and its moment to both sums, with the fixed shift x = scale * s - scale <= 0.
template <bool kMasked>
SSL_FAST_INLINE void add_exponentials(const V (&s)[kRows][kVectors], int i, int j, float scale, const TileMask& mask,
                                      float (*row_sum)[kLanes], float (*row_moment)[kLanes], TileSums& columns) {
  V col_sum[kVectors], col_moment[kVectors];
  SSL_FAST_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    col_sum[v] = load(columns.sum + j + v * kLanes);
    col_moment[v] = load(columns.moment + j + v * kLanes);
  }
  SSL_FAST_UNROLL
  for (int r = 0; r < kRows; ++r) {
    V sum{}, moment{};
    SSL_FAST_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const V x = s[r][v] * scale - scale;
      V e = exp2(x);
      if constexpr (kMasked) e = keep(e, mask.at(i + r, j + v * kLanes));
      sum += e;
      moment += e * x;
      col_sum[v] += e;
      col_moment[v] += e * x;
    }
    store(row_sum[i + r], load(row_sum[i + r]) + sum);
    store(row_moment[i + r], load(row_moment[i + r]) + moment);
  }
  SSL_FAST_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    store(columns.sum + j + v * kLanes, col_sum[v]);
    store(columns.moment + j + v * kLanes, col_moment[v]);
  }
}

inline void forward_fixed(const ForwardTile& t) {
  alignas(64) float row_sum[kBlock][kLanes], row_moment[kBlock][kLanes];
  const int padded_rows = round_up(t.rows, kRows * 4), padded_cols = round_up(t.cols, kCols);
  std::memset(row_sum, 0, sizeof(row_sum[0]) * padded_rows);
  std::memset(row_moment, 0, sizeof(row_moment[0]) * padded_rows);
  std::memset(t.j->sum, 0, sizeof(float) * padded_cols);
  std::memset(t.j->moment, 0, sizeof(float) * padded_cols);
  const TileMask mask(t);
  for_each_register_tile(t, [&](const V(&s)[kRows][kVectors], int i, int j) SSL_FAST_LAMBDA {
    if (mask.touches(i, j))
      add_exponentials<true>(s, i, j, t.scale, mask, row_sum, row_moment, *t.j);
    else
      add_exponentials<false>(s, i, j, t.scale, mask, row_sum, row_moment, *t.j);
  });
  reduce_lanes(row_sum, padded_rows, t.i->sum);
  reduce_lanes(row_moment, padded_rows, t.i->moment);
}

// S of a whole tile, masked elements at kMaskedLogit.
constexpr float kMaskedLogit = -0x1p127f;
template <class AnyTile>
inline void masked_logits(const AnyTile& t) {
  const TileMask mask(t);
  for_each_register_tile(t, [&](const V(&s)[kRows][kVectors], int i, int j) SSL_FAST_LAMBDA {
    const bool masked = mask.touches(i, j);
    for_each_vector([&](int r, int v) SSL_FAST_LAMBDA {
      const int column = j + v * kLanes;
      V logit = s[r][v];
      if (masked) logit = mask.at(i + r, column) ? logit : broadcast(kMaskedLogit);
      store(t.work + (i + r) * kStride + column, logit);
    });
  });
}

// (s - shift) scale within exp2's domain. The difference comes first: between large logits it is exact, and it is what
// decides the softmax.
SSL_FAST_INLINE V shifted_logit(V s, V shift, float scale) { return at_least(at_most((s - shift) * scale, 0), -126); }

// The maximum of one row (step kLanes) or of kLanes columns (step kStride) of the tile, then the sums relative to it.
struct OnlineSums {
  V max, sum, moment;
};
SSL_FAST_INLINE OnlineSums online_sums(const float* s, int count, int step, bool along_row, float scale) {
  OnlineSums sums{load(s), V{}, V{}};
  for (int k = 1; k < count; ++k) sums.max = load(s + k * step) > sums.max ? load(s + k * step) : sums.max;
  if (along_row) sums.max = broadcast(largest_lane(sums.max));
  for (int k = 0; k < count; ++k) {
    const V logit = load(s + k * step), x = shifted_logit(logit, sums.max, scale);
    const V e = keep(exp2(x), logit != kMaskedLogit);
    sums.sum += e;
    sums.moment += e * x;
  }
  return sums;
}

// Two exponentials for an element, one relative to its row's maximum and one relative to its column's.
inline void forward_online(const ForwardTile& t) {
  masked_logits(t);
  for (int i = 0; i < t.rows; ++i) {
    const int vectors = ceil_div(t.cols, kCols) * kVectors;
    const OnlineSums sums = online_sums(t.work + i * kStride, vectors, kLanes, true, t.scale);
    t.i->max[i] = sums.max[0];
    t.i->sum[i] = sum_lanes(sums.sum);
    t.i->moment[i] = sum_lanes(sums.moment);
  }
  for (int j = 0; j < t.cols; j += kLanes) {
    const OnlineSums sums = online_sums(t.work + j, t.rows, kStride, false, t.scale);
    store(t.j->max + j, sums.max);
    store(t.j->sum + j, sums.sum);
    store(t.j->moment + j, sums.moment);
  }
}

inline void forward(const ForwardTile& t, bool fixed_shift) { fixed_shift ? forward_fixed(t) : forward_online(t); }

// One row of a register tile of W from its logits.
template <bool kFixedShift>
SSL_FAST_INLINE V weight(const V& s, const BackwardTile& t, int i, int j) {
  if constexpr (kFixedShift) return exp2(s * t.scale) * (t.weight_i[i] + load(t.weight_j + j));
  const V p_ij = exp2(shifted_logit(s, broadcast(t.shift_i[i]), t.scale));
  const V p_ji = exp2(shifted_logit(s, load(t.shift_j + j), t.scale));
  return p_ij * t.weight_i[i] + p_ji * load(t.weight_j + j);
}

template <bool kFixedShift, bool kLabels>
inline void weights(const BackwardTile& t) {
  const TileMask mask(t);
  for_each_register_tile(t, [&](const V(&s)[kRows][kVectors], int i, int j) SSL_FAST_LAMBDA {
    const bool masked = mask.touches(i, j);
    for_each_vector([&](int r, int v) SSL_FAST_LAMBDA {
      const int column = j + v * kLanes;
      V w = weight<kFixedShift>(s[r][v], t, i + r, column);
      if constexpr (kLabels) {
        const V positive = load(t.positive_j + column) + t.positive_i[i + r];
        w += keep(positive, load_int(t.labels_j + column) == t.labels_i[i + r]);
      }
      if (masked) w = keep(w, mask.at(i + r, column));
      store(t.work + (i + r) * kStride + column, w);
    });
  });
}

inline void backward(const BackwardTile& t, bool fixed_shift) {
  if (t.labels_i != nullptr)
    fixed_shift ? weights<true, true>(t) : weights<false, true>(t);
  else
    fixed_shift ? weights<true, false>(t) : weights<false, false>(t);
  multiply_weights(t);
}

// 2^x of a whole tile into t.work, and the sums of its rows added to t.i.
inline void attend_fixed(const AttendTile& t) {
  alignas(64) float row_sum[kBlock][kLanes], row_moment[kBlock][kLanes];
  alignas(64) float sum[kBlock], moment[kBlock];
  const int padded_rows = round_up(t.rows, kRows * 4);
  std::memset(row_sum, 0, sizeof(row_sum[0]) * padded_rows);
  std::memset(row_moment, 0, sizeof(row_moment[0]) * padded_rows);
  const TileMask mask(t);
  for_each_register_tile(t, [&](const V(&s)[kRows][kVectors], int i, int j) SSL_FAST_LAMBDA {
    const bool masked = mask.touches(i, j);
    SSL_FAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      V sums{}, moments{};
      SSL_FAST_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const int column = j + v * kLanes;
        const V x = s[r][v] * t.scale - t.scale;
        V e = exp2(x);
        if (masked) e = keep(e, mask.at(i + r, column));
        store(t.work + (i + r) * kStride + column, e);
        sums += e;
        moments += e * x;
      }
      store(row_sum[i + r], load(row_sum[i + r]) + sums);
      store(row_moment[i + r], load(row_moment[i + r]) + moments);
    }
  });
  reduce_lanes(row_sum, padded_rows, sum);
  reduce_lanes(row_moment, padded_rows, moment);
  for (int i = 0; i < t.rows; ++i) {
    t.i->sum[i] += sum[i];
    t.i->moment[i] += moment[i];
  }
}

// The same relative to the largest logit so far; where that moves, what came before is scaled down.
inline void attend_online(const AttendTile& t) {
  masked_logits(t);
  const int padded_cols = round_up(t.cols, kCols);
  for (int i = 0; i < t.rows; ++i) {
    float* const row = t.work + i * kStride;
    V largest = load(row);
    for (int j = kLanes; j < padded_cols; j += kLanes) largest = load(row + j) > largest ? load(row + j) : largest;
    const float before = t.i->max[i], max = std::max(before, largest_lane(largest));
    const float down = (before - max) * t.scale, kept = t.i->sum[i] > 0 ? std::exp2(down) : 0.0f;
    V sum{}, moment{};
    for (int j = 0; j < padded_cols; j += kLanes) {
      const V logit = load(row + j), x = shifted_logit(logit, broadcast(max), t.scale);
      const V e = keep(exp2(x), logit != kMaskedLogit);
      store(row + j, e);
      sum += e;
      moment += e * x;
    }
    t.i->max[i] = max;
    if (kept > 0)
      t.i->moment[i] = kept * (t.i->moment[i] + down * t.i->sum[i]) + sum_lanes(moment);
    else
      t.i->moment[i] = sum_lanes(moment);
    t.i->sum[i] = kept * t.i->sum[i] + sum_lanes(sum);
    if (!t.first && max != before)
      for (int64_t d = 0; d < t.ld_out; ++d) t.out[i * t.ld_out + d] *= kept;
  }
}

inline void attend(const AttendTile& t, bool fixed_shift) {
  fixed_shift ? attend_fixed(t) : attend_online(t);
  multiply_weights(t);
}

constexpr Kernels kKernels{forward, backward, attend, backward_work};
