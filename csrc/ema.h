// The table of tensors that one EMA launch updates, and what one thread does for one chunk of it.
//
// Plain C++ as well as CUDA: the tests run the same code on the host.
#pragma once

#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <limits>
#include <type_traits>

namespace ssl_fast::ema {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 4096;  // elements of one tensor that one block updates
constexpr int kTensors = 1024;    // the table is a kernel argument, and those may take 32,764 bytes

enum DType : uint8_t { kFloat, kBFloat16, kHalf, kDouble };

// keep * target + take * source with keep + take = 1, as torch.lerp does it: exact at 0 and 1, equal values stay put.
template <class Math>
struct Lerp {
  Math keep, take;

  C10_HOST_DEVICE Math operator()(Math target, Math source) const {
    return take < Math(0.5) ? target + take * (source - target) : source - keep * (source - target);
  }
};

struct Weights {
  Lerp<float> single;
  Lerp<double> twice;

  explicit Weights(double momentum)
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

// Chunks are numbered through all tensors; tensor i owns those from first[i] up to the next tensor's.
struct Table {
  void* target[kTensors];
  const void* source[kTensors];
  int64_t numel[kTensors];
  uint32_t first[kTensors];
  DType target_type[kTensors];
  DType source_type[kTensors];
  int count = 0;
  uint32_t chunks = 0;

  // False where the table is full: launch it, clear it, and add the pair again.
  bool add(void* to, DType to_type, const void* from, DType from_type, int64_t elements) {
    const int64_t more = (elements + kChunk - 1) / kChunk;
    if (count == kTensors || chunks + more > std::numeric_limits<int32_t>::max()) return false;
    if (more == 0) return true;
    target[count] = to;
    target_type[count] = to_type;
    source[count] = from;
    source_type[count] = from_type;
    numel[count] = elements;
    first[count++] = chunks;
    chunks += static_cast<uint32_t>(more);
    return true;
  }

  void clear() {
    count = 0;
    chunks = 0;
  }

  C10_HOST_DEVICE int tensor_of(uint32_t chunk) const {
    int low = 0, high = count - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (first[middle] <= chunk) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    return low;
  }
};
static_assert(sizeof(Table) + sizeof(Weights) <= 32764);

template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T x[N];
};

template <class T, int N>
C10_HOST_DEVICE bool aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Pack<T, N>) == 0;
}

template <class T, class S>
C10_HOST_DEVICE void update_chunk(T* target, const S* source, int64_t size, int thread, const Weights& weights) {
  using Math = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<S, double>, double, float>;
  const Lerp<Math> lerp = weights.lerp<Math>();
  const auto updated = [&](T to, S from) {
    return static_cast<T>(lerp(static_cast<Math>(to), static_cast<Math>(from)));
  };
  if constexpr (std::is_same_v<Math, float>) {
    // 16 bytes of the wider type at a time, the loads of a chunk ahead of its stores.
    constexpr int N = sizeof(T) == 2 && sizeof(S) == 2 ? 8 : 4, kPacks = kChunk / (N * kThreads);
    if (size == kChunk && aligned<T, N>(target) && aligned<S, N>(source)) {
      auto* t = reinterpret_cast<Pack<T, N>*>(target) + thread;
      const auto* s = reinterpret_cast<const Pack<S, N>*>(source) + thread;
      Pack<T, N> to[kPacks];
      Pack<S, N> from[kPacks];
      for (int i = 0; i < kPacks; ++i) {
        to[i] = t[i * kThreads];
        from[i] = s[i * kThreads];
      }
      for (int i = 0; i < kPacks; ++i) {
        for (int j = 0; j < N; ++j) to[i].x[j] = updated(to[i].x[j], from[i].x[j]);
        t[i * kThreads] = to[i];
      }
      return;
    }
  }
  // The end of a tensor, a view that starts off the 16-byte grid, or fp64.
  for (int64_t i = thread; i < size; i += kThreads) target[i] = updated(target[i], source[i]);
}

template <class T>
C10_HOST_DEVICE void update_from(const Table& table, int i, int64_t begin, int64_t size, int thread, const Weights& weights) {
  T* target = static_cast<T*>(table.target[i]) + begin;
  const auto update = [&](auto* source) { update_chunk(target, source + begin, size, thread, weights); };
  switch (table.source_type[i]) {
    case kFloat: return update(static_cast<const float*>(table.source[i]));
    case kBFloat16: return update(static_cast<const torch::headeronly::BFloat16*>(table.source[i]));
    case kHalf: return update(static_cast<const torch::headeronly::Half*>(table.source[i]));
    case kDouble: return update(static_cast<const double*>(table.source[i]));
  }
}

// One thread's share of one chunk.
C10_HOST_DEVICE inline void update(const Table& table, uint32_t chunk, int thread, const Weights& weights) {
  const int i = table.tensor_of(chunk);
  const int64_t begin = static_cast<int64_t>(chunk - table.first[i]) * kChunk;
  const int64_t rest = table.numel[i] - begin, size = rest < kChunk ? rest : kChunk;
  switch (table.target_type[i]) {
    case kFloat: return update_from<float>(table, i, begin, size, thread, weights);
    case kBFloat16: return update_from<torch::headeronly::BFloat16>(table, i, begin, size, thread, weights);
    case kHalf: return update_from<torch::headeronly::Half>(table, i, begin, size, thread, weights);
    case kDouble: return update_from<double>(table, i, begin, size, thread, weights);
  }
}

}  // namespace ssl_fast::ema
