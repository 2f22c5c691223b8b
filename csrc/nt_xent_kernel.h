// NT-Xent on one pair of row blocks: exponentials, sums and weights on register tiles of logits, in fp32. No include
// guard: included once per instruction set, after simd.h and an engine (nt_xent_fp32.h, nt_xent_amx.h) that has
//   kRows, kVectors, kCols                      the register tile, kRows x (kVectors kLanes)
//   for_each_register_tile(tile, finish)        S = z_I z_J^T, as finish(logits of a register tile, i, j)
//   multiply_weights(tile)                      the products with W, which finish has left in tile.work
//   backward_work(depth)                        floats of work space
//
//   forward    S, 2^x and both sums                                      2 B^2 D flop for a tile of B x B
//   backward   W from S, recomputed; dz_I += W z_J; dz_J += W^T z_I      6 B^2 D flop

// Which elements of the tile's row i, columns j .. j + kLanes count.
struct TileMask {
  int rows, cols;
  bool diagonal;

  SSL_FAST_INLINE bool touches(int i, int j) const {
    return i + kRows > rows || j + kCols > cols || (diagonal && i < j + kCols && j < i + kRows);
  }
  SSL_FAST_INLINE VInt at(int i, int j) const {
    const VInt column = lane_index() + j;
    VInt counts = column < (i < rows ? cols : 0);
    if (diagonal) counts &= column != i;
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
  const TileMask mask{t.rows, t.cols, t.diagonal};
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
inline void masked_logits(const ForwardTile& t) {
  const TileMask mask{t.rows, t.cols, t.diagonal};
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

template <bool kFixedShift>
inline void weights(const BackwardTile& t) {
  const TileMask mask{t.rows, t.cols, t.diagonal};
  for_each_register_tile(t, [&](const V(&s)[kRows][kVectors], int i, int j) SSL_FAST_LAMBDA {
    const bool masked = mask.touches(i, j);
    for_each_vector([&](int r, int v) SSL_FAST_LAMBDA {
      const int column = j + v * kLanes;
      V w = weight<kFixedShift>(s[r][v], t, i + r, column);
      if (masked) w = keep(w, mask.at(i + r, column));
      store(t.work + (i + r) * kStride + column, w);
    });
  });
}

inline void backward(const BackwardTile& t, bool fixed_shift) {
  fixed_shift ? weights<true>(t) : weights<false>(t);
  multiply_weights(t);
}

constexpr Kernels kKernels{forward, backward, backward_work};
