// Runs CUDA kernels on the host, for tests: one block at a time, or all of a cooperative launch together, each of their
// threads a fiber that gives way where it has to wait for others. It stands in for csrc/mma.h, its instructions as the PTX manual defines them.
#pragma once

#include <torch/headeronly/macros/Macros.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

namespace on_host {

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  std::vector<Copy> copies;  // asynchronous, and done as late as they may be
  bool done = false;
};

// Who has come to a barrier, and what the threads have brought to it.
struct Barrier {
  int arrived = 0;
  uint64_t round = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<char> shared;
  Barrier barrier, warp_barriers[32];
  uint64_t brought[1024];
};

inline Block* block;
inline ucontext_t scheduler;
inline std::function<void()> kernel;
inline Barrier grid_barrier;
inline int grid_threads;
inline uint64_t progress;

inline void yield() {
  const unsigned self = threadIdx.x;
  swapcontext(&block->fibers[self].context, &scheduler);
  threadIdx.x = self;
}

inline void wait(Barrier& barrier, int count) {
  const uint64_t round = barrier.round;
  ++progress;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.round;
    return;
  }
  while (barrier.round == round) yield();
}

inline void sync_warp() { wait(block->warp_barriers[threadIdx.x / 32], 32); }

// Each lane of a warp brings a value; f then sees all 32.
template <class T, class F>
auto in_warp(T value, const F& f) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t* const brought = block->brought;
  std::memcpy(&brought[threadIdx.x], &value, sizeof(T));
  sync_warp();
  const auto of = [brought, base = threadIdx.x / 32 * 32](int lane) {
    T other;
    std::memcpy(&other, &brought[base + lane], sizeof(T));
    return other;
  };
  const auto result = f(of);
  sync_warp();
  return result;
}

inline void enter() {
  kernel();
  block->fibers[threadIdx.x].done = true;
  for (;;) yield();
}

// Runs the blocks from `first` to before `last` together. False where threads wait for each other for ever.
inline bool run(unsigned first, unsigned last, int threads, int shared_bytes) {
  std::vector<Block> blocks(last - first);
  grid_barrier = {};
  grid_threads = static_cast<int>(blocks.size()) * threads;
  for (Block& b : blocks) {
    b.shared.assign(shared_bytes + 1024, '\xff');
    b.fibers = std::vector<Fiber>(threads);
    for (Fiber& fiber : b.fibers) {
      constexpr size_t kStack = 128 << 10;
      fiber.stack.reset(new char[kStack]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      makecontext(&fiber.context, enter, 0);
    }
  }
  // A warp runs on until it waits for the block, the first warp first and then the last: a race gets its chance.
  for (int turn = 0, left = grid_threads; left > 0; ++turn) {
    const uint64_t before = progress;
    for (size_t b = 0; b < blocks.size(); ++b) {
      block = &blocks[b];
      blockIdx.x = first + static_cast<unsigned>(b);
      for (int i = 0; i < threads / 32; ++i) {
        const int warp = turn % 2 ? i : threads / 32 - 1 - i;
        for (uint64_t at = progress - 1; at != progress && left > 0;) {
          at = progress;
          for (int lane = 0; lane < 32; ++lane) {
            threadIdx.x = 32 * warp + lane;
            Fiber& fiber = block->fibers[threadIdx.x];
            if (fiber.done) continue;
            swapcontext(&scheduler, &fiber.context);
            if (fiber.done) {
              --left;
              ++progress;
            }
          }
        }
      }
    }
    if (progress == before) return false;
  }
  return true;
}

// A launch of `blocks` blocks, one after the other or, cooperative, together. Shared memory starts out as NaN.
inline bool launch(unsigned blocks, int threads, int shared_bytes, std::function<void()> f, bool cooperative = false) {
  kernel = std::move(f);
  if (cooperative) return run(0, blocks, threads, shared_bytes);
  for (unsigned b = 0; b < blocks; ++b) {
    if (!run(b, b + 1, threads, shared_bytes)) return false;
  }
  return true;
}

inline uint16_t bits(float value, torch::headeronly::Half) { return torch::headeronly::Half(value).x; }
inline uint16_t bits(float value, torch::headeronly::BFloat16) { return torch::headeronly::BFloat16(value).x; }

}  // namespace on_host

