// Batch norm on CUDA: the launches of csrc/batch_norm_cuda.h, and which of them a tensor gets.
//
// Bytes, A being those of x: where x fits into the shared memory of the chip, or a block of threads has all of its channels'
// numbers (an instance norm), 2 A forward (x, y) and 3 A backward (dy, x, dx); else 3 A and 5 A, less what the L2 cache
// still holds when the second launch starts. A residual adds A each way, a mask A / 16 in 16 bits. Not yet measured.
#include <torch/headeronly/macros/Macros.h>

#include "mma.h"

#include <cooperative_groups.h>

namespace ssl_fast {

__device__ inline void wait_for_grid() { cooperative_groups::this_grid().sync(); }

}  // namespace ssl_fast

#include "batch_norm_cuda.h"
#include "cuda_tensors.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

namespace {

using namespace ssl_fast::batch_norm;
using namespace ssl_fast;

// The forward has four vectors of x under way at once, the backward two of x and two of dy.
template <class T, int V, bool kInner>
Place<T, V, kInner, 4> place_for(const Forward&) {
  return {};
}

template <class T, int V, bool kInner>
Place<T, V, kInner, 2> place_for(const Backward&) {
  return {};
}

template <class Place>
__global__ void __launch_bounds__(kThreads) forward_kernel(const __grid_constant__ Forward p, int phases) {
  forward<Place>(p, phases);
}

template <class Place>
__global__ void __launch_bounds__(kThreads) backward_kernel(const __grid_constant__ Backward p, int phases) {
  backward<Place>(p, phases);
}

// Whether something takes the partials of all splits.
bool merges_splits(const Forward& p) { return p.running_mean || p.running_var; }
bool merges_splits(const Backward& p) { return p.dweight; }

template <class Place>
auto kernel_for(const Forward&) {
  return forward_kernel<Place>;
}

template <class Place>
auto kernel_for(const Backward&) {
  return backward_kernel<Place>;
}

int64_t width_of(const Tensor& x) { return channels_innermost(x) ? x.size(1) : positions(x); }

// One operator's call on a dense x, and tensors laid out like it.
struct Call {
  Tensor x;
  int64_t splits;
  bool vectors;  // every pointer and every row starts on 16 bytes
  cudaStream_t stream;
  torch::stable::accelerator::DeviceGuard guard;

  Call(const char* name, const Tensor& x, int64_t splits) : x(x), splits(splits), guard(x.get_device_index()) {
    STD_TORCH_CHECK(splits > 0 && x.size(0) % splits == 0, name, ": num_splits: got ", splits,
                    ", allowed: a divisor of the batch, ", x.size(0));
    void* current;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
    vectors = width_of(x) * x.element_size() % 16 == 0;
    add(name, x);
  }

  const void* add(const char* name, const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index() && tensor.numel() == x.numel() &&
                        tensor.scalar_type() == x.scalar_type() && dense(tensor) &&
                        channels_innermost(tensor) == channels_innermost(x),
                    name, ": a tensor has not the size, dtype, layout or device of x");
    vectors = vectors && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
    return tensor.const_data_ptr();
  }

  const void* add(const char* name, const OptionalTensor& tensor) { return tensor ? add(name, *tensor) : nullptr; }

