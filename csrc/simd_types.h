// Vectors of floats from and to memory of any floating dtype, and as bits; after simd.h. No include guard: see there.

typedef uint16_t VShort __attribute__((vector_size(2 * SSL_FAST_LANES)));
typedef uint16_t VShortUnaligned __attribute__((vector_size(2 * SSL_FAST_LANES), aligned(2)));

SSL_FAST_INLINE V as_float(VInt bits) { return reinterpret_cast<V>(bits); }
SSL_FAST_INLINE VInt as_int(V v) { return reinterpret_cast<VInt>(v); }

// GCC makes four instructions of these conversions where one or two do.
SSL_FAST_INLINE VInt widen(const void* p) {
#if SSL_FAST_X86_LANES == 16
  return (VInt)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
#elif SSL_FAST_X86_LANES == 8
  return (VInt)_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*static_cast<const VShortUnaligned*>(p), VInt);
#endif
}

// Of lanes from 0 to 65535.
SSL_FAST_INLINE VShort narrow(VInt v) {
#if SSL_FAST_X86_LANES == 16
  return (VShort)_mm512_cvtepi32_epi16((__m512i)v);
#elif SSL_FAST_X86_LANES == 8
  const __m256i all = (__m256i)v;
  return (VShort)_mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
#else
  return __builtin_convertvector(v, VShort);
#endif
}

SSL_FAST_INLINE V load_as_float(const float* p) { return load(p); }

SSL_FAST_INLINE V load_as_float(const BFloat16* p) { return as_float(widen(p) << 16); }

#if SSL_FAST_X86_LANES == 16
SSL_FAST_INLINE V load_as_float(const Half* p) { return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
#elif SSL_FAST_X86_LANES == 8
SSL_FAST_INLINE V load_as_float(const Half* p) { return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
#else
// A half's exponent and mantissa, shifted up, are a float too small by 2^112, subnormal ones included; but inf and NaN
// need the largest exponent.
SSL_FAST_INLINE V load_as_float(const Half* p) {
  const VInt half = widen(p), magnitude = (half & 0x7fff) << 13;
  const VInt finite = as_int(as_float(magnitude) * 0x1p112f);
  const VInt special = magnitude >= (0x7c00 << 13);
  return as_float(finite | (special & 0x7f800000) | (half & 0x8000) << 16);
}
#endif

// To nearest even.
SSL_FAST_INLINE VShort rounded(V v, BFloat16) {
  typedef uint32_t VUnsigned __attribute__((vector_size(4 * SSL_FAST_LANES)));
  const VUnsigned bits = reinterpret_cast<VUnsigned>(v);
  const VUnsigned nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return narrow((v == v) ? reinterpret_cast<VInt>(nearest) : VInt{} + 0x7fc0);
}

#if SSL_FAST_X86_LANES == 16
SSL_FAST_INLINE VShort rounded(V v, Half) { return (VShort)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif SSL_FAST_X86_LANES == 8
SSL_FAST_INLINE VShort rounded(V v, Half) { return (VShort)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
SSL_FAST_INLINE VShort rounded(V v, Half) {
  const VInt sign = as_int(v) & static_cast<int32_t>(0x80000000), magnitude = as_int(v) ^ sign;
  // Adding 1/2 leaves a subnormal half in the low bits, rounded by the addition.
  const VInt subnormal = as_int(as_float(magnitude) + 0.5f) - 0x3f000000;
  const VInt normal = (magnitude - (112 << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const VInt too_large = magnitude > 0x7f800000 ? VInt{} + 0x7e00 : VInt{} + 0x7c00;
  const VInt half = magnitude >= (143 << 23) ? too_large : magnitude < (113 << 23) ? subnormal : normal;
  return narrow(half | (sign >> 16 & 0x8000));
}
#endif

// With `stream`, past the caches, for an aligned p: what is written does not push out what is still to be read.
SSL_FAST_INLINE void store_as(float* p, V v, bool stream) {
#if SSL_FAST_X86_LANES == 16
  if (stream) return _mm512_stream_ps(p, (__m512)v);
#elif SSL_FAST_X86_LANES == 8
  if (stream) return _mm256_stream_ps(p, (__m256)v);
#endif
  store(p, v);
}

template <class T>
SSL_FAST_INLINE void store_as(T* p, V v, bool stream) {
  const VShort bits = rounded(v, T{});
#if SSL_FAST_X86_LANES == 16
  if (stream) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)bits);
#elif SSL_FAST_X86_LANES == 8
  if (stream) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)bits);
#endif
  *reinterpret_cast<VShortUnaligned*>(p) = bits;
}

// The first n elements, and 0 in the lanes beyond.
template <class T>
SSL_FAST_INLINE V load_first(const T* p, int n) {
  if (n == kLanes) return load_as_float(p);
  T some[kLanes] = {};
  for (int i = 0; i < n; ++i) some[i] = p[i];
  return load_as_float(some);
}

template <class T>
SSL_FAST_INLINE void store_first(T* p, V v, int n, bool stream = false) {
  if (n == kLanes) return store_as(p, v, stream);
  T some[kLanes];
  store_as(some, v, false);
  for (int i = 0; i < n; ++i) p[i] = some[i];
}

SSL_FAST_INLINE VInt first_lanes(int n) { return lane_index() < n; }

// A bit a lane from lanes of all ones or zeros, and back.
SSL_FAST_INLINE unsigned to_bits(VInt lanes) {
#if SSL_FAST_X86_LANES == 16
  return _mm512_movepi32_mask((__m512i)lanes);
#elif SSL_FAST_X86_LANES == 8
  return static_cast<unsigned>(_mm256_movemask_ps((__m256)lanes));
#else
  unsigned bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= (lanes[lane] & 1u) << lane;
  return bits;
#endif
}

SSL_FAST_INLINE VInt from_bits(unsigned bits) {
  VInt bit;
  for (int lane = 0; lane < kLanes; ++lane) bit[lane] = 1 << lane;
  return ((VInt{} + static_cast<int32_t>(bits)) & bit) != 0;
}

// Bits i, i + 1, ... i + n - 1 of a row of bits, i a multiple of kLanes.
SSL_FAST_INLINE void write_bits(uint8_t* row, int64_t i, int n, unsigned bits) {
  uint8_t* const at = row + i / 8;
  bits &= (1u << n) - 1;
  if constexpr (kLanes == 4) {
    *at = static_cast<uint8_t>(i % 8 ? *at | bits << 4 : bits);
  } else {
    *at = static_cast<uint8_t>(bits);
    if (kLanes == 16 && n > 8) at[1] = static_cast<uint8_t>(bits >> 8);
  }
}

SSL_FAST_INLINE unsigned read_bits(const uint8_t* row, int64_t i, int n) {
  const uint8_t* const at = row + i / 8;
  if constexpr (kLanes == 4) return *at >> i % 8;
  return kLanes == 16 && n > 8 ? at[0] | at[1] << 8 : at[0];
}
