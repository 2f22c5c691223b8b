// Layer norm on the CPU, with the residual and the activation that follow it: each unit of work (layer_norm.h) stays in a
// cache while it is swept several times, so that memory is read and written once: x, residual, y; dy, x, dx.
#include "layer_norm.h"

#include <cmath>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

namespace ssl_fast::layer_norm {
namespace {

#define SSL_FAST_WRITES_BF16
#define SSL_FAST_KERNELS "layer_norm_kernel.h"
#include "instruction_sets.h"

// Work below which a second thread is not worth its waking, what a block should hold at least, and a tile at most.
constexpr int64_t kWorthThreads = int64_t{128} << 10, kBlockBytes = int64_t{128} << 10, kMostBlocks = 64, kLeastRows = 8;
constexpr int64_t kTileBytes = int64_t{128} << 10, kLeastTile = 32;
// An image that caches hold is a tile, where there are enough for all threads: one run of memory, where smaller tiles would be
// short runs, each with an end of its own.
constexpr int64_t kImageBytes = int64_t{384} << 10, kLeastImages = 16;
// Outputs that no cache would hold until they are read are written past the caches.
constexpr int64_t kStreamBytes = int64_t{16} << 20;
constexpr int64_t kMostLanes = 16;

using Optional = std::optional<Tensor>;

// A tensor of `width` numbers, contiguous and of any floating dtype, as fp32; `missing` where there is none.
void copy_parameter(const Optional& values, int64_t width, float missing, const char* name, float* out) {
  std::fill(out, out + width + kMostLanes, missing);
  if (!values) return;
  STD_TORCH_CHECK(values->is_cpu() && values->numel() == width && values->is_contiguous(), "layer_norm (native CPU): ", name,
                  " must be contiguous, of ", width, " numbers on the CPU");
  const auto copy = [&](auto zero) {
    std::copy_n(static_cast<const decltype(zero)*>(values->data_ptr()), width, out);
  };
  if (values->scalar_type() == ScalarType::Double) return copy(double{});
  dispatch_float(values->scalar_type(), "layer_norm", copy);
}

// A dense tensor, and how it is cut into blocks of units: by its shape alone, so that sums come out the same to the bit
// whatever the number of threads.
struct Task : Problem {
  Task(const Tensor& x_, const Optional& residual_, const Optional& weight_, const Optional& bias_, int64_t width, bool channels,
       int64_t activation_)
      : Problem{}, parameters(2 * (width + kMostLanes)) {
    STD_TORCH_CHECK(x_.is_cpu() && width >= 0 && (!channels || (x_.dim() >= 2 && x_.size(1) == width)),
                    "layer_norm (native CPU): x must be on the CPU, with ", width, " numbers to normalise");
    dtype = x_.scalar_type();
    x = x_.data_ptr();
    if (residual_) residual = same(*residual_, x_, "residual");
    activation = activation_;
    D = width;
    L = 1;
    for (int64_t d = 2; channels && d < x_.dim(); ++d) L *= x_.size(d);
    if (!channels || (D > 1 && x_.stride(1) == 1)) L = 1;
    N = D * L == 0 ? 0 : x_.numel() / (D * L);
    const int64_t size = static_cast<int64_t>(x_.element_size());
    bytes = x_.numel() * size;
    tile = std::clamp<int64_t>(kTileBytes / (std::max<int64_t>(D, 1) * size) / kLeastTile * kLeastTile, kLeastTile,
                               std::max(L, kLeastTile));
    tile = N >= kLeastImages && D * L * size <= kImageBytes ? L : std::min(tile, L);
    tiles = L == 0 ? 0 : ceil_div(L, tile);
    units = N * tiles;
    int64_t most = 1;  // a power of two, which threads share evenly
    while (most < kMostBlocks && 2 * most * kBlockBytes <= bytes) most *= 2;
    units_a_block = std::max<int64_t>(L == 1 ? kLeastRows : 1, ceil_div(units, most));
    blocks = ceil_div(units, units_a_block);
    copy_parameter(weight_, D, 1, "weight", parameters.get());
    copy_parameter(bias_, D, 0, "bias", parameters.get() + D + kMostLanes);
    weight = parameters.get();
    bias = weight + D + kMostLanes;
  }

