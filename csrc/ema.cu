// In-place exponential moving average over a list of tensors, one launch for up to 1,024 of them.
//
// The table of pointers travels as a kernel argument: nothing to allocate, copy or keep valid between calls, and a
// CUDA graph captures it by value.
#include "ema.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

namespace {

using ssl_fast::ema::DType;
using ssl_fast::ema::kThreads;
using ssl_fast::ema::Table;
using ssl_fast::ema::Weights;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

__global__ void __launch_bounds__(kThreads) ema_kernel(const __grid_constant__ Table table, const __grid_constant__ Weights weights) {
  ssl_fast::ema::update(table, blockIdx.x, threadIdx.x, weights);
}

void launch(const Table& table, const Weights& weights, cudaStream_t stream) {
  if (table.chunks == 0) return;
  ema_kernel<<<table.chunks, kThreads, 0, stream>>>(table, weights);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

DType type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kHalf;
    case ScalarType::Double: return DType::kDouble;
    default: STD_TORCH_CHECK(false, "ema_update_: takes float16, bfloat16, float32 and float64 tensors");
  }
}

// Whether the elements fill numel() consecutive places, in any order of dimensions.
bool dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), 0);
  std::erase_if(order, [&](size_t d) { return sizes[d] == 1; });
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (const size_t d : order) {
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

Tensor copy_in_layout_of(const Tensor& layout, const Tensor& values) {
  int32_t dtype, device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(values.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(values.get(), &device));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      layout.dim(), layout.sizes().data(), layout.strides().data(), dtype, device, values.get_device_index(), &handle));
  Tensor copy(handle);
  torch::stable::copy_(copy, values);
  return copy;
}

void ema_update_(std::vector<Tensor> targets, std::vector<Tensor> sources, double momentum) {
  STD_TORCH_CHECK(targets.size() == sources.size(), "ema_update_: ", targets.size(), " targets, ", sources.size(),
                  " sources");
  if (targets.empty()) return;
  const auto device = targets[0].get_device_index();
  for (size_t i = 0; i < targets.size(); ++i) {
    const Tensor &target = targets[i], &source = sources[i];
    STD_TORCH_CHECK(target.is_cuda() && source.is_cuda() && target.get_device_index() == device &&
                        source.get_device_index() == device && target.numel() == source.numel() &&
                        target.dim() == source.dim(),
                    "ema_update_: pair ", i, " differs in shape, or does not lie on CUDA device ", device);
    type_of(target);
    type_of(source);
  }

  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto cuda_stream = static_cast<cudaStream_t>(stream);

  const Weights weights(momentum);
  auto table = std::make_unique<Table>();
  std::vector<std::pair<Tensor, Tensor>> scattered;  // targets with gaps, and the dense copies that were updated
  for (size_t i = 0; i < targets.size(); ++i) {
    Tensor target = targets[i], source = sources[i];
    if (!dense(target)) {
      target = torch::stable::contiguous(target);
      scattered.emplace_back(targets[i], target);
    }
    if (!dense(source) || !same_strides(target, source)) source = copy_in_layout_of(target, source);
    const auto add = [&] {
      return table->add(target.mutable_data_ptr(), type_of(target), source.const_data_ptr(), type_of(source),
                        target.numel());
    };
    if (!add()) {
      launch(*table, weights, cuda_stream);
      table->clear();
      STD_TORCH_CHECK(add(), "ema_update_: a tensor of ", target.numel(), " elements is too large");
    }
    sources[i] = source;  // kept until the launch: the allocator may hand freed memory to the next copy
  }
  launch(*table, weights, cuda_stream);
  for (auto& [target, updated] : scattered) torch::stable::copy_(target, updated);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ssl_fast_native, CUDA, m) {
  m.impl("ema_update_", TORCH_BOX(&ema_update_));
}