  int attribute(cudaDeviceAttr which) const {
    int value;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, x.get_device_index()));
    return value;
  }

  template <class Problem, class F>
  void with_place(const Problem& p, const F& f) const {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "batch_norm: x: allowed: bfloat16");
    if (channels_innermost(x)) {
      vectors ? f(place_for<BFloat16, 8, true>(p)) : f(place_for<BFloat16, 1, true>(p));
    } else {
      vectors ? f(place_for<BFloat16, 8, false>(p)) : f(place_for<BFloat16, 1, false>(p));
    }
  }

  // One launch for both phases, or one for each. `kept`: tensors like x that stay on the chip in between; `numbers` of a
  // channel in a partial.
  template <class Problem>
  void run(Problem p, bool reduces, bool writes_like_x, int kept, int numbers) const {
    const Shape shape{x.size(0), x.size(1), positions(x), channels_innermost(x)};
    // What 32 bits have to number: the places in a row, and the pieces of planes and thread blocks.
    const int64_t most = int64_t{1} << 30, pieces = shape.inner ? 0 : shape.batch * ceil_div(shape.positions, 32);
    STD_TORCH_CHECK(width_of(x) <= most && pieces <= most && x.size(1) * splits <= most / kMostParts,
                    "batch_norm: x: got a batch of ", shape.batch, ", ", shape.channels, " channels, ", shape.positions,
                    " positions and ", splits, " splits, which is more than one launch numbers");
    with_place(p, [&](auto place) {
      using Place = decltype(place);
      const auto kernel = kernel_for<Place>(p);
      const int64_t multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
      p.cut = Place::cut(shape, splits, multiprocessors);
      const int64_t resident_bytes = Place::resident_bytes(p.cut, kept);
      const bool resident = reduces && writes_like_x && p.cut.grid() <= multiprocessors &&
                            resident_bytes <= attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
      if (!resident) {
        int blocks;
        STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, Place::kFixedBytes));
        p.cut = Place::cut(shape, splits, multiprocessors * std::max(blocks, 1));
      }
      // Freed when the call returns, to be used again behind it on the same stream.
      const Tensor partials = new_floats(x, {reduces ? p.cut.parts * splits * numbers * p.cut.channels : 0});
      if (reduces) p.partials = static_cast<float*>(partials.mutable_data_ptr());

      int phases = kResident;
      if (resident) {
        const int bytes = static_cast<int>(resident_bytes);
        void* arguments[] = {&p, &phases};
        STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
        STD_CUDA_CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), p.cut.grid(), kThreads, arguments,
                                                   bytes, stream));
        return;
      }
      const auto launch = [&](int blocks, int phases, int bytes = Place::kFixedBytes) {
        kernel<<<blocks, kThreads, bytes, stream>>>(p, phases);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      };
      if (reduces && writes_like_x && p.cut.parts == 1) {
        // Kept while two blocks a multiprocessor have the room; else read again, from the caches at the best.
        const int64_t all = Place::resident_bytes(p.cut, kept);
        const bool keep = 2 * all <= attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
        const int bytes = keep ? static_cast<int>(all) : Place::kFixedBytes;
        STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
        launch(p.cut.grid(), kReduce | kWrite | kAlone | (keep ? kKept : 0), bytes);
        if (splits > 1 && merges_splits(p)) launch(p.cut.blocks, kMerge);
        return;
      }
      if (reduces) launch(p.cut.grid(), kReduce);
      if (writes_like_x) {
        launch(p.cut.grid(), kWrite);
      } else if (reduces) {
        launch(p.cut.blocks * p.cut.splits, kMerge);
      }
    });
  }
};

// Fills y, where there is one, and mask; returns the statistics, unless they were given.
Tensor run_forward(Call& call, const OptionalTensor& y, uint8_t* mask, const OptionalTensor& residual,
                   const OptionalTensor& weight, const OptionalTensor& bias, OptionalTensor running_mean,
                   OptionalTensor running_var, const OptionalTensor& num_batches_tracked, const OptionalTensor& stats,
                   bool training, std::optional<double> momentum, double eps, int64_t activation, bool variance = false) {
  const Floats w(weight), b(bias), given(stats), mean(running_mean), var(running_var);
  STD_TORCH_CHECK(stats || training || (mean.data && var.data), "batch_norm: running_mean, running_var: allowed: tensors");
  Forward p{};
  p.x = call.x.const_data_ptr();
  p.residual = call.add("residual", residual);
  p.y = y ? const_cast<void*>(call.add("y", *y)) : nullptr;
  p.mask = mask;
  p.weight = w.data;
  p.bias = b.data;
  p.given = given.data;
  p.from_batch = training && !stats;
  p.activation = static_cast<int>(activation);
  p.eps = static_cast<float>(eps);
  p.variance = variance;
  if (!stats) {
    p.running_mean = mean.data;
    p.running_var = var.data;
  }
  if (p.from_batch && num_batches_tracked) {
    p.num_batches_tracked = static_cast<int64_t*>(num_batches_tracked->mutable_data_ptr());
  }
  p.by_count = !momentum.has_value();
  p.momentum = static_cast<float>(momentum.value_or(0));
  STD_TORCH_CHECK(!p.from_batch || !p.by_count || p.num_batches_tracked || !(mean.data || var.data),
                  "batch_norm: momentum: got None without num_batches_tracked, allowed: a number, or None with that count");
  const Tensor own = stats ? nothing(call.x, ScalarType::Float) : new_floats(call.x, {3, call.splits, call.x.size(1)});
  p.stats = stats ? nullptr : static_cast<float*>(own.mutable_data_ptr());
  call.run(p, p.from_batch, p.y != nullptr, 1, 3);
  if (p.from_batch) {
    mean.write_back(running_mean);
    var.write_back(running_var);
  }
  return own;
}

