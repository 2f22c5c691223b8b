// The kernels of csrc/batch_norm_cuda.h, launched on the host as csrc/batch_norm.cu launches them.
#include "cuda_on_host.h"

#include "batch_norm_cuda.h"

using namespace ssl_fast::batch_norm;

template <class Place, class Problem, class Kernel>
static int run(Problem p, const Shape& shape, const int64_t* sizes, bool reduces, bool writes_like_x, int kept, int numbers,
               const Kernel& kernel) {
  p.cut = Place::cut(shape, sizes[4], sizes[5]);
  std::vector<float> partials(static_cast<size_t>(p.cut.parts * p.cut.splits * numbers * p.cut.channels), NAN);
  if (reduces) p.partials = partials.data();
  const auto launch = [&](int blocks, int64_t bytes, int phases) {
    const auto shared = static_cast<int>(bytes);
    return on_host::launch(blocks, kThreads, shared, [&] { kernel(p, phases); }, phases == kResident);
  };
  if (reduces && writes_like_x && p.cut.parts == 1 && sizes[6] != 1) {
    const int64_t bytes = sizes[6] ? Place::resident_bytes(p.cut, kept) : int64_t{Place::kFixedBytes};
    if (!launch(p.cut.grid(), bytes, kReduce | kWrite | kAlone | (sizes[6] ? kKept : 0))) return 1;
    return p.cut.splits > 1 && !launch(p.cut.blocks, Place::kFixedBytes, kMerge);
  }
  if (reduces && writes_like_x && sizes[6]) {
    return !launch(p.cut.grid(), Place::resident_bytes(p.cut, kept), kResident);
  }
  if (reduces && !launch(p.cut.grid(), Place::kFixedBytes, kReduce)) return 1;
  if (writes_like_x) return !launch(p.cut.grid(), Place::kFixedBytes, kWrite);
  return reduces && !launch(p.cut.blocks * p.cut.splits, Place::kFixedBytes, kMerge);
}

template <int kVectors, class F>
static int with_place(int type, bool vectors, bool inner, const F& f) {
  const auto typed = [&](auto value) {
    using T = decltype(value);
    constexpr int V = 16 / sizeof(T);
    if (inner) return vectors ? f(Place<T, V, true, kVectors>{}) : f(Place<T, 1, true, kVectors>{});
    return vectors ? f(Place<T, V, false, kVectors>{}) : f(Place<T, 1, false, kVectors>{});
  };
  return type == 0 ? typed(0.0f) : type == 1 ? typed(torch::headeronly::BFloat16{}) : typed(torch::headeronly::Half{});
}

// 0 when done. type: 0 fp32, 1 bf16, 2 fp16; sizes: N, C, L, channels innermost, splits, slots, resident (0; 1, by
// one cooperative launch; 2, where a block needs no other), vectors.
extern "C" int run_forward(int type, const int64_t* sizes, void** pointers, int from_batch, int by_count, int activation,
                           int variance, float momentum, float eps) {
  Forward p{};
  p.x = pointers[0];
  p.residual = pointers[1];
  p.weight = static_cast<float*>(pointers[2]);
  p.bias = static_cast<float*>(pointers[3]);
  p.running_mean = static_cast<float*>(pointers[4]);
  p.running_var = static_cast<float*>(pointers[5]);
  p.num_batches_tracked = static_cast<int64_t*>(pointers[6]);
  p.given = static_cast<float*>(pointers[7]);
  p.y = pointers[8];
  p.stats = static_cast<float*>(pointers[9]);
  p.mask = static_cast<uint8_t*>(pointers[10]);
  p.from_batch = from_batch;
  p.by_count = by_count;
  p.activation = activation;
  p.variance = variance;
  p.momentum = momentum;
  p.eps = eps;
  return with_place<4>(type, sizes[7], sizes[3], [&](auto place) {
    using Place = decltype(place);
    return run<Place>(p, {sizes[0], sizes[1], sizes[2], Place::kInner}, sizes, p.from_batch, p.y != nullptr, 1, 3, forward<Place>);
  });
}

extern "C" int run_backward(int type, const int64_t* sizes, void** pointers, int training, int activation) {
  Backward p{};
  p.dy = pointers[0];
  p.x = pointers[1];
  p.residual = pointers[2];
  p.mask = static_cast<uint8_t*>(pointers[3]);
  p.weight = static_cast<float*>(pointers[4]);
  p.bias = static_cast<float*>(pointers[5]);
  p.stats = static_cast<float*>(pointers[6]);
  p.means = static_cast<float*>(pointers[7]);
  p.dx = pointers[8];
  p.dresidual = pointers[9];
  p.dweight = static_cast<float*>(pointers[10]);
  p.dbias = static_cast<float*>(pointers[11]);
  p.sums = static_cast<float*>(pointers[12]);
  p.training = training;
  p.activation = activation;
  return with_place<2>(type, sizes[7], sizes[3], [&](auto place) {
    using Place = decltype(place);
    return run<Place>(p, {sizes[0], sizes[1], sizes[2], Place::kInner}, sizes, !p.means, p.dx || p.dresidual, 2, 2, backward<Place>);
  });
}
