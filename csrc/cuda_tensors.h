// What the launches of the norms on CUDA ask of tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "error_check.h"

#include <cstdint>
#include <initializer_list>
#include <optional>

namespace ssl_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t positions(const Tensor& x) {
  int64_t L = 1;
  for (int64_t d = 2; d < x.dim(); ++d) L *= x.size(d);
  return L;
}

// Rows of channels, or planes, without gaps.
inline bool dense(const Tensor& x) {
  if (x.is_contiguous()) return true;
  int64_t expected = x.size(1);
  for (int64_t d = x.dim(); d-- > 2;) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return x.stride(1) == 1 && (x.size(0) == 1 || x.stride(0) == expected);
}

inline bool channels_innermost(const Tensor& x) { return positions(x) == 1 || (x.size(1) > 1 && x.stride(1) == 1); }

inline Tensor new_floats(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, ScalarType::Float);
}

inline Tensor nothing(const Tensor& like, ScalarType type) { return torch::stable::new_empty(like, {0}, type); }

// A tensor as kernels take it: contiguous fp32; it lives as long as the call.
struct Floats {
  Tensor tensor;
  float* data = nullptr;

  Floats() = default;
  explicit Floats(const OptionalTensor& given) {
    if (!given) return;
    const Tensor single = given->scalar_type() == ScalarType::Float ? *given : torch::stable::to(*given, ScalarType::Float);
    tensor = torch::stable::contiguous(single);
    data = static_cast<float*>(tensor.mutable_data_ptr());
  }
  void write_back(OptionalTensor& given) const {
    if (given && data != given->const_data_ptr()) torch::stable::copy_(*given, tensor);
  }
};

}  // namespace ssl_fast
