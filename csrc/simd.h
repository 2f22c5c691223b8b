// Vectors of SSL_FAST_LANES floats in the compiler's vector extensions. No include guard: included once per instruction
// set, inside a namespace of its own and under that set's target pragma.

typedef float V __attribute__((vector_size(4 * SSL_FAST_LANES)));
typedef int32_t VInt __attribute__((vector_size(4 * SSL_FAST_LANES)));
typedef float VUnaligned __attribute__((vector_size(4 * SSL_FAST_LANES), aligned(4)));

constexpr int kLanes = SSL_FAST_LANES;

SSL_FAST_INLINE V load(const float* p) { return *reinterpret_cast<const VUnaligned*>(p); }
typedef int32_t VIntUnaligned __attribute__((vector_size(4 * SSL_FAST_LANES), aligned(4)));
SSL_FAST_INLINE VInt load_int(const int32_t* p) { return *reinterpret_cast<const VIntUnaligned*>(p); }
// Into L2. An address past the end does no harm.
SSL_FAST_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
SSL_FAST_INLINE void store(float* p, V v) { *reinterpret_cast<VUnaligned*>(p) = v; }
// x - 0 is x to the bit, -0 and NaN included, so this compiles to one broadcast (x + 0 would not).
SSL_FAST_INLINE V broadcast(float x) { return x - V{}; }

// These return x where x is NaN.
SSL_FAST_INLINE V at_least(V x, float low) { return broadcast(low) > x ? broadcast(low) : x; }
SSL_FAST_INLINE V at_most(V x, float high) { return broadcast(high) < x ? broadcast(high) : x; }

SSL_FAST_INLINE VInt lane_index() {
  VInt index;
  for (int lane = 0; lane < kLanes; ++lane) index[lane] = lane;
  return index;
}

SSL_FAST_INLINE V keep(V v, VInt mask) { return reinterpret_cast<V>(reinterpret_cast<VInt>(v) & mask); }

// In pairs, which wait for each other less than one after the other would.
SSL_FAST_INLINE float sum_lanes(V v) {
#if SSL_FAST_X86_LANES == 16
  return _mm512_reduce_add_ps((__m512)v);
#else
  float sums[kLanes];
  store(sums, v);
  SSL_FAST_UNROLL
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  return sums[0];
#endif
}

SSL_FAST_INLINE float largest_lane(V v) {
  float largest = v[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = v[lane] > largest ? v[lane] : largest;
  return largest;
}

// 2^x for -126 <= x < 128, NaN for NaN. x = n + f, |f| <= 1/2: adding 1.5 * 2^23 + 127 leaves n + 127 in the low bits,
// which shifted up are the float 2^n; 2^f is a minimax polynomial with p(0) = 1, of degree 5 with relative error
// 1.1e-7, or of degree 3 with 1.0e-4, a twentieth of what rounding to bf16 brings.
SSL_FAST_INLINE V exp2(V x) {
  constexpr float kRound = 0x1.8p23f + 127;
  const V rounded = x + kRound;
  const V f = x - (rounded - kRound);
#if SSL_FAST_EXP_DEGREE == 3
  V p = f * 5.50089329e-2f + 2.42210969e-1f;
  p = p * f + 6.93282902e-1f;
#else
  V p = f * 1.32647273e-3f + 9.67151299e-3f;
  p = p * f + 5.55073358e-2f;
  p = p * f + 2.40222424e-1f;
  p = p * f + 6.93147004e-1f;
#endif
  p = p * f + 1.0f;
  return p * reinterpret_cast<V>(reinterpret_cast<VInt>(rounded) << 23);
}
