// The products of NT-Xent in fp32 (an engine of nt_xent_kernel.h). No include guard: see simd.h.
//
// One register tile serves all three: kRows x (kVectors kLanes) accumulators, numbers of A broadcast from memory
// against vectors of B. Operands need no packing: strides say whether A is read along its rows or down its columns.

// acc += A B over `depth`: A(r, k) at a[r * a_row + k * a_depth], B(k, c) at b[k * b_depth + c].
template <int kVectorsUsed>
SSL_FAST_INLINE void multiply(V (&acc)[kRows][kVectorsUsed], int64_t depth, const float* a, int64_t a_row,
                              int64_t a_depth, const float* b, int64_t b_depth) {
  for (int64_t k = 0; k < depth; ++k, a += a_depth, b += b_depth) {
    V columns[kVectorsUsed];
    SSL_FAST_UNROLL
    for (int v = 0; v < kVectorsUsed; ++v) columns[v] = load(b + v * kLanes);
    SSL_FAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const V row = broadcast(a[r * a_row]);
      SSL_FAST_UNROLL
      for (int v = 0; v < kVectorsUsed; ++v) acc[r][v] += row * columns[v];
    }
  }
}

// S = A B over `depth`, as register tiles: finish(s, i, j) for rows i .. i + kRows, columns j .. j + kCols of the tile.
// A deep product goes in chunks whose panel of B stays in L1, with the sums so far in `partial` (kBlock, kStride).
constexpr int64_t kDepth = 256;
template <class Finish>
SSL_FAST_INLINE void for_each_register_tile(int rows, int cols, int64_t depth, const float* a, int64_t a_row,
                                            int64_t a_depth, const float* b, float* partial, const Finish& finish) {
  for (int64_t k = 0; k < depth; k += kDepth)
    for (int j = 0; j < cols; j += kCols)
      for (int i = 0; i < rows; i += kRows) {
        float* sums = partial + i * kStride + j;
        V s[kRows][kVectors];
        for_each_vector([&](int r, int v) SSL_FAST_LAMBDA {
          s[r][v] = k == 0 ? V{} : load(sums + r * kStride + v * kLanes);
        });
        multiply(s, std::min(kDepth, depth - k), a + i * a_row + k * a_depth, a_row, a_depth, b + k * kStride + j,
                 kStride);
        if (k + kDepth >= depth) {
          finish(s, i, j);
          continue;
        }
        for_each_vector([&](int r, int v) SSL_FAST_LAMBDA { store(sums + r * kStride + v * kLanes, s[r][v]); });
      }
}

// Adds a register tile to out, or stores it there; only rows x cols of it exist.
template <int kVectorsUsed>
SSL_FAST_INLINE void write_tile(const V (&acc)[kRows][kVectorsUsed], int rows, int cols, bool add, float* out,
                                int64_t ld) {
  if (rows >= kRows && cols >= kVectorsUsed * kLanes) {
    for_each_vector<kVectorsUsed>([&](int r, int v) SSL_FAST_LAMBDA {
      float* p = out + r * ld + v * kLanes;
      store(p, add ? load(p) + acc[r][v] : acc[r][v]);
    });
    return;
  }
  float edge[kRows][kVectorsUsed * kLanes];
  for_each_vector<kVectorsUsed>([&](int r, int v) SSL_FAST_LAMBDA { store(edge[r] + v * kLanes, acc[r][v]); });
  for (int r = 0; r < std::min(kRows, rows); ++r)
    for (int c = 0; c < std::min(kVectorsUsed * kLanes, cols); ++c)
      out[r * ld + c] = (add ? out[r * ld + c] : 0.0f) + edge[r][c];
}

struct Product {
  const float* a;  // W, read along rows (a_row = kStride, a_depth = 1) or columns (1, kStride)
  int64_t a_row, a_depth;
  const float* z;  // (depth, ld)
  int64_t ld, depth;
  float* out;  // (rows, ld_out)
  int64_t ld_out;
  int rows;
  bool add;
};

template <int kVectorsUsed>
SSL_FAST_INLINE void product_columns(const Product& p, int64_t d, int cols) {
  for (int i = 0; i < p.rows; i += kRows) {
    V acc[kRows][kVectorsUsed];
    for_each_vector<kVectorsUsed>([&](int r, int v) SSL_FAST_LAMBDA { acc[r][v] = V{}; });
    multiply(acc, p.depth, p.a + i * p.a_row, p.a_row, p.a_depth, p.z + d, p.ld);
    write_tile(acc, p.rows - i, cols, p.add, p.out + i * p.ld_out + d, p.ld_out);
  }
}

// out (rows, D) = or += A (rows, depth) z (depth, D), the last columns with a narrower register tile.
SSL_FAST_INLINE void product(const Product& p, int64_t dims) {
  int64_t d = 0;
  for (; dims - d > kLanes; d += kCols) product_columns<kVectors>(p, d, std::min<int64_t>(kCols, dims - d));
  if (d < dims) product_columns<1>(p, d, dims - d);
}

// The operands of S. The forward has blocks transposed, each fit to be either one. The backward has rows, for its other
// products, and transposes block J on the fly: under 1% of its time, for half the memory.
struct Logits {
  const float* left;
  int64_t row, depth_step;
  const float* right;  // (depth, kStride)

  explicit Logits(const ForwardTile& t)
      : left(static_cast<const float*>(t.left_i)),
        row(1),
        depth_step(kStride),
        right(static_cast<const float*>(t.right_j)) {}
  explicit Logits(const BackwardTile& t)
      : left(static_cast<const float*>(t.left_i)),
        row(row_stride(t.depth)),
        depth_step(1),
        right(t.work + kBlock * kStride) {
    transpose(static_cast<const float*>(t.product_j), row, round_up(t.cols, kRowMultiple), round_up(t.depth, 4),
              t.work + kBlock * kStride, kStride);
  }
};

template <class Tile, class Finish>
SSL_FAST_INLINE void for_each_register_tile(const Tile& t, const Finish& finish) {
  const Logits s(t);
  for_each_register_tile(t.rows, t.cols, t.depth, s.left, s.row, s.depth_step, s.right, t.work, finish);
}

inline int64_t backward_work(int64_t depth) { return (kBlock + round_up(depth, 4)) * kStride; }

// dz_I += W z_J and dz_J += W^T z_I, from W in t.work.
inline void multiply_weights(const BackwardTile& t) {
  const float *z_i = static_cast<const float*>(t.product_i), *z_j = static_cast<const float*>(t.product_j);
  const int64_t ld = row_stride(t.depth);
  product({t.work, kStride, 1, z_j, ld, t.cols, t.dz_i, t.ld_dz, t.rows, !t.same_block}, t.depth);
  if (!t.same_block) product({t.work, 1, kStride, z_i, ld, t.rows, t.dz_j, t.ld_dz, t.cols, true}, t.depth);
}
