// Batch norm on the CPU, with the residual and the activation that follow it: two sweeps each way, over a dense tensor in
// either layout. Forward: x; x, residual, y. Backward: dy, x; dy, x, dx, dresidual; with a bit an element of mask beside.
//
// Statistics are (3, S, C): the mean, what rounding it to fp32 left out, and 1 / sqrt(var + eps). x - mean is exact for x
// near the mean, however large that is, so
//   scale = weight * invstd     shift = bias - low * scale     u = (x - mean) * scale + shift
#include "batch_norm.h"

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"

#define SSL_FAST_LAMBDA __attribute__((always_inline))
#define SSL_FAST_UNROLL _Pragma("GCC unroll 16")

namespace ssl_fast::batch_norm {
namespace {

#define SSL_FAST_LANES 4
namespace portable {
#include "simd.h"
#include "simd_types.h"
#include "activations_simd.h"
#include "batch_norm_kernel.h"
}  // namespace portable
#undef SSL_FAST_LANES

#if defined(__x86_64__)
#define SSL_FAST_LANES 8
#define SSL_FAST_X86_LANES 8
SSL_FAST_TARGET_BEGIN("avx2,fma,f16c")
namespace avx2 {
#include "simd.h"
#include "simd_types.h"
#include "activations_simd.h"
#include "batch_norm_kernel.h"
}  // namespace avx2
SSL_FAST_TARGET_END
#undef SSL_FAST_X86_LANES
#undef SSL_FAST_LANES

#define SSL_FAST_LANES 16
#define SSL_FAST_X86_LANES 16
SSL_FAST_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 {
#include "simd.h"
#include "simd_types.h"
#include "activations_simd.h"
#include "batch_norm_kernel.h"
}  // namespace avx512
SSL_FAST_TARGET_END
#undef SSL_FAST_X86_LANES
#undef SSL_FAST_LANES
#endif

const Kernels& kernels() {
#if defined(__x86_64__)
  const Capability capability = std::min(cpu_capability(), detected_capability());
  if (capability >= Capability::kAVX512) return avx512::kKernels;
  if (capability >= Capability::kAVX2) return avx2::kKernels;
#endif
  return portable::kKernels;
}

// Work below which a second thread is not worth its waking, and what a block should hold.
constexpr int64_t kWorthThreads = int64_t{128} << 10, kBlockBytes = int64_t{256} << 10, kMostBlocks = 64;
constexpr int64_t kLeastRows = 64, kLeastOfPlanes = 4096;  // values of a channel in a block
// Outputs that no cache would hold until they are read are written past the caches.
constexpr int64_t kStreamBytes = int64_t{32} << 20;
constexpr int64_t kMostLanes = 16;

using Optional = std::optional<Tensor>;

const void* data(const Optional& tensor) { return tensor ? tensor->data_ptr() : nullptr; }

// A (C,) tensor of any floating dtype as fp32; `missing` where there is none.
void copy_channels(const Optional& values, int64_t channels, float missing, const char* name, float* out) {
  if (!values) {
    std::fill(out, out + channels, missing);
    return;
  }
  STD_TORCH_CHECK(values->is_cpu() && values->dim() == 1 && values->size(0) == channels, "batch_norm (native CPU): ", name,
                  " must have shape (", channels, ",) on the CPU");
  const int64_t stride = values->stride(0);
  const auto copy = [&](auto zero) {
    const auto* from = static_cast<const decltype(zero)*>(values->data_ptr());
    for (int64_t c = 0; c < channels; ++c) out[c] = static_cast<float>(from[c * stride]);
  };
  if (values->scalar_type() == ScalarType::Double) return copy(double{});
  dispatch_float(values->scalar_type(), "batch_norm", copy);
}

// Rows shorter than this are taken several at a time, as rows of so many more channels: what a line costs beside its
// elements is then paid once for all of them.
constexpr int64_t kShortRow = 512;

// A tensor, and how it is cut into blocks.
struct Task : Problem {
  Task(const Tensor& x_, int64_t splits_, int64_t activation_) : Problem{}, splits(splits_) {
    STD_TORCH_CHECK(x_.is_cpu() && x_.dim() >= 2 && splits >= 1 && x_.size(0) % splits == 0,
                    "batch_norm (native CPU): x must be (N, C, ...) on the CPU, N a multiple of num_splits");
    dtype = x_.scalar_type();
    x = x_.data_ptr();
    activation = activation_;
    channels = features = x_.size(1);
    int64_t area = 1;
    for (int64_t d = 2; d < x_.dim(); ++d) area *= x_.size(d);
    planes = area != 1 && (channels == 1 || x_.stride(1) != 1);
    const int64_t images = x_.size(0) / splits;
    count = images * area;
    lines = planes ? images : count;
    if (!planes && features % 8 == 0 && count > 0)  // a row's mask ends with a byte
      while (channels < kShortRow && lines % 2 == 0) {
        channels *= 2;
        lines /= 2;
      }
    length = part = planes ? area : channels;
    bytes = x_.numel() * static_cast<int64_t>(x_.element_size());
    per.stride = round_up(std::max<int64_t>(channels, 1), kMostLanes);

    const int64_t wanted = std::clamp<int64_t>(bytes / kBlockBytes / splits, 1, std::max<int64_t>(1, kMostBlocks / splits));
    const int64_t least = planes ? ceil_div(kLeastOfPlanes, std::max<int64_t>(area, 1)) : kLeastRows;
    groups = std::clamp<int64_t>(lines / least, 1, wanted);
    lines_a_block = std::max<int64_t>(1, ceil_div(lines, groups));
    groups = count == 0 || features == 0 ? 0 : ceil_div(lines, lines_a_block);
    channels_a_block = planes ? std::max<int64_t>(1, ceil_div(channels, ceil_div(wanted, std::max<int64_t>(groups, 1)))) : channels;
    parts = channels == 0 ? 0 : ceil_div(channels, channels_a_block);
  }

