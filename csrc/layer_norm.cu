// Layer norm on CUDA: the launches of csrc/layer_norm_cuda.h. Bytes, A being those of x: 2 A forward (x, y) and 3 A backward
// (dy, x, dx); rows wider than 256 vectors, and planes, are read three times forward and twice backward, less what the L2
// cache holds. A residual adds A. Not yet measured.
#include <torch/headeronly/macros/Macros.h>

#include "mma.h"

namespace ssl_fast {

__device__ void wait_for_grid();  // which no kernel of layer norm does

}  // namespace ssl_fast

#include "cuda_tensors.h"
#include "layer_norm_cuda.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>
#include <type_traits>

namespace {

using namespace ssl_fast;
using namespace ssl_fast::layer_norm;

template <class T, int V>
__global__ void __launch_bounds__(kThreads) forward_rows_kernel(const __grid_constant__ Problem p) {
  forward_rows<T, V>(p);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) means_of_rows_kernel(const __grid_constant__ Problem p) {
  means_of_rows<T, V>(p);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) backward_rows_kernel(const __grid_constant__ Problem p) {
  backward_rows<T, V>(p);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) forward_planes_kernel(const __grid_constant__ Problem p) {
  forward_planes<T, V>(p);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads) backward_planes_kernel(const __grid_constant__ Problem p) {
  backward_planes<T, V>(p);
}

__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ Problem p) { merge(p); }

// One operator's call on a dense x, and tensors laid out like it.
struct Call {
  Tensor x;
  Problem p{};
  Floats weight, bias;
  bool vectors;  // every pointer and every line starts on 16 bytes
  cudaStream_t stream;
  torch::stable::accelerator::DeviceGuard guard;

  Call(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight_, const OptionalTensor& bias_, int64_t width,
       bool channels, int64_t activation)
      : x(x), weight(weight_), bias(bias_), guard(x.get_device_index()) {
    STD_TORCH_CHECK(channels ? x.dim() >= 2 && x.size(1) == width && dense(x) : x.is_contiguous(),
                    "layer_norm: x: allowed: a contiguous one, or (N, ", width, ", ...) in a dense memory format");
    void* current;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
    p.D = width;
    p.L = channels && !channels_innermost(x) ? positions(x) : 1;
    p.N = p.D * p.L == 0 ? 0 : x.numel() / (p.D * p.L);
    p.activation = static_cast<int>(activation);
    p.weight = weight.data;
    p.bias = bias.data;
    vectors = (p.L == 1 ? p.D : p.L) * x.element_size() % 16 == 0;
    p.x = add(x);
    p.residual = residual ? add(*residual) : nullptr;
  }

  const void* add(const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index() && tensor.numel() == x.numel() &&
                        tensor.scalar_type() == x.scalar_type(),
                    "layer_norm: a tensor has not the size, dtype or device of x");
    vectors = vectors && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
    return tensor.const_data_ptr();
  }
  void* out(const Tensor& tensor) { return const_cast<void*>(add(tensor)); }

  // f(T, V) as values of types.
  template <class F>
  void with_types(const F& f) const {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "layer_norm: x: allowed: bfloat16");
    vectors ? f(BFloat16{}, std::integral_constant<int, 8>{}) : f(BFloat16{}, std::integral_constant<int, 1>{});
  }

  // Blocks of threads of the backward that the device runs at a time.
  int64_t slots() const {
    constexpr int kPerMultiprocessor = 4;
    int multiprocessors;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, x.get_device_index()));
    return kPerMultiprocessor * multiprocessors;
  }

  void launch(void (*kernel)(Problem), int64_t blocks, int shared) const {
    STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "layer_norm: x: got ", p.N, " x ", p.L,
                    " positions, which is more than one launch numbers");
    kernel<<<static_cast<unsigned>(blocks), kThreads, shared, stream>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

std::tuple<Tensor, Tensor> layer_norm_fwd(Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias,
                                          int64_t width, bool channels, double eps, int64_t activation) {
  Call call(x, residual, weight, bias, width, channels, activation);
  const Tensor y = torch::stable::empty_like(x), stats = new_floats(x, {3, call.p.N * call.p.L});
  call.p.y = call.out(y);
  call.p.stats = static_cast<float*>(stats.mutable_data_ptr());
  call.p.eps = static_cast<float>(eps);
  if (call.p.N > 0) {
    call.with_types([&](auto value, auto vector) {
      using T = decltype(value);
      constexpr int V = decltype(vector)::value;
      const Launches blocks = cut(call.p, V, 1);
      call.launch(call.p.L == 1 ? forward_rows_kernel<T, V> : forward_planes_kernel<T, V>, blocks.forward, kSharedBytes<V>);
    });
  }
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_bwd(Tensor dy, Tensor x, OptionalTensor residual, OptionalTensor weight,
                                                          OptionalTensor bias, Tensor stats, int64_t width, bool channels,
                                                          int64_t activation, bool need_dx, bool need_dresidual,
                                                          bool need_affine) {
  Call call(x, residual, weight, bias, width, channels, activation);
  Problem& p = call.p;
  const auto like_x = [&](bool needed) { return needed ? torch::stable::empty_like(x) : nothing(x, x.scalar_type()); };
  const Tensor dx = like_x(need_dx), dresidual = like_x(need_dresidual);
  const int64_t numbers = need_affine ? width : 0;
  Tensor dweight = new_floats(x, {numbers}), dbias = new_floats(x, {numbers});
  const Floats saved{OptionalTensor(stats)};
  p.dy = call.add(dy);
  p.dx = need_dx ? call.out(dx) : nullptr;
  p.dresidual = need_dresidual ? call.out(dresidual) : nullptr;
  p.stats = saved.data;
  p.dweight = static_cast<float*>(dweight.mutable_data_ptr());
  p.dbias = static_cast<float*>(dbias.mutable_data_ptr());
  if (p.N > 0) {
    call.with_types([&](auto value, auto vector) {
      using T = decltype(value);
      constexpr int V = decltype(vector)::value;
      const Launches blocks = cut(p, V, call.slots());
      // Freed when the call returns, to be used again behind it on the same stream.
      const Tensor partials = new_floats(x, {p.parts, 2, numbers});
      const Tensor means = new_floats(x, {blocks.wide && need_dx ? 2 * p.N : 0});
      if (need_affine) p.partials = static_cast<float*>(partials.mutable_data_ptr());
      if (blocks.wide && need_dx) {
        p.means = static_cast<float*>(means.mutable_data_ptr());
        call.launch(means_of_rows_kernel<T, V>, blocks.forward, kSharedBytes<V>);
      }
      call.launch(p.L == 1 ? backward_rows_kernel<T, V> : backward_planes_kernel<T, V>, blocks.backward, kSharedBytes<V>);
      if (need_affine) call.launch(merge_kernel, blocks.merge, 0);
    });
  } else {
    torch::stable::zero_(dweight);
    torch::stable::zero_(dbias);
  }
  return {dx, dresidual, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ssl_fast_native, CUDA, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd));
}
