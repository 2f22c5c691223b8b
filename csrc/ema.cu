// In-place exponential moving average over a list of tensors, one launch for up to 800 of them.
//
// The table of pointers travels as a kernel argument: nothing to allocate, copy or keep valid between calls, and a
// CUDA graph captures it by value.
#include "ema_pairs.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <memory>

namespace {

using namespace ssl_fast::ema;

// Four blocks a multiprocessor: left alone, ptxas spills on sm_80 to make room for a fifth.
__global__ void __launch_bounds__(kThreads, 4)
    ema_kernel(const __grid_constant__ Table table, const __grid_constant__ Momentum momentum, const int64_t* seed) {
  update(table, blockIdx.x, threadIdx.x, momentum, seed);
}

void ema_update_(std::vector<Tensor> targets, std::vector<Tensor> sources, Tensor momentum, int64_t averaged,
                 std::vector<Tensor> copies, std::optional<Tensor> seed) {
  if (targets.empty()) return;
  const auto device = targets[0].get_device_index();
  const auto here = [&](const Tensor& tensor) { return tensor.is_cuda() && tensor.get_device_index() == device; };
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));

  Lists lists(targets, sources, averaged, copies, here);
  const Momentum weight = momentum_of(momentum, here);
  const int64_t* const random = seed_of(seed, here);
  const auto table = std::make_unique<Table>();
  const auto launch = [&] {
    if (table->chunks == 0) return;
    ema_kernel<<<table->chunks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*table, weight, random);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  for (const Pair& pair : lists.pairs) {
    if (table->add(pair)) continue;
    launch();
    table->next();
    STD_TORCH_CHECK(table->add(pair), "ema_update_: a tensor of ", pair.numel, " elements is too large");
  }
  launch();
  lists.finish();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ssl_fast_native, CUDA, m) {
  m.impl("ema_update_", TORCH_BOX(&ema_update_));
}