  int64_t blocks() const { return splits * groups * parts; }
  Block block(int64_t b) const {
    const int64_t split = b / (groups * parts), group = b / parts % groups, part_ = b % parts;
    const int64_t first_line = group * lines_a_block, first_channel = part_ * channels_a_block;
    return {split, split * lines + first_line, std::min(lines_a_block, lines - first_line), first_channel,
            std::min(channels_a_block, channels - first_channel)};
  }
  int64_t mask_bytes() const { return ceil_div(length, 8) * lines * splits * (planes ? channels : 1); }

  // f(b) for every block; the last first where what came before went from first to last.
  template <class F>
  void for_each_block(const F& f) const {
    const int64_t grain = bytes < kWorthThreads ? std::max<int64_t>(blocks(), 1) : 1;
    torch::stable::parallel_for(0, blocks(), grain, [&](int64_t begin, int64_t end) { f(begin, end); });
  }

  // Sums of the blocks into (groups, splits, channels) arrays of doubles, two of them.
  template <class F>
  void sum_blocks(double* first, double* second, const F& f) const {
    Failure failure;
    for_each_block([&](int64_t begin, int64_t end) {
      failure.guard([&] {
        const Buffer<float> work(kernels().work(*this, channels_a_block));
        for (int64_t i = begin; i < end; ++i) {
          const Block b = block(i);
          const int64_t at = ((i / parts % groups) * splits + b.split) * channels + b.first_channel;
          f(b, first + at, second + at, work.get());
        }
      });
    });
    failure.rethrow();
  }
  int64_t sums_size() const { return std::max<int64_t>(groups, 1) * splits * channels; }
  int64_t size() const { return splits * features; }  // of an array (S, C)

  // Whether vectors of an output start where a store past the caches may.
  void choose_stream(std::initializer_list<const void*> outputs) {
    stream = bytes >= kStreamBytes && length % kMostLanes == 0;
    for (const void* out : outputs) stream = stream && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  }

