// Vectors of floats from and to memory of any floating dtype, and as bits; after simd.h. No include guard: see there.

typedef uint16_t VShort __attribute__((vector_size(2 * SSL_FAST_LANES)));
typedef uint16_t VShortUnaligned __attribute__((vector_size(2 * SSL_FAST_LANES), aligned(2)));

SSL_FAST_INLINE V as_float(VInt bits) { return reinterpret_cast<V>(bits); }
SSL_FAST_INLINE VInt as_int(V v) { return reinterpret_cast<VInt>(v); }

// GCC makes four instructions of these conversions where one or two do.
SSL_FAST_INLINE VInt widen(VShort v) {
#if SSL_FAST_X86_LANES == 16
  return (VInt)_mm512_cvtepu16_epi32((__m256i)v);
#elif SSL_FAST_X86_LANES == 8
  return (VInt)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, VInt);
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

SSL_FAST_INLINE V to_float(VShort bits, BFloat16) { return as_float(widen(bits) << 16); }

#if SSL_FAST_X86_LANES == 16
SSL_FAST_INLINE V to_float(VShort bits, Half) { return (V)_mm512_cvtph_ps((__m256i)bits); }
#elif SSL_FAST_X86_LANES == 8
SSL_FAST_INLINE V to_float(VShort bits, Half) { return (V)_mm256_cvtph_ps((__m128i)bits); }
#else
// A half's exponent and mantissa, shifted up, are a float too small by 2^112, subnormal ones included; but inf and NaN
// need the largest exponent.
SSL_FAST_INLINE V to_float(VShort bits, Half) {
  const VInt half = widen(bits), magnitude = (half & 0x7fff) << 13;
  const VInt finite = as_int(as_float(magnitude) * 0x1p112f);
  const VInt special = magnitude >= (0x7c00 << 13);
  return as_float(finite | (special & 0x7f800000) | (half & 0x8000) << 16);
}
#endif

template <class T>
SSL_FAST_INLINE V load_as_float(const T* p) {
  return to_float(*reinterpret_cast<const VShortUnaligned*>(p), T{});
}

// To nearest even.
#if defined(SSL_FAST_X86_BF16)
// The instruction takes numbers below 1.2e-38 for 0.
SSL_FAST_INLINE VShort rounded(V v, BFloat16) { return (VShort)_mm512_cvtneps_pbh((__m512)v); }
#else
SSL_FAST_INLINE VShort rounded(V v, BFloat16) {
  typedef uint32_t VUnsigned __attribute__((vector_size(4 * SSL_FAST_LANES)));
  const VUnsigned bits = reinterpret_cast<VUnsigned>(v);
  const VUnsigned nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return narrow((v == v) ? reinterpret_cast<VInt>(nearest) : VInt{} + 0x7fc0);
}
#endif

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

SSL_FAST_INLINE VInt first_lanes(int n) { return lane_index() < n; }

// The first n elements, and 0 in the lanes beyond. By masks, or by pieces of 4, 2 and 1: a vector that is loaded from an
// array filled one by one has to wait until that has reached the cache.
SSL_FAST_INLINE V load_some(const float* p, int n) {
#if SSL_FAST_X86_LANES == 16
  return (V)_mm512_maskz_loadu_ps((1u << n) - 1, p);
#elif SSL_FAST_X86_LANES == 8
  return (V)_mm256_maskload_ps(p, (__m256i)first_lanes(n));
#else
  float some[kLanes] = {};
  for (int i = 0; i < n; ++i) some[i] = p[i];
  return load(some);
#endif
}

template <class T>
SSL_FAST_INLINE V load_some(const T* p, int n) {
#if SSL_FAST_X86_LANES == 16
  return to_float((VShort)_mm256_maskz_loadu_epi16((1u << n) - 1, p), T{});
#elif SSL_FAST_X86_LANES == 8
  const auto fewer_than_4 = [](const T* from, int count) {
    uint32_t two = 0;
    uint16_t one = 0;
    if (count & 2) std::memcpy(&two, from, sizeof two);
    if (count & 1) std::memcpy(&one, from + (count & 2), sizeof one);
    return count & 2 ? two | uint64_t{one} << 32 : uint64_t{one};
  };
  uint64_t low, high = 0;
  if (n & 4) {
    std::memcpy(&low, p, sizeof low);
    high = fewer_than_4(p + 4, n - 4);
  } else {
    low = fewer_than_4(p, n);
  }
  return to_float((VShort)_mm_set_epi64x(static_cast<int64_t>(high), static_cast<int64_t>(low)), T{});
#else
  T some[kLanes] = {};
  for (int i = 0; i < n; ++i) some[i] = p[i];
  return load_as_float(some);
#endif
}

template <class T>
SSL_FAST_INLINE V load_first(const T* p, int n) {
  return n == kLanes ? load_as_float(p) : load_some(p, n);
}

SSL_FAST_INLINE void store_some(float* p, V v, int n) {
#if SSL_FAST_X86_LANES == 16
  _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v);
#elif SSL_FAST_X86_LANES == 8  // whose masked stores are slow on some
  __m128 part = _mm256_castps256_ps128((__m256)v);
  if (n & 4) {
    _mm_storeu_ps(p, part);
    part = _mm256_extractf128_ps((__m256)v, 1);
    p += 4;
  }
  if (n & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), part);
    part = _mm_movehl_ps(part, part);
    p += 2;
  }
  if (n & 1) _mm_store_ss(p, part);
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}

template <class T>
SSL_FAST_INLINE void store_some(T* p, V v, int n) {
  const VShort bits = rounded(v, T{});
#if SSL_FAST_X86_LANES == 16
  _mm256_mask_storeu_epi16(p, (1u << n) - 1, (__m256i)bits);
#elif SSL_FAST_X86_LANES == 8
  __m128i part = (__m128i)bits;
  if (n & 4) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), part);
    part = _mm_srli_si128(part, 8);
    p += 4;
  }
  const uint32_t two = static_cast<uint32_t>(_mm_cvtsi128_si32(part));
  const uint16_t one = static_cast<uint16_t>(n & 2 ? _mm_extract_epi16(part, 2) : two);
  if (n & 2) std::memcpy(p, &two, sizeof two);
  if (n & 1) std::memcpy(p + (n & 2), &one, sizeof one);
#else
  for (int i = 0; i < n; ++i) std::memcpy(p + i, reinterpret_cast<const uint16_t*>(&bits) + i, sizeof(T));
#endif
}

template <class T>
SSL_FAST_INLINE void store_first(T* p, V v, int n, bool stream = false) {
  n == kLanes ? store_as(p, v, stream) : store_some(p, v, n);
}

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
