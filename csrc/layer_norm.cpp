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

// Work below which a second thread is not worth its waking, what a block should hold at least, and a tile at most. Few wide
// rows are shared out too.
constexpr int64_t kWorthThreads = int64_t{128} << 10, kBlockBytes = int64_t{128} << 10, kMostBlocks = 64, kLeastRows = 8;
constexpr int64_t kLeastWideRows = 2, kWideBytes = int64_t{1} << 20;
constexpr int64_t kTileBytes = int64_t{128} << 10, kLeastTile = 32;
// An image that caches hold is a tile, where there are enough for all threads: one run of memory, where smaller tiles would be
// short runs, each with an end of its own.
constexpr int64_t kImageBytes = int64_t{384} << 10, kLeastImages = 16;
// Outputs that no cache would hold until they are read are written past the caches.
constexpr int64_t kStreamBytes = int64_t{16} << 20;
constexpr int64_t kMostLanes = 16;
// Units whose affine gradients are summed in fp32 before they are added in fp64, and sums that are worth a second thread.
constexpr int64_t kSummed = 256, kWorthAdding = int64_t{128} << 10;

using Optional = std::optional<Tensor>;

// A tensor of `width` numbers, contiguous and of any floating dtype, as fp32 that may be read a vector beyond: itself, or
// copied into `room`; `missing` where there is none.
const float* parameter(const Optional& values, int64_t width, float missing, const char* name,
                       std::optional<Buffer<float>>& room) {
  STD_TORCH_CHECK(!values || (values->is_cpu() && values->numel() == width && values->is_contiguous()),
                  "layer_norm (native CPU): ", name, " must be contiguous, of ", width, " numbers on the CPU");
  if (values && values->scalar_type() == ScalarType::Float && width % kMostLanes == 0)
    return static_cast<const float*>(values->data_ptr());
  room.emplace(width + kMostLanes);
  std::fill(room->get(), room->get() + width + kMostLanes, missing);
  const auto copy = [&](auto zero) {
    std::copy_n(static_cast<const decltype(zero)*>(values->data_ptr()), width, room->get());
  };
  if (values && values->scalar_type() == ScalarType::Double)
    copy(double{});
  else if (values)
    dispatch_float(values->scalar_type(), "layer_norm", copy);
  return room->get();
}

// A dense tensor, and how it is cut into blocks of units: by its shape alone, so that sums come out the same to the bit
// whatever the number of threads.
struct Task : Problem {
  Task(const Tensor& x_, const Optional& residual_, const Optional& weight_, const Optional& bias_, int64_t width, bool channels,
       int64_t activation_)
      : Problem{} {
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
    const int64_t least = L > 1 ? 1 : D * size < kWideBytes ? kLeastRows : kLeastWideRows;
    units_a_block = std::max<int64_t>(least, ceil_div(units, most));
    blocks = ceil_div(units, units_a_block);
    weight = parameter(weight_, D, 1, "weight", own_weight);
    bias = parameter(bias_, D, 0, "bias", own_bias);
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
  std::optional<Buffer<float>> own_weight, own_bias;
};

// (parts, 2, D) sums as (D,) each, added in fp64.
void add_up(const float* sums, int64_t parts, int64_t D, const Tensor& dweight, const Tensor& dbias) {
  float* const out[2] = {static_cast<float*>(dweight.data_ptr()), static_cast<float*>(dbias.data_ptr())};
  constexpr int64_t kPiece = 256;
  const int64_t pieces = ceil_div(D, kPiece), grain = kWorthAdding / (kPiece * std::max<int64_t>(parts, 1));
  torch::stable::parallel_for(0, 2 * pieces, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t which = k / pieces, from = k % pieces * kPiece, count = std::min(kPiece, D - from);
      double total[kPiece] = {};
      for (int64_t part = 0; part < parts; ++part) {
        const float* const own = sums + (2 * part + which) * D + from;
        for (int64_t i = 0; i < count; ++i) total[i] += own[i];
      }
      std::copy_n(total, count, out[which] + from);
    }
  });
}

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
  const int64_t numbers = need_affine ? 2 * p.D : 0, parts_a_block = ceil_div(p.units_a_block, kSummed);
  const Buffer<float> sums(p.blocks * parts_a_block * numbers);
  p.for_each_block([&](int64_t block, int64_t first, int64_t last, float* work) {
    float* own = sums.get() + block * parts_a_block * numbers;
    for (int64_t from = first; from < last; from += kSummed, own += numbers)
      kernels().backward(p, from, std::min(from + kSummed, last), numbers ? own : nullptr, work);
  });
  Tensor dweight = empty({numbers / 2}), dbias = empty({numbers / 2});
  if (need_affine) {
    const int64_t full = std::max<int64_t>(p.blocks - 1, 0);  // blocks; the last one may have fewer parts
    const int64_t parts = full * parts_a_block + ceil_div(p.units - full * p.units_a_block, kSummed);
    add_up(sums.get(), parts, p.D, dweight, dbias);
  }
  return {std::move(dx), std::move(dresidual), std::move(dweight), std::move(dbias)};
}

STABLE_TORCH_LIBRARY_IMPL(ssl_fast_native, CPU, m) {
  m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd));
}

}  // namespace
}  // namespace ssl_fast::layer_norm
