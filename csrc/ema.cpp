// In-place exponential moving average over a list of tensors on the CPU: one parallel loop over the chunks of them all.
#include "common.h"
#include "ema_pairs.h"

namespace ssl_fast::ema {
namespace {

namespace portable {
#include "ema_simd.h"
}  // namespace portable

// Memory sets the pace, and vectors of 32 bytes reach it: there is no variant for wider ones.
#if defined(__x86_64__)
#define SSL_FAST_AVX2
SSL_FAST_TARGET_BEGIN("avx2,fma,f16c")
namespace avx2 {
#include "ema_simd.h"
}  // namespace avx2
SSL_FAST_TARGET_END
#undef SSL_FAST_AVX2
#endif

auto choose_update() {
#if defined(__x86_64__)
  if (std::min(cpu_capability(), detected_capability()) >= Capability::kAVX2) return avx2::update_chunk;
#endif
  return portable::update_chunk;
}

// Chunks below which waking a second thread takes longer than it saves.
constexpr int64_t kGrain = 8;

void ema_update_(std::vector<Tensor> targets, std::vector<Tensor> sources, Tensor momentum, int64_t averaged,
                 std::vector<Tensor> copies, std::optional<Tensor> seed) {
  const auto here = [](const Tensor& tensor) { return tensor.is_cpu(); };
  Lists lists(targets, sources, averaged, copies, here);
  const Weights average(momentum_of(momentum, here).get()), copy(0);
  const int64_t* const random = seed_of(seed, here);

  const int64_t count = static_cast<int64_t>(lists.pairs.size());
  std::vector<int64_t> first(count + 1);  // the number of each pair's first chunk
  for (int64_t i = 0; i < count; ++i) first[i + 1] = first[i] + ceil_div(lists.pairs[i].numel, kChunk);
  const auto update = choose_update();
  torch::stable::parallel_for(0, first[count], kGrain, [&](int64_t begin, int64_t end) {
    int64_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t chunk = begin; chunk < end; ++i) {
      const Pair& pair = lists.pairs[i];
      const Noise noise(random ? *random : 0, i);
      for (; chunk < std::min(first[i + 1], end); ++chunk) {
        const int64_t from = (chunk - first[i]) * kChunk;
        update(pair, from, std::min(from + kChunk, pair.numel), pair.averaged ? average : copy,
               random && pair.averaged ? &noise : nullptr);
      }
    }
  });
  lists.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ssl_fast_native, CPU, m) {
  m.impl("ema_update_", TORCH_BOX(&ema_update_));
}

}  // namespace ssl_fast::ema
