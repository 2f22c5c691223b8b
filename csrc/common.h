// What the native CPU kernels share: the instruction set in use, aligned work buffers, and rows of any dtype as fp32.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include "error_check.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

// Vectors wider than the machine's own change how functions pass them; all of ours that do are inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
#define SSL_FAST_INLINE inline __attribute__((always_inline))
#define SSL_FAST_LAMBDA __attribute__((always_inline))
// On loops over the accumulators of a register tile: unless those loops vanish early, the tile lives in memory.
#define SSL_FAST_UNROLL _Pragma("GCC unroll 16")

// Functions between the two may use the instruction sets named, whatever the flags of the translation unit.
#define SSL_FAST_PRAGMA(tokens) _Pragma(#tokens)
#if defined(__clang__)
#define SSL_FAST_TARGET_BEGIN(names) \
  SSL_FAST_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define SSL_FAST_TARGET_END _Pragma("clang attribute pop")
#else
#define SSL_FAST_TARGET_BEGIN(names) _Pragma("GCC push_options") SSL_FAST_PRAGMA(GCC target(names))
#define SSL_FAST_TARGET_END _Pragma("GCC pop_options")
#endif

namespace ssl_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t multiple) { return ceil_div(a, multiple) * multiple; }

// In rising order of speed, so that SSL_FAST_CPU_CAPABILITY can cap what was detected. The emulated ones run the code of
// AVX512-BF16 and of AMX with these instructions in software: for tests, on any machine, and chosen by name only.
enum class Capability { kPortable, kAVX2, kAVX512, kAVX512BF16, kAMX, kEmulatedAVX512BF16, kEmulatedAMX };

#if defined(__x86_64__)
// Linux hands out the 8 KiB of AMX tile state to a process that asks for it.
inline bool request_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

inline Capability detect_capability() {
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))) return Capability::kPortable;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")))
    return Capability::kAVX2;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kBF16 = 1u << 22, kTile = 1u << 24;
  const bool amx = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kBF16) && (edx & kTile);
  if (!__builtin_cpu_supports("avx512bf16")) return Capability::kAVX512;
  return amx && request_amx() ? Capability::kAMX : Capability::kAVX512BF16;
}
#else
inline Capability detect_capability() { return Capability::kPortable; }
#endif

inline Capability detected_capability() {
  static const Capability capability = detect_capability();  // asking costs 10 us in a virtual machine
  return capability;
}

