// The register tile of the contrastive losses' products, after simd.h. No include guard: see there.

// kRows rows of kVectors vectors of sums.
constexpr int kRows = SSL_FAST_ROWS;
constexpr int kVectors = 2;
constexpr int kCols = kVectors * kLanes;

// f(r, v) for each vector of a register tile. Unless these loops vanish early, the tile lives in memory.
template <int kVectorsUsed = kVectors, class F>
SSL_FAST_INLINE void for_each_vector(const F& f) {
  SSL_FAST_UNROLL
  for (int r = 0; r < kRows; ++r) {
    SSL_FAST_UNROLL
    for (int v = 0; v < kVectorsUsed; ++v) f(r, v);
  }
}
