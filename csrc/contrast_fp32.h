// The products of contrastive losses in fp32 (an engine of contrast_kernel.h). No include guard: see simd.h.
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
template <class Operands, class Finish>
SSL_FAST_INLINE void for_each_register_tile(int rows, int cols, int64_t depth, const Operands& operands, float* partial,
                                            const Finish& finish) {
  const float* const a = operands.left;
  const int64_t a_row = operands.row, a_depth = operands.depth_step;
  for (int64_t k = 0; k < depth; k += kDepth) {
    const float* const b = operands.right(k, std::min(kDepth, depth - k));
    for (int j = 0; j < cols; j += kCols)
      for (int i = 0; i < rows; i += kRows) {
        float* sums = partial + i * kStride + j;
        V s[kRows][kVectors];
        for_each_vector([&](int r, int v) SSL_FAST_LAMBDA {
          s[r][v] = k == 0 ? V{} : load(sums + r * kStride + v * kLanes);
        });
        multiply(s, std::min(kDepth, depth - k), a + i * a_row + k * a_depth, a_row, a_depth, b + j, kStride);
        if (k + kDepth >= depth) {
          finish(s, i, j);
          continue;
        }
        for_each_vector([&](int r, int v) SSL_FAST_LAMBDA { store(sums + r * kStride + v * kLanes, s[r][v]); });
      }
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

// The operands of S. The forward has blocks transposed, each fit to be either one. The tiles that multiply by z have its
// rows, and transpose block J on the fly: under 1% of their time.
struct TransposedOperands {
  const float *left, *transposed;
  int64_t row = 1, depth_step = kStride;

  explicit TransposedOperands(const Tile& t)
      : left(static_cast<const float*>(t.left_i)), transposed(static_cast<const float*>(t.right_j)) {}
  SSL_FAST_INLINE const float* right(int64_t k, int64_t) const { return transposed + k * kStride; }
};

template <class ProductTile>
struct RowOperands {
  const float *left, *z_j;
  int64_t row, depth_step = 1;
  int padded_cols;
  float* panel;  // (kDepth, kStride)

  explicit RowOperands(const ProductTile& t)
      : left(static_cast<const float*>(t.left_i)),
        z_j(static_cast<const float*>(t.product_j)),
        row(row_stride(t.depth)),
        padded_cols(round_up(t.cols, kRowMultiple)),
        panel(t.work + kBlock * kStride) {}
  SSL_FAST_INLINE const float* right(int64_t k, int64_t depth) const {
    transpose(z_j + k, row, padded_cols, round_up(depth, 4), panel, kStride);
    return panel;
  }
};

template <class Finish>
SSL_FAST_INLINE void for_each_register_tile(const ForwardTile& t, const Finish& finish) {
  for_each_register_tile(t.rows, t.cols, t.depth, TransposedOperands(t), t.work, finish);
}
template <class ProductTile, class Finish>
SSL_FAST_INLINE void for_each_register_tile(const ProductTile& t, const Finish& finish) {
  for_each_register_tile(t.rows, t.cols, t.depth, RowOperands<ProductTile>(t), t.work, finish);
}

inline int64_t backward_work(int64_t) { return (kBlock + kDepth) * kStride; }

// dz_I += W z_J and dz_J += W^T z_I, from W in t.work.
inline void multiply_weights(const BackwardTile& t) {
  const float *z_i = static_cast<const float*>(t.product_i), *z_j = static_cast<const float*>(t.product_j);
  const int64_t ld = row_stride(t.depth);
  product({t.work, kStride, 1, z_j, ld, t.cols, t.dz_i, t.ld_dz, t.rows, t.add_i}, t.depth);
  if (t.dz_j != nullptr) product({t.work, 1, kStride, z_i, ld, t.rows, t.dz_j, t.ld_dz, t.cols, t.add_j}, t.depth);
}

inline void multiply_weights(const AttendTile& t) {
  const float* z_j = static_cast<const float*>(t.product_j);
  product({t.work, kStride, 1, z_j, row_stride(t.depth), t.cols, t.out, t.ld_out, t.rows, !t.first}, t.depth);
}
