// The EMA of one chunk on a CPU. No include guard: included once per instruction set, inside a namespace of its own and
// under that set's target pragma. SSL_FAST_AVX2: it has AVX2 and the conversions of fp16.

constexpr int kLanes = 8;
typedef float V __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef float VUnaligned __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef uint32_t BitsUnaligned __attribute__((vector_size(4 * kLanes), aligned(2), may_alias));

SSL_FAST_INLINE V as_floats(Bits bits) { return reinterpret_cast<V>(bits); }
SSL_FAST_INLINE Bits as_bits(V v) { return reinterpret_cast<Bits>(v); }

SSL_FAST_INLINE V load(const float* p) { return *reinterpret_cast<const VUnaligned*>(p); }
SSL_FAST_INLINE void store(float* p, V v) { *reinterpret_cast<VUnaligned*>(p) = v; }

#if defined(SSL_FAST_AVX2)
SSL_FAST_INLINE Bits widen(const void* p) {
  return reinterpret_cast<Bits>(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
}
// 16 numbers of 16 bits, in the order in which they lie, as two vectors.
SSL_FAST_INLINE void widen_halves(Bits halves, Bits widened[2]) {
  const __m256i v = reinterpret_cast<__m256i>(halves);
  widened[0] = reinterpret_cast<Bits>(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(v)));
  widened[1] = reinterpret_cast<Bits>(_mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1)));
}
SSL_FAST_INLINE void store_low_halves(void* p, Bits bits) {
  const __m256i v = reinterpret_cast<__m256i>(bits);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  _mm_storeu_si128(static_cast<__m128i*>(p), packed);
}
SSL_FAST_INLINE V load(const Half* p) {
  return reinterpret_cast<V>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
SSL_FAST_INLINE void store(Half* p, V v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), 0));
}
#else
typedef uint16_t Narrow __attribute__((vector_size(2 * kLanes)));
typedef uint16_t NarrowUnaligned __attribute__((vector_size(2 * kLanes), aligned(2)));
SSL_FAST_INLINE Bits widen(const void* p) {
  const Narrow bits = *static_cast<const NarrowUnaligned*>(p);
  return __builtin_convertvector(bits, Bits);
}
SSL_FAST_INLINE void widen_halves(Bits halves, Bits widened[2]) {
  uint32_t bits[kLanes];
  std::memcpy(bits, &halves, sizeof(halves));
  uint32_t each[2 * kLanes];
  for (int i = 0; i < 2 * kLanes; ++i) each[i] = bits[i / 2] >> i % 2 * 16 & 0xffff;
  std::memcpy(widened, each, sizeof(each));
}
SSL_FAST_INLINE void store_low_halves(void* p, Bits bits) {
  *static_cast<NarrowUnaligned*>(p) = __builtin_convertvector(bits, Narrow);
}
SSL_FAST_INLINE V load(const Half* p) {
  float values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = p[i];
  return load(values);
}
SSL_FAST_INLINE void store(Half* p, V v) {
  float values[kLanes];
  store(values, v);
  for (int i = 0; i < kLanes; ++i) p[i] = values[i];
}
#endif

SSL_FAST_INLINE V load(const BFloat16* p) { return as_floats(widen(p) << 16); }
// bf16 in the upper halves; what is added decides which way the lower ones round.
SSL_FAST_INLINE Bits rounded(V v, Bits added) { return v == v ? as_bits(v) + added : Bits{} + 0x7fc00000; }
SSL_FAST_INLINE Bits to_nearest_even(V v) { return ((as_bits(v) >> 16) & 1) + 0x7fff; }
SSL_FAST_INLINE void store(BFloat16* p, V v) { store_low_halves(p, rounded(v, to_nearest_even(v)) >> 16); }

// ---- the same as Noise, stochastic() and Lerp of ema.h, for vectors

