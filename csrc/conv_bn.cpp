// Batch norms folded into the layers in front of them, for a whole network: one parallel loop over the chunks of all
// weights, biases and tensors that are copied.
#include "common.h"
#include "ema_pairs.h"

#include <cmath>

namespace ssl_fast::conv_bn {
namespace {

constexpr int64_t kChunk = 8192;  // elements of one tensor that a thread takes at a time
constexpr int64_t kGrain = 4;     // chunks below which waking a second thread takes longer than it saves
constexpr int64_t kStreamBytes = 16 << 20;  // of all targets from which on they are written past the caches

// The C++ type of a dtype, for f.
template <class F>
void with_type(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Double) return f(double{});
  dispatch_float(dtype, "conv_bn_fold_", f);
}

// A vector of a norm or a layer, which may be absent.
struct Values {
  const void* at;
  ScalarType dtype;

  explicit Values(const Tensor& tensor)
      : at(tensor.numel() ? tensor.const_data_ptr() : nullptr), dtype(tensor.scalar_type()) {}
  double get(int64_t i, double absent) const {
    if (at == nullptr) return absent;
    switch (dtype) {
      case ScalarType::Double: return static_cast<const double*>(at)[i];
      case ScalarType::BFloat16: return static_cast<const BFloat16*>(at)[i];
      case ScalarType::Half: return static_cast<const Half*>(at)[i];
      default: return static_cast<const float*>(at)[i];
    }
  }
};

struct Norm {
  Values mean, var, gamma, beta;
  double eps;

  double scale(int64_t c) const { return gamma.get(c, 1) / std::sqrt(var.get(c, 0) + eps); }
};

// Where the elements of a weight lie: its channels are a dimension of any dense layout, and those of a transposed
// convolution start anew with each group of dimension 0.
struct Channels {
  int64_t run, stride, size, outer_stride, outer_size, outer_per_group;  // run: elements in a row of one channel

  Channels() = default;
  Channels(const Tensor& weight, int64_t groups) {
    const int dim = groups > 0 ? 1 : 0;
    size = weight.size(dim);
    stride = size == 1 ? std::max<int64_t>(weight.numel(), 1) : weight.stride(dim);
    outer_size = weight.size(0);
    outer_stride = outer_size == 1 ? std::max<int64_t>(weight.numel(), 1) : weight.stride(0);
    outer_per_group = groups > 0 ? outer_size / groups : outer_size;
    run = groups > 1 ? std::min(stride, outer_stride * (outer_stride < stride ? outer_per_group : 1)) : stride;
  }
  int64_t of(int64_t i) const {
    return i / stride % size + i / outer_stride % outer_size / outer_per_group * size;
  }
};

struct Row {
  enum Kind { kWeight, kBias, kCopy } kind;
  void* target;
  Values source;
  int64_t numel;
  ScalarType dtype;  // of the target
  const Norm* norm;
  Channels channels;
};

// Products in fp64, rounded to fp32 and then to T as a cast does it. Baseline x86-64 has less than
// half of AVX2's pace, and no conversions of fp16.
#if defined(__x86_64__)
SSL_FAST_TARGET_BEGIN("avx2,f16c")
namespace avx2 {

inline __m256 product(__m256 x, __m256d scale) {
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(x)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
  return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_mul_pd(high, scale)), _mm256_cvtpd_ps(_mm256_mul_pd(low, scale)));
}

inline __m256 load(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

template <bool kStream>
void store(float* p, __m256 v) {
  kStream ? _mm256_stream_ps(p, v) : _mm256_storeu_ps(p, v);
}
template <bool kStream>
void store(Half* p, __m256 v) {
  auto* const at = reinterpret_cast<__m128i*>(p);
  kStream ? _mm_stream_si128(at, _mm256_cvtps_ph(v, 0)) : _mm_storeu_si128(at, _mm256_cvtps_ph(v, 0));
}

template <bool kStream, class T>
int64_t scale_vectors(T* to, const T* from, int64_t count, double scale) {
  const __m256d s = _mm256_set1_pd(scale);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) store<kStream>(to + i, product(load(from + i), s));
  return i;
}

// How many elements were scaled, a multiple of 8.
template <class T>
int64_t scale_run(T* to, const T* from, int64_t count, double scale, bool stream) {
  const bool aligned = reinterpret_cast<uintptr_t>(to) % (8 * sizeof(T)) == 0;
  return stream && aligned ? scale_vectors<true>(to, from, count, scale) : scale_vectors<false>(to, from, count, scale);
}

}  // namespace avx2
SSL_FAST_TARGET_END
#endif

template <class T, class S>
void scale_run(T* to, const S* from, int64_t count, double scale, bool stream) {
  int64_t i = 0;
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, S> && (std::is_same_v<T, float> || std::is_same_v<T, Half>)) {
    static const bool wide = std::min(cpu_capability(), detected_capability()) >= Capability::kAVX2;
    if (wide) i = avx2::scale_run(to, from, count, scale, stream);
  }
#endif
  for (; i < count; ++i) to[i] = static_cast<T>(static_cast<double>(from[i]) * scale);
}