  static const void* same(const Tensor& tensor, const Tensor& x, const char* name) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == x.scalar_type() && tensor.numel() == x.numel(),
                    "layer_norm (native CPU): ", name, " must have x's shape, layout and dtype");
    return tensor.data_ptr();
  }

  // Whether vectors of an output start where a store past the caches may.
  void choose_stream(std::initializer_list<const void*> outputs) {
    stream = bytes >= kStreamBytes && (L == 1 ? D : L) % kMostLanes == 0;
    for (const void* out : outputs) stream = stream && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  }

  // f(block, first unit, last unit, work)
  template <class F>
  void for_each_block(const F& f) const {
    Failure failure;
    torch::stable::parallel_for(0, blocks, bytes < kWorthThreads ? std::max<int64_t>(blocks, 1) : 1, [&](int64_t begin, int64_t end) {
      failure.guard([&] {
        const Buffer<float> work(kernels().work(*this));
        for (int64_t b = begin; b < end; ++b) f(b, b * units_a_block, std::min(units, (b + 1) * units_a_block), work.get());
      });
#if defined(__x86_64__)
      if (stream) _mm_sfence();
#endif
    });
    failure.rethrow();
  }

  int64_t bytes, units, units_a_block, blocks;
  Buffer<float> parameters;
};

std::tuple<Tensor, Tensor> layer_norm_fwd(const Tensor& x, const Optional& residual, const Optional& weight,
                                          const Optional& bias, int64_t width, bool channels, double eps, int64_t activation) {
  Task p(x, residual, weight, bias, width, channels, activation);
  Tensor y = output_like(x), stats = empty({3, p.N * p.L});
  p.y = y.data_ptr();
  p.stats = static_cast<float*>(stats.data_ptr());
  p.eps = eps;
  p.choose_stream({p.y});
  p.for_each_block([&](int64_t, int64_t first, int64_t last, float* work) { kernels().forward(p, first, last, work); });
  return {std::move(y), std::move(stats)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy, const Tensor& x, const Optional& residual,
                                                          const Optional& weight, const Optional& bias, const Tensor& stats,
                                                          int64_t width, bool channels, int64_t activation, bool need_dx,
                                                          bool need_dresidual, bool need_affine) {
  Task p(x, residual, weight, bias, width, channels, activation);
  STD_TORCH_CHECK(stats.is_cpu() && stats.scalar_type() == ScalarType::Float && stats.is_contiguous() &&
                      stats.numel() == 3 * p.N * p.L,
                  "layer_norm (native CPU): stats must be contiguous float32 of shape (3, N L) on the CPU");
  p.dy = Task::same(dy, x, "dy");
  p.stats = static_cast<float*>(stats.data_ptr());
  Tensor dx = need_dx ? output_like(x) : empty({0}), dresidual = need_dresidual ? output_like(x) : empty({0});
  p.dx = need_dx ? dx.data_ptr() : nullptr;
  p.dresidual = need_dresidual ? dresidual.data_ptr() : nullptr;
  p.choose_stream({p.dx, p.dresidual});
  const int64_t numbers = need_affine ? 2 * p.D : 0;
  const Buffer<double> sums(std::max<int64_t>(p.blocks, 1) * numbers);
  std::fill(sums.get(), sums.get() + numbers, 0.0);  // what no block adds to
  p.for_each_block([&](int64_t block, int64_t first, int64_t last, float* work) {
    double* const own = numbers ? sums.get() + block * numbers : nullptr;
    std::fill(own, own + numbers, 0.0);
    kernels().backward(p, first, last, own, work);
  });
  double* const total = sums.get();
  for (int64_t b = 1; b < p.blocks; ++b)
    for (int64_t i = 0; i < numbers; ++i) total[i] += total[b * numbers + i];
  Tensor dweight = empty({numbers / 2}), dbias = empty({numbers / 2});
  std::copy_n(total, numbers / 2, static_cast<float*>(dweight.data_ptr()));
  std::copy_n(total + numbers / 2, numbers / 2, static_cast<float*>(dbias.data_ptr()));
  return {std::move(dx), std::move(dresidual), std::move(dweight), std::move(dbias)};
}

STABLE_TORCH_LIBRARY_IMPL(ssl_fast_native, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd));
}

}  // namespace
}  // namespace ssl_fast::layer_norm
