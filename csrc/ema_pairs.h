// The lists of an EMA call as pairs of dense memory, which the C++ of both devices updates.
#pragma once

#include "ema.h"
#include "error_check.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <deque>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

namespace ssl_fast::ema {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType type_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return kFloat;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kHalf;
    case ScalarType::Double: return kDouble;
    default: return kByte;
  }
}

// Whether the elements fill numel() consecutive places, in any order of dimensions.
inline bool dense(const Tensor& tensor) {
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

// Whether elements share memory, as those of an expanded tensor do.
inline bool expanded(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && strides[d] == 0) return true;
  }
  return false;
}

inline bool same_shape(const Tensor& a, const Tensor& b) {
  const auto left = a.sizes(), right = b.sizes();
  return std::equal(left.begin(), left.end(), right.begin(), right.end());
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  }
  return true;
}

inline Tensor copy_in_layout_of(const Tensor& layout, const Tensor& values) {
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

struct Lists {
  std::vector<Pair> pairs;

  // here(tensor): whether the kernel at hand reaches it.
  template <class Here>
  Lists(const std::vector<Tensor>& targets, const std::vector<Tensor>& sources, int64_t averaged,
        const std::vector<Tensor>& copies, const Here& here) {
    STD_TORCH_CHECK(targets.size() == sources.size() && copies.size() <= targets.size(), "ema_update_: ",
                    targets.size(), " targets, ", sources.size(), " sources, ", copies.size(), " copies");
    pairs.reserve(targets.size());
    for (size_t i = 0; i < targets.size(); ++i) {
      const Tensor &target = targets[i], &source = sources[i];
      const ScalarType dtype = target.scalar_type(), source_dtype = source.scalar_type();
      const DType to = type_of(dtype), from = type_of(source_dtype);
      const bool average = static_cast<int64_t>(i) < averaged;
      STD_TORCH_CHECK(here(target) && here(source) && same_shape(target, source),
                      "ema_update_: pair ", i, " differs in shape, or lies on another device");
      STD_TORCH_CHECK((to != kByte && from != kByte) || (!average && dtype == source_dtype),
                      "ema_update_: averages float16, bfloat16, float32 and float64, and copies equal dtypes; pair ", i);
      const bool plain = target.is_contiguous();
      STD_TORCH_CHECK(plain || !expanded(target), "ema_update_: target ", i, " is expanded");
      const Tensor& to_update = plain || dense(target) ? target : keep(torch::stable::contiguous(target));
      if (&to_update != &target) late_.emplace_back(target, to_update);
      const auto alike = [&](const Tensor& other) {
        return (plain && other.is_contiguous()) || (dense(other) && same_strides(to_update, other));
      };
      const Tensor& read = alike(source) ? source : keep(copy_in_layout_of(to_update, source));
      Pair pair{to_update.mutable_data_ptr(), read.const_data_ptr(), nullptr, target.numel(), 0, to, from, kFloat, average};
      if (!average && dtype == source_dtype) {
        pair.target_type = pair.source_type = kByte;
        pair.numel *= static_cast<int64_t>(target.element_size());
      }
      if (i < copies.size()) {
        pair.copy_type = type_of(copies[i].scalar_type());
        STD_TORCH_CHECK(here(copies[i]) && same_shape(target, copies[i]) && to == kFloat &&
                            (pair.copy_type == kHalf || pair.copy_type == kBFloat16),
                        "ema_update_: copies are float16 or bfloat16 of float32 targets; copy ", i);
        const Tensor& copy = alike(copies[i]) ? copies[i] : keep(copy_in_layout_of(to_update, copies[i]));
        if (&copy != &copies[i]) late_.emplace_back(copies[i], copy);
        pair.copy = static_cast<uint16_t*>(copy.mutable_data_ptr());
      }
      pairs.push_back(pair);
    }
  }

  // Once the pairs are updated: tensors with gaps get their values.
  void finish() {
    for (auto& [tensor, updated] : late_) torch::stable::copy_(tensor, updated);
  }

 private:
  // Until the launch: the allocator may hand freed memory to the next copy.
  const Tensor& keep(Tensor tensor) { return kept_.emplace_back(std::move(tensor)); }

  std::deque<Tensor> kept_;
  std::vector<std::pair<Tensor, Tensor>> late_;
};

template <class Here>
Momentum momentum_of(const Tensor& momentum, const Here& here) {
  const bool single = momentum.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(momentum.numel() == 1 && (single || momentum.scalar_type() == ScalarType::Double) &&
                      (momentum.is_cpu() || here(momentum)),
                  "ema_update_: momentum must be one float32 or float64, on the CPU or with the targets");
  const Momentum where{0, momentum.const_data_ptr(), single};
  return momentum.is_cpu() ? Momentum{where.get(), nullptr, false} : where;
}

template <class Here>
const int64_t* seed_of(const std::optional<Tensor>& seed, const Here& here) {
  if (!seed) return nullptr;
  STD_TORCH_CHECK(seed->numel() == 1 && seed->scalar_type() == ScalarType::Long && here(*seed),
                  "ema_update_: seed must be one int64 with the targets");
  return static_cast<const int64_t*>(seed->const_data_ptr());
}

}  // namespace ssl_fast::ema
