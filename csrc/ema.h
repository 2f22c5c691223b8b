// What one call of the EMA updates, and what one thread of a GPU does for one chunk of it.
//
// Plain C++ as well as CUDA: the tests run the same code on the host.
#pragma once

#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace ssl_fast::ema {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int kThreads = 256;
constexpr int64_t kChunk = 4096;  // elements of one tensor that one block updates
constexpr int kTensors = 800;     // the table is a kernel argument, and those may take 32,764 bytes

enum DType : uint8_t { kFloat, kBFloat16, kHalf, kDouble, kByte };  // kByte: copied as it lies, numel counts bytes

// keep * target + take * source with keep + take = 1, as torch.lerp does it: exact at 1, equal values stay put. At 0 the
// target is not looked at: a copy.
template <class Math>
struct Lerp {
  Math keep, take;

  C10_HOST_DEVICE Math operator()(Math target, Math source) const {
    if (keep == Math(0)) return source;
    return take < Math(0.5) ? target + take * (source - target) : source - keep * (source - target);
  }
};

struct Weights {
  Lerp<float> single;
  Lerp<double> twice;

  C10_HOST_DEVICE explicit Weights(double momentum)
      : single{static_cast<float>(momentum), static_cast<float>(1 - momentum)}, twice{momentum, 1 - momentum} {}

  template <class Math>
  C10_HOST_DEVICE Lerp<Math> lerp() const {
    if constexpr (std::is_same_v<Math, double>) {
      return twice;
    } else {
      return single;
    }
  }
};

// A momentum by value, or where it lies on the device: a kernel reads it, so that no value need leave the device.
struct Momentum {
  double value;
  const void* at;
  bool single;

  C10_HOST_DEVICE double get() const {
    if (at == nullptr) return value;
    return single ? static_cast<double>(*static_cast<const float*>(at)) : *static_cast<const double*>(at);
  }
};

// ---- stochastic rounding: up with the probability of the part that is cut off, so that the mean is kept

// A bijection of 32 bits that looks random: lowbias32 of C. Wellons' hash prospector (public domain).
C10_HOST_DEVICE inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// 16 random bits for each element of one tensor of one call: neighbours share a draw of 32, which takes longer than all
// else in an update. Every backend draws the same ones.
struct Noise {
  static constexpr uint32_t kFirst = 0x9e3779b9;  // mix(0) is 0: the first update of all would not be random
  uint32_t key;

  C10_HOST_DEVICE Noise(int64_t seed, int64_t tensor)
      : key(mix(mix(mix(static_cast<uint32_t>(seed >> 32)) + static_cast<uint32_t>(seed)) +
                static_cast<uint32_t>(tensor) + kFirst)) {}
  // Of element 2 draw + i, where compilers see that two of them share a draw.
  C10_HOST_DEVICE uint32_t operator()(uint32_t draw, int i) const {
    return mix((draw + i / 2) ^ key) >> i % 2 * 16 & 0xffff;
  }
  C10_HOST_DEVICE uint32_t operator()(int64_t i) const { return (*this)(static_cast<uint32_t>(i >> 1), i & 1); }
};

template <class To, class From>
C10_HOST_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// x rounded to a value of T, still in fp32: the noise is added to the bits that T lacks, and they are cut off.
template <class T>
C10_HOST_DEVICE float stochastic(float x, uint32_t noise) {
  const uint32_t bits = bits_as<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  float rounded;
  if constexpr (std::is_same_v<T, BFloat16>) {
    rounded = bits_as<float>((bits + noise) & 0xffff0000u);
  } else {
    const float normal = bits_as<float>((bits + (noise >> 3)) & 0xffffe000u);
    // Below 2^-14 fp16 is a grid of 2^-24, however small x.
    const int steps = static_cast<int>((magnitude < 0x38800000u ? bits_as<float>(magnitude) : 0.0f) * 0x1p24f +
                                       static_cast<float>(noise) * 0x1p-16f);
    const float tiny = bits_as<float>(bits_as<uint32_t>(static_cast<float>(steps) * 0x1p-24f) | (bits & 0x80000000u));
    rounded = magnitude < 0x38800000u ? tiny : normal;
  }
  return magnitude < 0x7f800000u ? rounded : x;
}

// ---- the table

struct Pair {
  void* target;
  const void* source;
  uint16_t* copy;  // of an fp32 target, rounded to copy_type; or null
  int64_t numel;
  uint32_t first;  // the number of its first chunk
  DType target_type, source_type, copy_type;
  bool averaged;  // else copied
};

// Chunks are numbered through all pairs; pair i owns those from its first up to the next pair's.
struct Table {
  Pair pairs[kTensors];
  int count = 0;
  uint32_t chunks = 0;
  int64_t before = 0;  // pairs of this call that other launches update

  // False where the table is full: launch it, call next(), and add the pair again.
  bool add(Pair pair) {
    const int64_t more = (pair.numel + kChunk - 1) / kChunk;
    if (count == kTensors || chunks + more > std::numeric_limits<int32_t>::max()) return false;
    pair.first = chunks;
    pairs[count++] = pair;
    chunks += static_cast<uint32_t>(more);
    return true;
  }

  void next() {
    before += count;
    count = 0;
    chunks = 0;
  }

  // Of the pairs that begin with a chunk, which empty ones do as well, the last.
  C10_HOST_DEVICE int pair_of(uint32_t chunk) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (pairs[middle].first <= chunk) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};
static_assert(sizeof(Table) + sizeof(Momentum) + sizeof(void*) <= 32764);

// ---- one thread's share of one chunk

template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T x[N];
};

template <class T, int N>
C10_HOST_DEVICE bool aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Pack<T, N>) == 0;
}