inline Capability choose_capability() {
  const Capability detected = detected_capability();
  const char* name = std::getenv("SSL_FAST_CPU_CAPABILITY");
  if (name == nullptr || *name == '\0') return detected;
  if (std::strcmp(name, "avx512_bf16_emulated") == 0) return Capability::kEmulatedAVX512BF16;
  if (std::strcmp(name, "amx_emulated") == 0) return Capability::kEmulatedAMX;
  const char* names[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
  for (int i = 0; i < 5; ++i)
    if (std::strcmp(name, names[i]) == 0) return std::min(static_cast<Capability>(i), detected);
  STD_TORCH_CHECK(false, "SSL_FAST_CPU_CAPABILITY: got '", name,
                  "', allowed: portable, avx2, avx512, avx512_bf16, amx, avx512_bf16_emulated, amx_emulated, or unset for "
                  "what this machine has");
  return detected;
}

// The instruction set of every kernel in this process; the environment is read once.
inline Capability cpu_capability() {
  static const Capability capability = choose_capability();
  return capability;
}

// Uninitialised memory for `count` elements, on cache-line boundaries. A large buffer is mapped on huge pages, which
// halves the cost of its first touch and keeps strided walks over it out of the page tables. What is mapped goes back to
// the system when it is freed, whatever the allocator's thresholds; `map_from` bytes are where that begins.
template <class T>
class Buffer {
 public:
  static constexpr size_t kHuge = size_t{4} << 20;

  explicit Buffer(int64_t count, size_t map_from = kHuge)
      : bytes_(static_cast<size_t>(count) * sizeof(T)), mapped_(bytes_ >= map_from) {
#if defined(__linux__)
    if (mapped_) {
      void* const memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      if (bytes_ >= kHuge) madvise(memory, bytes_, MADV_HUGEPAGE);
      data_ = static_cast<T*>(memory);
      return;
    }
#endif
    constexpr size_t kCacheLine = 64;
    data_ = static_cast<T*>(std::aligned_alloc(kCacheLine, round_up(bytes_ + 1, kCacheLine)));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() {
#if defined(__linux__)
    if (mapped_) {
      munmap(data_, bytes_);
      return;
    }
#endif
    std::free(data_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  size_t bytes_;
  bool mapped_;
  T* data_;
};

// Work space of the calling thread, one at a time. A small one is kept from call to call: allocating it afresh costs a
// tiny op as much as its arithmetic. A large one is given back.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (bytes > kKept) {
      own_ = std::make_unique<Buffer<char>>(bytes);
      return;
    }
    Kept& kept = kept_();
    if (bytes > kept.bytes || kept.buffer == nullptr) {
      kept.bytes = 0;  // should the allocation fail, nothing is kept
      kept.buffer.reset();
      kept.buffer = std::make_unique<Buffer<char>>(bytes);
      kept.bytes = bytes;
    }
  }
  void* get() const { return own_ ? own_->get() : kept_().buffer->get(); }

 private:
  static constexpr int64_t kKept = int64_t{8} << 20;
  struct Kept {
    std::unique_ptr<Buffer<char>> buffer;
    int64_t bytes = 0;
  };
  static Kept& kept_() {
    thread_local Kept kept;
    return kept;
  }

  std::unique_ptr<Buffer<char>> own_;
};

// CPU tensors without the dispatcher, which boxes its arguments and for the outputs of a tiny op takes as long as all the
// rest.
inline Tensor empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Contiguous.
inline Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype = aoti_torch_dtype_float32()) {
  constexpr int64_t kMost = 3;
  int64_t strides[kMost] = {1, 1, 1};
  const int64_t dims = static_cast<int64_t>(sizes.size());
  for (int64_t d = dims - 2; d >= 0; --d) strides[d] = strides[d + 1] * std::max<int64_t>(sizes.begin()[d + 1], 1);
  return empty_strided(dims, sizes.begin(), strides, dtype);
}

// A tensor that nothing was written to yet. A large one is put on huge pages, which halves the cost of its first touch.
inline Tensor on_huge_pages(Tensor out) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  const int64_t bytes = out.numel() * static_cast<int64_t>(out.element_size());
  if (bytes >= static_cast<int64_t>(Buffer<char>::kHuge)) {
    const uintptr_t begin = round_up(reinterpret_cast<uintptr_t>(out.data_ptr()), kPage);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(out.data_ptr()) + bytes) / kPage * kPage;
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
  return out;
}

// Of a dense tensor's sizes, strides and dtype.
inline Tensor output_like(const Tensor& x) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  return on_huge_pages(empty_strided(x.dim(), x.sizes().data(), x.strides().data(), dtype));
}

// The first exception among the threads of a parallel loop, for the others to see and for the caller to get.
class Failure {
 public:
  template <class F>
  void guard(const F& f) {
    try {
      f();
    } catch (...) {
      if (!failed_.exchange(true)) exception_ = std::current_exception();
    }
  }
  explicit operator bool() const { return failed_.load(std::memory_order_relaxed); }
  void rethrow() const {
    if (exception_) std::rethrow_exception(exception_);
  }

 private:
  std::atomic<bool> failed_{false};
  std::exception_ptr exception_;
};

// Calls f with a value of the C++ type of a floating-point dtype.
template <class F>
void dispatch_float(ScalarType dtype, const char* op, const F& f) {
  switch (dtype) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default:
      STD_TORCH_CHECK(false, op, " (native CPU): got dtype ", torch::headeronly::toString(dtype),
                      ", allowed: float32, bfloat16, float16; other dtypes run backend 'reference'");
  }
}

}  // namespace ssl_fast