  int64_t splits;
  int64_t features;                 // C; `channels` is a multiple where several rows make a line
  int64_t count;                    // values of a feature in a split
  int64_t lines;                    // rows, or images, of a split
  int64_t bytes;
  int64_t groups, lines_a_block;    // blocks of lines in a split
  int64_t parts, channels_a_block;  // and of channels
};

void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Mean and sum of squares about it of `before` and of n values, by Chan's rule, into the former.
void merge(double& mean, double& m2, double before, double other_mean, double other_m2, double n) {
  const double delta = other_mean - mean, all = before + n;
  mean += delta * (n / all);
  m2 += other_m2 + delta * delta * (before * n / all);
}

// (S, C) each, from the arrays of the blocks, over which they come to lie.
void merge_moments(const Task& p, double* mean, double* m2) {
  if (p.groups == 0) {
    std::fill(mean, mean + p.size(), 0.0);
    std::fill(m2, m2 + p.size(), 0.0);
    return;
  }
  const int64_t size = p.splits * p.channels, rows = p.channels / p.features;
  const double line = static_cast<double>(p.count / (p.lines * rows)), all = static_cast<double>(p.count / rows);
  for (int64_t g = 1; g < p.groups; ++g) {
    const double before = line * static_cast<double>(g * p.lines_a_block);
    const double n = line * static_cast<double>(p.block(g * p.parts).count);
    for (int64_t k = 0; k < size; ++k) merge(mean[k], m2[k], before, mean[g * size + k], m2[g * size + k], n);
  }
  for (int64_t s = 0; s < p.splits; ++s)
    for (int64_t c = 0; c < p.features; ++c) {
      const int64_t from = s * p.channels + c, to = s * p.features + c;
      double m = mean[from], q = m2[from];
      for (int64_t r = 1; r < rows; ++r) {
        const int64_t other = from + r * p.features;
        merge(m, q, all * static_cast<double>(r), mean[other], m2[other], all);
      }
      mean[to] = m;
      m2[to] = q;
    }
}

void merge_sums(const Task& p, double* sums) {
  if (p.groups == 0) return std::fill(sums, sums + p.size(), 0.0);
  const int64_t size = p.splits * p.channels;
  for (int64_t g = 1; g < p.groups; ++g)
    for (int64_t k = 0; k < size; ++k) sums[k] += sums[g * size + k];
  for (int64_t s = 0; s < p.splits; ++s)
    for (int64_t c = 0; c < p.features; ++c) {
      double sum = 0;
      for (int64_t k = c; k < p.channels; k += p.features) sum += sums[s * p.channels + k];
      sums[s * p.features + c] = sum;
    }
}

void moments(const Task& p, double* mean, double* m2) {
  p.sum_blocks(mean, m2, [&](const Block& b, double* mean_b, double* m2_b, float* work) {
    kernels().moments(p, b, {mean_b, m2_b}, work);
  });
  merge_moments(p, mean, m2);
}

float* fp32(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

void check_fp32(const Optional& tensor, int64_t numel, const char* name) {
  STD_TORCH_CHECK(!tensor || (tensor->is_cpu() && tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous() &&
                              tensor->numel() == numel),
                  "batch_norm (native CPU): ", name, " must be contiguous float32 of ", numel, " elements on the CPU");
}

// ---- operators

struct Running {
  const Optional &mean, &var, &count;
  std::optional<double> momentum;
};

// What a float leaves out of a double.
float remainder(double value) { return static_cast<float>(value - static_cast<float>(value)); }

void update_running(const Task& p, const double* mean, const double* m2, const Running& running) {
  if (running.count) ++*static_cast<int64_t*>(running.count->data_ptr());
  if (p.count == 0 || !(running.mean || running.var)) return;
  const double weight = running.momentum ? *running.momentum
                                         : 1.0 / static_cast<double>(*static_cast<int64_t*>(running.count->data_ptr()));
  const double unbiased = p.count > 1 ? 1.0 / static_cast<double>(p.count - 1) : std::numeric_limits<double>::quiet_NaN();
  const auto follow = [&](const Optional& values, const double* of_splits, double factor) {
    if (!values) return;
    float* const out = fp32(*values);
    for (int64_t c = 0; c < p.features; ++c) {
      double sum = 0;
      for (int64_t s = 0; s < p.splits; ++s) sum += of_splits[s * p.features + c];
      out[c] = static_cast<float>(out[c] + weight * (sum * factor / static_cast<double>(p.splits) - out[c]));
    }
  };
  follow(running.mean, mean, 1.0);
  follow(running.var, m2, unbiased);
}

// (3, S, C), of the batch or the running ones.
void compute_stats(const Task& p, bool training, double eps, const Running& running, float* stats) {
  const int64_t size = p.size();
  if (!training) {
    STD_TORCH_CHECK(running.mean && running.var, "batch_norm (native CPU): no running statistics to use");
    for (int64_t c = 0; c < p.features; ++c) {
      stats[c] = fp32(*running.mean)[c];
      stats[size + c] = 0;
      stats[2 * size + c] = static_cast<float>(1 / std::sqrt(fp32(*running.var)[c] + eps));
    }
    return;
  }
  const Scratch scratch(2 * p.sums_size() * static_cast<int64_t>(sizeof(double)));
  double *const mean = static_cast<double*>(scratch.get()), *const m2 = mean + p.sums_size();
  moments(p, mean, m2);
  const double n = static_cast<double>(std::max<int64_t>(p.count, 1));
  for (int64_t k = 0; k < size; ++k) {
    stats[k] = static_cast<float>(mean[k]);
    stats[size + k] = remainder(mean[k]);
    stats[2 * size + k] = static_cast<float>(1 / std::sqrt(m2[k] / n + eps));
  }
  update_running(p, mean, m2, running);
}

// The arrays over channels that u needs, 3 or, with room for the backward's two, 5.
struct Arrays {
  Arrays(Task& p, const Tensor& stats, const Optional& weight, const Optional& bias, int arrays)
      : stride(p.per.stride), buffer(arrays * p.splits * stride + 2 * stride) {
    STD_TORCH_CHECK(stats.is_cpu() && stats.scalar_type() == ScalarType::Float && stats.is_contiguous() &&
                        stats.numel() == 3 * p.size(),
                    "batch_norm (native CPU): stats must be contiguous float32 of shape (3, S, C) on the CPU");
    std::fill(buffer.get(), buffer.get() + arrays * p.splits * stride + 2 * stride, 0.0f);
    float *const w = buffer.get() + arrays * p.splits * stride, *const b = w + stride;
    copy_channels(weight, p.features, 1, "weight", w);
    copy_channels(bias, p.features, 0, "bias", b);
    const float *mean = fp32(stats), *low = mean + p.size(), *invstd = low + p.size();
    for (int64_t s = 0; s < p.splits; ++s)
      for (int64_t k = 0; k < p.channels; ++k) {
        const int64_t c = k % p.features, from = s * p.features + c, to = s * stride + k;
        const float scale = w[c] * invstd[from];
        array(p, 0)[to] = mean[from];
        array(p, 1)[to] = scale;
        array(p, 2)[to] = static_cast<float>(b[c] - static_cast<double>(low[from]) * scale);
      }
    p.per.mean = array(p, 0);
    p.per.scale = array(p, 1);
    p.per.shift = array(p, 2);
    p.per.slope = p.per.offset = p.per.shift;
  }
  float* array(const Task& p, int k) const { return buffer.get() + k * p.splits * stride; }

  int64_t stride;
  Buffer<float> buffer;
};

// y into `out`, and the statistics unless they were given.
Tensor forward(Task& p, void* out, const Optional& residual, const Optional& weight, const Optional& bias,
               const Running& running, const Optional& given, bool training, double eps, uint8_t* new_mask) {
  check_fp32(running.mean, p.features, "running_mean");
  check_fp32(running.var, p.features, "running_var");
  Tensor stats = given ? empty({0}) : empty({3, p.splits, p.features});
  if (!given) compute_stats(p, training, eps, running, fp32(stats));
  const Arrays arrays(p, given ? *given : stats, weight, bias, 3);
  p.residual = data(residual);
  p.y = out;
  p.new_mask = new_mask;
  p.for_each_block([&](int64_t begin, int64_t end) {
    for (int64_t b = end; b-- > begin;) kernels().apply(p, p.block(b));
    if (p.stream) fence();
  });
  return stats;
}

int64_t splits_of(const Optional& stats, bool training, int64_t num_splits) {
  return stats ? stats->size(1) : training ? num_splits : 1;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_fwd(const Tensor& x, const Optional& residual, const Optional& weight,
                                                  const Optional& bias, const Optional& running_mean,
                                                  const Optional& running_var, const Optional& num_batches_tracked,
                                                  const Optional& stats, bool training, std::optional<double> momentum,
                                                  double eps, int64_t num_splits, int64_t activation, bool keep_mask) {
  Task p(x, splits_of(stats, training, num_splits), activation);
  Tensor y = output_like(x);
  Tensor mask = empty({keep_mask ? p.mask_bytes() : 0}, aoti_torch_dtype_uint8());
  p.choose_stream({y.data_ptr()});
  Tensor own = forward(p, y.data_ptr(), residual, weight, bias, {running_mean, running_var, num_batches_tracked, momentum},
                       stats, training, eps, keep_mask ? static_cast<uint8_t*>(mask.data_ptr()) : nullptr);
  return {std::move(y), std::move(own), std::move(mask)};
}

void batch_norm_inplace(Tensor x, const Optional& residual, const Optional& weight, const Optional& bias,
                        const Optional& running_mean, const Optional& running_var, const Optional& num_batches_tracked,
                        const Optional& stats, bool training, std::optional<double> momentum, double eps,
                        int64_t num_splits, int64_t activation) {
  Task p(x, splits_of(stats, training, num_splits), activation);
  forward(p, x.data_ptr(), residual, weight, bias, {running_mean, running_var, num_batches_tracked, momentum}, stats,
          training, eps, nullptr);
}

Tensor batch_norm_stats(const Tensor& x, int64_t num_splits) {
  const Task p(x, num_splits, kIdentity);
  const int64_t size = p.size();
  const Scratch scratch(2 * p.sums_size() * static_cast<int64_t>(sizeof(double)));
  double *const mean = static_cast<double*>(scratch.get()), *const m2 = mean + p.sums_size();
  moments(p, mean, m2);
  Tensor stats = empty({3, p.splits, p.features});
  for (int64_t k = 0; k < size; ++k) {
    fp32(stats)[k] = static_cast<float>(mean[k]);
    fp32(stats)[size + k] = remainder(mean[k]);
    fp32(stats)[2 * size + k] = static_cast<float>(m2[k] / static_cast<double>(std::max<int64_t>(p.count, 1)));
  }
  return stats;
}

// Sums of dz and of dz * xhat, (S, C) each.
void compute_sums(const Task& p, const float* stats, double* dz, double* dz_xhat) {
  p.sum_blocks(dz, dz_xhat, [&](const Block& b, double* dz_b, double* dz_x_b, float* work) {
    kernels().sums(p, b, {dz_b, dz_x_b}, work);
  });
  merge_sums(p, dz);
  merge_sums(p, dz_xhat);
  const int64_t size = p.size();
  for (int64_t k = 0; k < size; ++k) dz_xhat[k] = stats[2 * size + k] * (dz_xhat[k] - stats[size + k] * dz[k]);
}

// The problem of a backward.
Task backward_task(const Tensor& dy, const Tensor& x, const Optional& residual, const Optional& mask, const Tensor& stats,
                   int64_t activation) {
  Task p(x, stats.size(1), activation);
  STD_TORCH_CHECK(dy.is_cpu() && dy.scalar_type() == p.dtype && dy.numel() == x.numel(),
                  "batch_norm (native CPU): dy must have x's shape, layout and dtype");
  STD_TORCH_CHECK(!mask || mask->numel() == p.mask_bytes(), "batch_norm (native CPU): mask has another size");
  p.dy = dy.data_ptr();
  p.residual = data(residual);
  p.mask = static_cast<const uint8_t*>(data(mask));
  return p;
}

Tensor batch_norm_sums(const Tensor& dy, const Tensor& x, const Optional& residual, const Optional& mask,
                       const Optional& weight, const Optional& bias, const Tensor& stats, int64_t activation) {
  Task p = backward_task(dy, x, residual, mask, stats, activation);
  const Arrays arrays(p, stats, weight, bias, 3);
  const int64_t size = p.size();
  const Scratch scratch(2 * p.sums_size() * static_cast<int64_t>(sizeof(double)));
  double *const dz = static_cast<double*>(scratch.get()), *const dz_xhat = dz + p.sums_size();
  compute_sums(p, fp32(stats), dz, dz_xhat);
  Tensor out = empty({2, p.splits, p.features});
  for (int64_t k = 0; k < size; ++k) {
    fp32(out)[k] = static_cast<float>(dz[k]);
    fp32(out)[size + k] = static_cast<float>(dz_xhat[k]);
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_bwd(const Tensor& dy, const Tensor& x, const Optional& residual,
                                                          const Optional& mask, const Optional& weight,
                                                          const Optional& bias, const Tensor& stats,
                                                          const Optional& means, bool training, int64_t activation,
                                                          bool need_dx, bool need_dresidual) {
  Task p = backward_task(dy, x, residual, mask, stats, activation);
  const Arrays arrays(p, stats, weight, bias, 5);
  const int64_t size = p.size();
  check_fp32(means, 2 * size, "means");
  const Scratch scratch(2 * p.sums_size() * static_cast<int64_t>(sizeof(double)));
  double *const dz = static_cast<double*>(scratch.get()), *const dz_xhat = dz + p.sums_size();
  Tensor dweight = empty({means ? 0 : p.features}), dbias = empty({means ? 0 : p.features});
  if (means) {
    for (int64_t k = 0; k < size; ++k) {
      dz[k] = fp32(*means)[k];
      dz_xhat[k] = fp32(*means)[size + k];
    }
  } else {
    compute_sums(p, fp32(stats), dz, dz_xhat);
    const double n = static_cast<double>(std::max<int64_t>(p.count, 1));
    for (int64_t c = 0; c < p.features; ++c) {
      double sum = 0, sum_xhat = 0;
      for (int64_t k = c; k < size; k += p.features) {
        sum += dz[k];
        sum_xhat += dz_xhat[k];
        dz[k] /= n;
        dz_xhat[k] /= n;
      }
      fp32(dbias)[c] = static_cast<float>(sum);
      fp32(dweight)[c] = static_cast<float>(sum_xhat);
    }
  }
  Tensor dx = need_dx ? output_like(x) : empty({0}), dresidual = need_dresidual ? output_like(x) : empty({0});
  if (!need_dx && !need_dresidual) return {std::move(dx), std::move(dresidual), std::move(dweight), std::move(dbias)};
  float *const slope = arrays.array(p, 3), *const offset = arrays.array(p, 4);
  const float *low = fp32(stats) + size, *invstd = low + size;
  for (int64_t s = 0; training && s < p.splits; ++s)
    for (int64_t k = 0; k < p.channels; ++k) {
      const int64_t from = s * p.features + k % p.features, to = s * p.per.stride + k;
      const double scale = p.per.scale[to], along = scale * invstd[from] * dz_xhat[from];
      slope[to] = static_cast<float>(-along);
      offset[to] = static_cast<float>(along * low[from] - scale * dz[from]);
    }
  p.batch = training;
  p.per.slope = slope;
  p.per.offset = offset;
  p.dx = need_dx ? dx.data_ptr() : nullptr;
  p.dresidual = need_dresidual ? dresidual.data_ptr() : nullptr;
  p.choose_stream({p.dx, p.dresidual});
  p.for_each_block([&](int64_t begin, int64_t end) {
    for (int64_t b = end; b-- > begin;) kernels().backward(p, p.block(b));
    if (p.stream) fence();
  });
  return {std::move(dx), std::move(dresidual), std::move(dweight), std::move(dbias)};
}

STABLE_TORCH_LIBRARY_IMPL(ssl_fast_native, CPU, m) {
  m.impl("batch_norm_fwd", TORCH_BOX(&batch_norm_fwd));
  m.impl("batch_norm_", TORCH_BOX(&batch_norm_inplace));
  m.impl("batch_norm_stats", TORCH_BOX(&batch_norm_stats));
  m.impl("batch_norm_sums", TORCH_BOX(&batch_norm_sums));
  m.impl("batch_norm_bwd", TORCH_BOX(&batch_norm_bwd));
}

}  // namespace
}  // namespace ssl_fast::batch_norm