// Elements begin .. begin + size of a pair, and how their new values are stored.
template <class T, class S, bool kStochastic>
struct Chunk {
  using Math = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<S, double>, double, float>;

  T* target;
  const S* source;
  uint16_t* copy;
  bool half_copy;
  uint32_t draw;  // of the first element and the second
  int64_t size;
  Lerp<Math> lerp;
  Noise noise;

  C10_HOST_DEVICE Chunk(const Pair& pair, int64_t first, int64_t elements, const Weights& weights, const Noise& random)
      : target(static_cast<T*>(pair.target) + first),
        source(static_cast<const S*>(pair.source) + first),
        copy(pair.copy == nullptr ? nullptr : pair.copy + first),
        half_copy(pair.copy_type == kHalf),
        draw(static_cast<uint32_t>(first >> 1)),
        size(elements),
        lerp(weights.lerp<Math>()),
        noise(random) {}

  // Of element 2 pair + i of the chunk.
  C10_HOST_DEVICE T updated(T to, S from, uint32_t pair, int i) const {
    if constexpr (std::is_same_v<T, uint8_t>) {
      return from;
    } else {
      const Math value = lerp(static_cast<Math>(to), static_cast<Math>(from));
      if constexpr (kStochastic) return static_cast<T>(stochastic<T>(static_cast<float>(value), noise(draw + pair, i)));
      return static_cast<T>(value);
    }
  }

  C10_HOST_DEVICE uint16_t copied(float value) const { return half_copy ? Half(value).x : BFloat16(value).x; }

  C10_HOST_DEVICE void update(int thread) const {
    constexpr bool kCopies = std::is_same_v<T, float>;
    if constexpr (!std::is_same_v<Math, double>) {
      // 16 bytes of the wider type at a time, the loads of a chunk ahead of its stores.
      constexpr int kWidest = sizeof(T) > sizeof(S) ? sizeof(T) : sizeof(S);
      constexpr int N = 16 / kWidest, kPacks = kChunk / (N * kThreads);
      const bool whole = size == kChunk && aligned<T, N>(target) && aligned<S, N>(source) && aligned<uint16_t, N>(copy);
      if (whole) {
        auto* t = reinterpret_cast<Pack<T, N>*>(target) + thread;
        const auto* s = reinterpret_cast<const Pack<S, N>*>(source) + thread;
        Pack<T, N> to[kPacks];
        Pack<S, N> from[kPacks];
        for (int i = 0; i < kPacks; ++i) {
          to[i] = t[i * kThreads];
          from[i] = s[i * kThreads];
        }
        for (int i = 0; i < kPacks; ++i) {
          for (int j = 0; j < N; ++j)
            to[i].x[j] = updated(to[i].x[j], from[i].x[j], (thread + i * kThreads) * N / 2, j);
          t[i * kThreads] = to[i];
          if constexpr (kCopies) {
            if (copy == nullptr) continue;
            Pack<uint16_t, N> narrow;
            for (int j = 0; j < N; ++j) narrow.x[j] = copied(to[i].x[j]);
            (reinterpret_cast<Pack<uint16_t, N>*>(copy) + thread)[i * kThreads] = narrow;
          }
        }
        return;
      }
    }
    // The end of a tensor, a view that starts off the 16-byte grid, or fp64.
    for (int64_t i = thread; i < size; i += kThreads) {
      target[i] = updated(target[i], source[i], static_cast<uint32_t>(i >> 1), i & 1);
      if constexpr (kCopies) {
        if (copy != nullptr) copy[i] = copied(target[i]);
      }
    }
  }
};

template <class T, bool kStochastic = false>
C10_HOST_DEVICE void update_from(const Pair& pair, int64_t begin, int64_t size, int thread, const Weights& weights,
                                 const Noise& noise) {
  switch (pair.source_type) {
    case kFloat: return Chunk<T, float, kStochastic>(pair, begin, size, weights, noise).update(thread);
    case kBFloat16: return Chunk<T, BFloat16, kStochastic>(pair, begin, size, weights, noise).update(thread);
    case kHalf: return Chunk<T, Half, kStochastic>(pair, begin, size, weights, noise).update(thread);
    case kDouble: return Chunk<T, double, kStochastic>(pair, begin, size, weights, noise).update(thread);
    case kByte: return;
  }
}

// seed: null to round to nearest.
C10_HOST_DEVICE inline void update(const Table& table, uint32_t chunk, int thread, const Momentum& momentum,
                                   const int64_t* seed) {
  const int i = table.pair_of(chunk);
  const Pair& pair = table.pairs[i];
  const int64_t begin = static_cast<int64_t>(chunk - pair.first) * kChunk;
  const int64_t rest = pair.numel - begin, size = rest < kChunk ? rest : kChunk;
  const Weights weights(pair.averaged ? momentum.get() : 0);
  const bool random = seed != nullptr && pair.averaged;
  const Noise noise(random ? *seed : 0, table.before + i);
  switch (pair.target_type) {
    case kFloat: return update_from<float>(pair, begin, size, thread, weights, noise);
    case kBFloat16:
      return random ? update_from<BFloat16, true>(pair, begin, size, thread, weights, noise)
                    : update_from<BFloat16>(pair, begin, size, thread, weights, noise);
    case kHalf:
      return random ? update_from<Half, true>(pair, begin, size, thread, weights, noise)
                    : update_from<Half>(pair, begin, size, thread, weights, noise);
    case kDouble: return update_from<double>(pair, begin, size, thread, weights, noise);
    case kByte: return Chunk<uint8_t, uint8_t, false>(pair, begin, size, weights, noise).update(thread);
  }
}

}  // namespace ssl_fast::ema