// Elements begin to end of a row. stream: past the caches.
void fold(const Row& row, int64_t begin, int64_t end, bool stream) {
  with_type(row.dtype, [&](auto t) {
    auto* to = static_cast<decltype(t)*>(row.target);
    if (row.kind == Row::kBias) {
      const Norm& norm = *row.norm;
      for (int64_t c = begin; c < end; ++c)
        to[c] = static_cast<decltype(t)>((row.source.get(c, 0) - norm.mean.get(c, 0)) * norm.scale(c) +
                                         norm.beta.get(c, 0));
      return;
    }
    with_type(row.source.dtype, [&](auto s) {
      const auto* from = static_cast<const decltype(s)*>(row.source.at);
      if (row.kind == Row::kCopy) return scale_run(to + begin, from + begin, end - begin, 1, stream);
      for (int64_t i = begin; i < end;) {
        const int64_t stop = std::min((i / row.channels.run + 1) * row.channels.run, end);
        scale_run(to + i, from + i, stop - i, row.norm->scale(row.channels.of(i)), stream);
        i = stop;
      }
    });
  });
}

void conv_bn_fold_(std::vector<Tensor> targets, std::vector<Tensor> sources, std::vector<Tensor> norms,
                   std::vector<double> eps, std::vector<int64_t> groups) {
  const size_t pairs = eps.size();
  STD_TORCH_CHECK(targets.size() == sources.size() && targets.size() >= 2 * pairs && norms.size() == 4 * pairs &&
                      groups.size() == pairs,
                  "conv_bn_fold_: ", targets.size(), " targets, ", sources.size(), " sources, ", norms.size(),
                  " vectors of norms, ", pairs, " eps, ", groups.size(), " groups");
  std::vector<Norm> found;
  found.reserve(pairs);
  for (size_t i = 0; i < pairs; ++i) {
    const Tensor* const norm = &norms[4 * i];
    const Tensor& weight = targets[i];
    STD_TORCH_CHECK(weight.dim() >= 2 && groups[i] >= 0 && (groups[i] == 0 || weight.size(0) % groups[i] == 0),
                    "conv_bn_fold_: a weight of ", weight.dim(), " dimensions, groups ", groups[i], "; pair ", i);
    const int64_t channels = groups[i] ? groups[i] * weight.size(1) : weight.size(0);
    for (const Tensor* t : std::initializer_list<const Tensor*>{&norm[0], &norm[1], &norm[2], &norm[3],
                                                                &sources[pairs + i], &targets[pairs + i]}) {
      const bool absent = t->numel() == 0 && t != &norm[0] && t != &norm[1] && t != &targets[pairs + i];
      STD_TORCH_CHECK(t->is_cpu() && t->is_contiguous() && (absent || t->numel() == channels),
                      "conv_bn_fold_: a vector of ", t->numel(), " for ", channels, " channels; pair ", i);
      with_type(t->scalar_type(), [](auto) {});
    }
    found.push_back({Values(norm[0]), Values(norm[1]), Values(norm[2]), Values(norm[3]), eps[i]});
  }
  std::vector<Row> rows;
  std::vector<int64_t> first{0};  // the number of each row's first chunk
  for (size_t i = 0; i < targets.size(); ++i) {
    const Tensor &target = targets[i], &source = sources[i];
    const Row::Kind kind = i < pairs ? Row::kWeight : i < 2 * pairs ? Row::kBias : Row::kCopy;
    STD_TORCH_CHECK(target.is_cpu() && source.is_cpu() && ema::dense(target) &&
                        (kind == Row::kBias || (ema::same_shape(target, source) && ema::same_strides(target, source))),
                    "conv_bn_fold_: target ", i, " is not dense, or differs from its source in shape or strides");
    Row row{kind, target.mutable_data_ptr(), Values(source), target.numel(), target.scalar_type(),
            kind == Row::kCopy ? nullptr : &found[i % pairs], kind == Row::kWeight ? Channels(target, groups[i]) : Channels()};
    if (kind == Row::kCopy && target.scalar_type() == source.scalar_type()) {
      row.numel *= static_cast<int64_t>(target.element_size());
      row.dtype = ScalarType::Byte;
    } else {
      with_type(target.scalar_type(), [](auto) {});
      with_type(source.scalar_type(), [](auto) {});
    }
    rows.push_back(row);
    first.push_back(first.back() + ceil_div(row.numel, kChunk));
  }
  int64_t bytes = 0;
  for (const Tensor& target : targets) bytes += target.numel() * static_cast<int64_t>(target.element_size());
  const bool stream = bytes >= kStreamBytes;
  torch::stable::parallel_for(0, first.back(), kGrain, [&](int64_t begin, int64_t end) {
    int64_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t chunk = begin; chunk < end; ++i) {
      for (; chunk < std::min(first[i + 1], end); ++chunk) {
        const int64_t from = (chunk - first[i]) * kChunk, to = std::min(from + kChunk, rows[i].numel);
        if (rows[i].dtype == ScalarType::Byte) {
          std::memcpy(static_cast<char*>(rows[i].target) + from, static_cast<const char*>(rows[i].source.at) + from,
                      to - from);
        } else {
          fold(rows[i], from, to, stream);
        }
      }
    }
#if defined(__x86_64__)
    if (stream) _mm_sfence();
#endif
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ssl_fast_native, CPU, m) {
  m.impl("conv_bn_fold_", TORCH_BOX(&conv_bn_fold_));
}

}  // namespace ssl_fast::conv_bn
