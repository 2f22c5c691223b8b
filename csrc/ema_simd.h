// The EMA of one chunk on a CPU, in plain loops that the compiler turns into vectors. No include guard: included once
// per instruction set, inside a namespace of its own and under that set's target pragma. SSL_FAST_F16C: has the
// conversions of fp16 in hardware.
//
// A part of the chunk is widened into a buffer that stays in the first-level cache, unless it is fp32 (fp64) already,
// updated there, and narrowed: one loop a dtype, not one for each pair of dtypes, and memory is what takes the time.

constexpr int64_t kPart = 1024;
static_assert(kChunk % kPart == 0);

template <class Math, class T>
void widen(const T* from, int64_t n, Math* to) {
  int64_t i = 0;
#if defined(SSL_FAST_F16C)
  if constexpr (std::is_same_v<T, Half> && std::is_same_v<Math, float>) {
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
#endif
  for (; i < n; ++i) to[i] = static_cast<Math>(from[i]);
}

template <class Math, class T>
void narrow(const Math* from, int64_t n, T* to) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, BFloat16>) {
    for (; i < n; ++i) {  // to nearest even, without the branch of BFloat16's own conversion
      const float x = static_cast<float>(from[i]);
      const uint32_t bits = bits_as<uint32_t>(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
      to[i].x = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
  }
#if defined(SSL_FAST_F16C)
  if constexpr (std::is_same_v<T, Half> && std::is_same_v<Math, float>) {
    for (; i + 8 <= n; i += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
  }
#endif
  for (; i < n; ++i) to[i] = static_cast<T>(from[i]);
}

template <class T, class Math>
void add_noise(Math* values, int64_t n, int64_t first, const Noise& noise) {
  for (int64_t i = 0; i < n; ++i)
    values[i] = static_cast<Math>(stochastic<T>(static_cast<float>(values[i]), noise(first + i)));
}

// Elements first .. first + n of a tensor as Math: where they lie, or in the room given.
template <class Math>
Math* read(void* data, DType type, int64_t first, int64_t n, Math* room) {
  const auto as = [&](auto* from) {
    if constexpr (std::is_same_v<decltype(from), Math*>) {
      return from + first;
    } else {
      widen(from + first, n, room);
      return room;
    }
  };
  switch (type) {
    case kFloat: return as(static_cast<float*>(data));
    case kBFloat16: return as(static_cast<BFloat16*>(data));
    case kHalf: return as(static_cast<Half*>(data));
    default: return as(static_cast<double*>(data));
  }
}

template <class Math>
void write(const Math* values, void* data, DType type, int64_t first, int64_t n) {
  switch (type) {
    case kFloat: return narrow(values, n, static_cast<float*>(data) + first);
    case kBFloat16: return narrow(values, n, static_cast<BFloat16*>(data) + first);
    case kHalf: return narrow(values, n, static_cast<Half*>(data) + first);
    default: return narrow(values, n, static_cast<double*>(data) + first);
  }
}

template <class Math>
void move(Math* target, const Math* source, int64_t n, const Lerp<Math>& lerp) {
  if (lerp.keep == 0) {
    std::memcpy(target, source, n * sizeof(Math));
  } else if (lerp.take < Math(0.5)) {
    for (int64_t i = 0; i < n; ++i) target[i] = target[i] + lerp.take * (source[i] - target[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) target[i] = source[i] - lerp.keep * (source[i] - target[i]);
  }
}

template <class Math>
void update_as(const Pair& pair, int64_t begin, int64_t end, const Weights& weights, const Noise* noise) {
  alignas(64) Math target_room[kPart], source_room[kPart];
  for (int64_t first = begin; first < end; first += kPart) {
    const int64_t n = std::min(end - first, kPart);
    Math* const target = read(pair.target, pair.target_type, first, n, target_room);
    move(target, read(const_cast<void*>(pair.source), pair.source_type, first, n, source_room), n, weights.lerp<Math>());
    if (noise && pair.target_type == kBFloat16) add_noise<BFloat16>(target, n, first, *noise);
    if (noise && pair.target_type == kHalf) add_noise<Half>(target, n, first, *noise);
    if (target == target_room) write(target, pair.target, pair.target_type, first, n);
    if (pair.copy != nullptr) write(target, pair.copy, pair.copy_type, first, n);
  }
}

// Elements begin .. end of a pair. noise: null to round to nearest.
void update_chunk(const Pair& pair, int64_t begin, int64_t end, const Weights& weights, const Noise* noise) {
  if (pair.target_type == kByte) {
    std::memcpy(static_cast<char*>(pair.target) + begin, static_cast<const char*>(pair.source) + begin, end - begin);
  } else if (pair.target_type == kDouble || pair.source_type == kDouble) {
    update_as<double>(pair, begin, end, weights, noise);
  } else {
    update_as<float>(pair, begin, end, weights, noise);
  }
}