inline void __syncthreads() { on_host::wait(on_host::block->barrier, static_cast<int>(on_host::block->fibers.size())); }

inline int __syncthreads_or(int value) {
  static int any;
  __syncthreads();
  any = 0;
  __syncthreads();
  any |= value;
  __syncthreads();
  const int result = any;
  __syncthreads();
  return result != 0;
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  return on_host::in_warp(value, [&](auto of) { return of(static_cast<int>(threadIdx.x) % 32 ^ lanes); });
}

inline int __any_sync(unsigned, int value) {
  return on_host::in_warp(value, [](auto of) {
    int any = 0;
    for (int lane = 0; lane < 32; ++lane) any |= of(lane);
    return any;
  });
}

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

namespace ssl_fast {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

inline int thread_index() { return static_cast<int>(threadIdx.x); }

inline void wait_for_grid() { on_host::wait(on_host::grid_barrier, on_host::grid_threads); }

inline char* dynamic_shared() {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(on_host::block->shared.data()) + 1023) / 1024 * 1024);
}

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - dynamic_shared());
}

// What is under way is NaN until it is waited for.
inline void copy_async(void* to, const void* from, bool inside) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) std::abort();
  std::memset(to, 0xff, 16);
  on_host::block->fibers[threadIdx.x].copies.push_back({to, inside ? from : nullptr});
}

inline void wait_for_copies() {
  auto& copies = on_host::block->fibers[threadIdx.x].copies;
  for (const auto& copy : copies) {
    if (copy.from) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      std::memset(copy.to, 0, 16);
    }
  }
  copies.clear();
}

inline void load_tiles(uint32_t (&r)[4], uint32_t row) {
  if (row % 16) std::abort();
  on_host::in_warp(row, [&](auto of) {
    const int lane = threadIdx.x % 32;
    for (int tile = 0; tile < 4; ++tile) {
      std::memcpy(&r[tile], dynamic_shared() + of(8 * tile + lane / 4) + lane % 4 * 4, 4);
    }
    return 0;
  });
}

inline void load_tiles_transposed(uint32_t (&r)[4], uint32_t row) {
  if (row % 16) std::abort();
  on_host::in_warp(row, [&](auto of) {
    const int lane = threadIdx.x % 32;
    for (int tile = 0; tile < 4; ++tile) {
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e) {
        std::memcpy(&pair[e], dynamic_shared() + of(8 * tile + lane % 4 * 2 + e) + lane / 4 * 2, 2);
      }
      std::memcpy(&r[tile], pair, 4);
    }
    return 0;
  });
}

template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    const uint32_t* a;
  };
  const uint32_t b[2] = {b0, b1};
  const auto half = [](uint32_t pair, int e) {
    return static_cast<float>(T(static_cast<uint16_t>(pair >> 16 * e), T::from_bits()));
  };
  float rows[2][16], columns[2][16];  // of a and b, those that meet in this lane
  const int lane = threadIdx.x % 32;
  on_host::in_warp(Operands{a}, [&](auto of) {
    for (int r = 0; r < 2; ++r) {
      for (int k = 0; k < 16; ++k) {
        rows[r][k] = half(of(lane / 4 * 4 + k % 8 / 2).a[r + k / 8 * 2], k % 2);
      }
    }
    return 0;
  });
  on_host::in_warp(Operands{b}, [&](auto of) {
    for (int n = 0; n < 2; ++n) {
      for (int k = 0; k < 16; ++k) {
        columns[n][k] = half(of((lane % 4 * 2 + n) * 4 + k % 8 / 2).a[k / 8], k % 2);
      }
    }
    return 0;
  });
  for (int r = 0; r < 2; ++r) {
    for (int n = 0; n < 2; ++n) {
      for (int k = 0; k < 16; ++k) c[2 * r + n] += rows[r][k] * columns[n][k];
    }
  }
}

template <class T>
uint32_t pack(float low, float high) {
  return on_host::bits(low, T{}) | static_cast<uint32_t>(on_host::bits(high, T{})) << 16;
}

inline float power_of_two(float x) { return std::exp2(x); }

inline float larger(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : a > b ? a : b; }

}  // namespace ssl_fast
