// The kernels of csrc/layer_norm_cuda.h, launched on the host as csrc/layer_norm.cu launches them.
#include "cuda_on_host.h"

#include "layer_norm_cuda.h"

using namespace ssl_fast::layer_norm;

template <class F>
static int with_types(int type, bool vectors, const F& f) {
  const auto typed = [&](auto value) {
    using T = decltype(value);
    return vectors ? f(value, std::integral_constant<int, 16 / sizeof(T)>{}) : f(value, std::integral_constant<int, 1>{});
  };
  return type == 0 ? typed(0.0f) : type == 1 ? typed(torch::headeronly::BFloat16{}) : typed(torch::headeronly::Half{});
}

// 0 when done. type: 0 fp32, 1 bf16, 2 fp16; sizes: N, D, L, slots, vectors, activation; pointers: x, residual, weight, bias,
// stats, and y forward, or dy, dx, dresidual, dweight, dbias.
extern "C" int run(int type, const int64_t* sizes, void** pointers, int forward, float eps) {
  Problem p{};
  p.N = sizes[0];
  p.D = sizes[1];
  p.L = sizes[2];
  p.activation = static_cast<int>(sizes[5]);
  p.eps = eps;
  p.x = pointers[0];
  p.residual = pointers[1];
  p.weight = static_cast<float*>(pointers[2]);
  p.bias = static_cast<float*>(pointers[3]);
  p.stats = static_cast<float*>(pointers[4]);
  return with_types(type, sizes[4], [&](auto value, auto vector) -> int {
    using T = decltype(value);
    constexpr int V = decltype(vector)::value;
    const auto launch = [&](int64_t blocks, auto kernel) {
      return on_host::launch(static_cast<unsigned>(blocks), kThreads, kSharedBytes<V>, [&] { kernel(p); });
    };
    const Launches cut_ = cut(p, V, sizes[3]);
    if (forward) {
      p.y = pointers[5];
      return !launch(cut_.forward, p.L == 1 ? forward_rows<T, V> : forward_planes<T, V>);
    }
    p.dy = pointers[5];
    p.dx = pointers[6];
    p.dresidual = pointers[7];
    p.dweight = static_cast<float*>(pointers[8]);
    p.dbias = static_cast<float*>(pointers[9]);
    std::vector<float> partials(p.dweight ? 2 * p.parts * p.D : 0, NAN), means(2 * p.N * p.L, NAN);
    if (p.dweight) p.partials = partials.data();
    if (cut_.wide && p.dx) {
      p.means = means.data();
      if (!launch(cut_.forward, means_of_rows<T, V>)) return 1;
    }
    if (!launch(cut_.backward, p.L == 1 ? backward_rows<T, V> : backward_planes<T, V>)) return 1;
    return p.dweight ? !launch(cut_.merge, merge) : 0;
  });
}