SSL_FAST_INLINE Bits mix_lanes(Bits x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Of the 16 elements from there on, 16 bits each, in their order.
SSL_FAST_INLINE Bits draw(const Noise& noise, int64_t element) {
  const Bits lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return mix_lanes((lane + static_cast<uint32_t>(element / 2)) ^ noise.key);
}

SSL_FAST_INLINE void store_stochastically(BFloat16* p, V x, Bits noise) {
  store_low_halves(p, rounded(x, noise) >> 16);
}

SSL_FAST_INLINE void store_stochastically(Half* p, V x, Bits noise) {
  const Bits bits = as_bits(x), zero = {};
  const V size = as_floats(bits & 0x7fffffff);
  const auto subnormal = size < 0x1p-14f;  // where fp16 is a grid of 2^-24
  const V steps = as_floats(subnormal ? as_bits(size) : zero) * 0x1p24f +
                  __builtin_convertvector(reinterpret_cast<Ints>(noise), V) * 0x1p-16f;
  const V tiny = __builtin_convertvector(__builtin_convertvector(steps, Ints), V) * 0x1p-24f;
  const Bits rounded = subnormal ? as_bits(tiny) | (bits & 0x80000000) : (bits + (noise >> 3)) & 0xffffe000;
  store(p, as_floats(x - x == 0 ? rounded : bits));
}

SSL_FAST_INLINE V average(V target, V source, const Lerp<float>& lerp) {
  if (lerp.keep == 0) return source;
  return lerp.take < 0.5f ? target + lerp.take * (source - target) : source - lerp.keep * (source - target);
}

// ---- a chunk

constexpr int kStep = 2 * kLanes;

// bf16 from bf16: even and odd elements apart, as they share 32 bits, take half the shifts and no packing.
template <bool kRandom>
SSL_FAST_INLINE void update_bf16_step(BFloat16* target, const BFloat16* source, int64_t element,
                                      const Lerp<float>& lerp, const Noise& noise) {
  BitsUnaligned* const targets = reinterpret_cast<BitsUnaligned*>(target);  // with auto, g++ takes it for aligned
  const Bits t = *targets, s = *reinterpret_cast<const BitsUnaligned*>(source), upper = Bits{} + 0xffff0000;
  const V even = average(as_floats(t << 16), as_floats(s << 16), lerp);
  const V odd = average(as_floats(t & upper), as_floats(s & upper), lerp);
  Bits even_added, odd_added;
  if constexpr (kRandom) {
    const Bits drawn = draw(noise, element);
    even_added = drawn & 0xffff;
    odd_added = drawn >> 16;
  } else {
    even_added = to_nearest_even(even);
    odd_added = to_nearest_even(odd);
  }
  *targets = (rounded(even, even_added) >> 16) | (rounded(odd, odd_added) & upper);
}

// Sixteen elements of what a Pair describes. Copy: the type of its copy, void for none.
template <class T, class S, class Copy, bool kRandom>
SSL_FAST_INLINE void update_step(T* target, const S* source, uint16_t* copy, int64_t element, const Lerp<float>& lerp,
                                 const Noise& noise) {
  if constexpr (std::is_same_v<T, BFloat16> && std::is_same_v<S, BFloat16>)
    return update_bf16_step<kRandom>(target, source, element, lerp, noise);
  Bits drawn[2];
  if constexpr (kRandom) widen_halves(draw(noise, element), drawn);
  for (int half = 0; half < 2; ++half) {
    const int at = half * kLanes;
    const V x = average(load(target + at), load(source + at), lerp);
    if constexpr (kRandom) {
      store_stochastically(target + at, x, drawn[half]);
    } else {
      store(target + at, x);
    }
    if constexpr (!std::is_void_v<Copy>) store(reinterpret_cast<Copy*>(copy) + at, x);
  }
}

template <class T, class S, class Copy, bool kRandom>
void update_part(const Pair& pair, int64_t begin, int64_t end, Lerp<float> lerp, Noise noise) {
  T* const target = static_cast<T*>(pair.target);
  const S* const source = static_cast<const S*>(pair.source);
  uint16_t* const copy = pair.copy;
  constexpr bool kCopies = !std::is_void_v<Copy>;
  int64_t i = begin;
  for (; i + kStep <= end; i += kStep)
    update_step<T, S, Copy, kRandom>(target + i, source + i, kCopies ? copy + i : nullptr, i, lerp, noise);
  if (i == end) return;
  const int64_t rest = end - i;
  T last_target[kStep] = {};
  S last_source[kStep] = {};
  uint16_t last_copy[kStep];
  std::copy_n(target + i, rest, last_target);
  std::copy_n(source + i, rest, last_source);
  update_step<T, S, Copy, kRandom>(last_target, last_source, last_copy, i, lerp, noise);
  std::copy_n(last_target, rest, target + i);
  if constexpr (kCopies) std::copy_n(last_copy, rest, copy + i);
}

template <class T, class S>
void update_doubles(const Pair& pair, int64_t begin, int64_t end, const Lerp<double>& lerp, const Noise* noise) {
  T* const target = static_cast<T*>(pair.target);
  const S* const source = static_cast<const S*>(pair.source);
  for (int64_t i = begin; i < end; ++i) {
    const double x = lerp(static_cast<double>(target[i]), static_cast<double>(source[i]));
    if constexpr (sizeof(T) == 2) {
      const float single = static_cast<float>(x);
      target[i] = noise ? stochastic<T>(single, (*noise)(i)) : single;
    } else {
      target[i] = static_cast<T>(x);
      if (pair.copy == nullptr) continue;
      const float single = static_cast<float>(x);
      pair.copy[i] = pair.copy_type == kHalf ? Half(single).x : BFloat16(single).x;
    }
  }
}

template <class T, class S>
void update_as(const Pair& pair, int64_t begin, int64_t end, const Weights& weights, const Noise* noise) {
  if constexpr (std::is_same_v<T, double> || std::is_same_v<S, double>) {
    update_doubles<T, S>(pair, begin, end, weights.twice, noise);
  } else {
    const auto part = [&](auto copy, auto random) {
      update_part<T, S, typename decltype(copy)::type, decltype(random)::value>(pair, begin, end, weights.single,
                                                                               noise ? *noise : Noise(0, 0));
    };
    using std::type_identity;
    if constexpr (sizeof(T) == 2) {
      noise ? part(type_identity<void>{}, std::true_type{}) : part(type_identity<void>{}, std::false_type{});
    } else if (pair.copy == nullptr) {
      part(type_identity<void>{}, std::false_type{});
    } else {
      pair.copy_type == kHalf ? part(type_identity<Half>{}, std::false_type{})
                              : part(type_identity<BFloat16>{}, std::false_type{});
    }
  }
}

template <class F>
SSL_FAST_INLINE void with_type(DType type, const F& f) {
  switch (type) {
    case kFloat: return f(float{});
    case kBFloat16: return f(BFloat16{});
    case kHalf: return f(Half{});
    default: return f(double{});
  }
}

// Elements begin .. end of a pair. noise: null to round to nearest.
void update_chunk(const Pair& pair, int64_t begin, int64_t end, const Weights& weights, const Noise* noise) {
  if (pair.target_type == kByte) {
    std::memcpy(static_cast<char*>(pair.target) + begin, static_cast<const char*>(pair.source) + begin, end - begin);
    return;
  }
  with_type(pair.target_type, [&](auto target) {
    with_type(pair.source_type, [&](auto source) {
      update_as<decltype(target), decltype(source)>(pair, begin, end, weights, noise);
    });
  });
}