// Sets of statistics; `num_splits` of 0: one for each image.
int64_t splits_of(const Tensor& x, const OptionalTensor& stats, bool training, int64_t num_splits) {
  if (stats) return stats->size(1);
  return !training ? 1 : num_splits ? num_splits : std::max<int64_t>(x.size(0), 1);
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_fwd(
    Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias, OptionalTensor running_mean,
    OptionalTensor running_var, OptionalTensor num_batches_tracked, OptionalTensor stats, bool training,
    std::optional<double> momentum, double eps, int64_t num_splits, int64_t activation, bool keep_mask) {
  Call call("batch_norm_fwd", x, splits_of(x, stats, training, num_splits));
  const Tensor y = torch::stable::empty_like(x);
  const int64_t width = width_of(x), bytes = keep_mask && width ? x.numel() / width * ceil_div(width, 8) : 0;
  const Tensor mask = torch::stable::new_empty(x, {bytes}, ScalarType::Byte);
  const Tensor own = run_forward(call, y, keep_mask ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr, residual,
                                 weight, bias, running_mean, running_var, num_batches_tracked, stats, training, momentum,
                                 eps, activation);
  return {y, own, mask};
}

void batch_norm_(Tensor x, OptionalTensor residual, OptionalTensor weight, OptionalTensor bias, OptionalTensor running_mean,
                 OptionalTensor running_var, OptionalTensor num_batches_tracked, OptionalTensor stats, bool training,
                 std::optional<double> momentum, double eps, int64_t num_splits, int64_t activation) {
  Call call("batch_norm_", x, splits_of(x, stats, training, num_splits));
  run_forward(call, x, nullptr, residual, weight, bias, running_mean, running_var, num_batches_tracked, stats, training,
              momentum, eps, activation);
}

Tensor batch_norm_stats(Tensor x, int64_t num_splits) {
  Call call("batch_norm_stats", x, splits_of(x, {}, true, num_splits));
  return run_forward(call, {}, nullptr, {}, {}, {}, {}, {}, {}, {}, true, 0.0, 0, kIdentity, true);
}

// What a call of the backward works on; the tensors live as long as it does.
struct BackwardCall {
  Floats weight, bias, stats, means;
  Call call;
  Backward p{};

  BackwardCall(const char* name, const Tensor& dy, const Tensor& x, const OptionalTensor& residual,
               const OptionalTensor& mask, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& stats,
               const OptionalTensor& means, int64_t activation)
      : weight(weight), bias(bias), stats(OptionalTensor(stats)), means(means), call(name, x, stats.size(1)) {
    const bool smooth = activation > kLeakyRelu;  // else the derivative depends on a sign alone
    p.x = x.const_data_ptr();
    p.dy = call.add(name, dy);
    p.residual = smooth ? call.add(name, residual) : nullptr;
    p.mask = mask && !smooth ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
    p.weight = this->weight.data;
    p.bias = this->bias.data;
    p.stats = this->stats.data;
    p.means = this->means.data;
    p.activation = static_cast<int>(activation);
  }
};

Tensor batch_norm_sums(Tensor dy, Tensor x, OptionalTensor residual, OptionalTensor mask, OptionalTensor weight,
                       OptionalTensor bias, Tensor stats, int64_t activation) {
  BackwardCall b("batch_norm_sums", dy, x, residual, mask, weight, bias, stats, {}, activation);
  const Tensor sums = new_floats(x, {2, stats.size(1), x.size(1)});
  b.p.sums = static_cast<float*>(sums.mutable_data_ptr());
  b.call.run(b.p, true, false, 2, 2);
  return sums;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_bwd(Tensor dy, Tensor x, OptionalTensor residual, OptionalTensor mask,
                                                          OptionalTensor weight, OptionalTensor bias, Tensor stats,
                                                          OptionalTensor means, bool training, int64_t activation,
                                                          bool need_dx, bool need_dresidual) {
  BackwardCall b("batch_norm_bwd", dy, x, residual, mask, weight, bias, stats, means, activation);
  const auto like_x = [&](bool needed) {
    return needed ? torch::stable::empty_like(x) : nothing(x, x.scalar_type());
  };
  const Tensor dx = like_x(need_dx), dresidual = like_x(need_dresidual);
  const Tensor dweight = new_floats(x, {means ? 0 : x.size(1)}), dbias = new_floats(x, {means ? 0 : x.size(1)});
  if (need_dx) b.p.dx = const_cast<void*>(b.call.add("dx", dx));
  if (need_dresidual) b.p.dresidual = const_cast<void*>(b.call.add("dresidual", dresidual));
  if (!means) {
    b.p.dweight = static_cast<float*>(dweight.mutable_data_ptr());
    b.p.dbias = static_cast<float*>(dbias.mutable_data_ptr());
  }
  b.p.training = training;
  b.call.run(b.p, !means, need_dx || need_dresidual, 2, 2);
  return {dx, dresidual, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ssl_fast_native, CUDA, m) {
  m.impl("batch_norm_fwd", TORCH_BOX(&batch_norm_fwd));
  m.impl("batch_norm_", TORCH_BOX(&batch_norm_));
  m.impl("batch_norm_stats", TORCH_BOX(&batch_norm_stats));
  m.impl("batch_norm_sums", TORCH_BOX(&batch_norm_sums));
  m.impl("batch_norm_bwd", TORCH_BOX(&batch_norm_bwd));
}
