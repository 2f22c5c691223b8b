// A register tile of sums of products of pairs of bf16, as contrast_bf16.h wants it where there are no AMX tiles. Needs 16
// lanes; with SSL_FAST_EMULATE_PAIRS the instruction is done in software, for tests on any machine. No include guard: see
// simd.h.

// sum + the low halves' product + the high halves'.
SSL_FAST_INLINE V add_product_of_pairs(V sum, VInt a, VInt b) {
#if defined(SSL_FAST_EMULATE_PAIRS)
  const VInt high = VInt{} + static_cast<int32_t>(0xffff0000);
  sum += reinterpret_cast<V>(a << 16) * reinterpret_cast<V>(b << 16);
  return sum + reinterpret_cast<V>(a & high) * reinterpret_cast<V>(b & high);
#else
  return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
}

// Strides count elements. a: kRows rows of 32 bf16; b: 16 rows of 32 pairs of bf16; sums: kRows rows of 32 floats.
struct PairTiles {
  static constexpr int kHeight = kRows;
  static constexpr bool kInRegisters = true;

  SSL_FAST_INLINE void zero() {
    for_each_vector([&](int r, int v) SSL_FAST_LAMBDA { sums[r][v] = V{}; });
  }
  SSL_FAST_INLINE void load(const float* from, int64_t ld) {
    for_each_vector([&](int r, int v) SSL_FAST_LAMBDA { std::memcpy(&sums[r][v], from + r * ld + v * kLanes, sizeof(V)); });
  }
  SSL_FAST_INLINE void store(float* to, int64_t ld) const {
    for_each_vector([&](int r, int v) SSL_FAST_LAMBDA { std::memcpy(to + r * ld + v * kLanes, &sums[r][v], sizeof(V)); });
  }
  SSL_FAST_INLINE void multiply(const uint16_t* a, int64_t ld_a, const uint32_t* b, int64_t ld_b) {
    for (int k = 0; k < 16; ++k, a += 2, b += ld_b) {
      VInt columns[kVectors];
      SSL_FAST_UNROLL
      for (int v = 0; v < kVectors; ++v) std::memcpy(&columns[v], b + v * kLanes, sizeof(VInt));
      SSL_FAST_UNROLL
      for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        std::memcpy(&pair, a + r * ld_a, sizeof(pair));
        SSL_FAST_UNROLL
        for (int v = 0; v < kVectors; ++v) sums[r][v] = add_product_of_pairs(sums[r][v], VInt{} + pair, columns[v]);
      }
    }
  }

  V sums[kRows][kVectors];
};
