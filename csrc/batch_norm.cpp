// Batch norm on the CPU, with the residual and the activation that follow it: two sweeps each way, over a dense tensor in
// either layout. Forward: x; x, residual, y. Backward: dy, x; dy, x, dx, dresidual; with a bit an element of mask beside.
// Where a cache holds all values of a channel in a split, as of an instance norm, one block has them, and its second sweep
// follows the first at once: memory is then read once.
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

namespace ssl_fast::batch_norm {
namespace {

#define SSL_FAST_WRITES_BF16
#define SSL_FAST_KERNELS "batch_norm_kernel.h"
#include "instruction_sets.h"

// Work below which a second thread is not worth its waking, and what a block should hold.
constexpr int64_t kWorthThreads = int64_t{128} << 10, kBlockBytes = int64_t{256} << 10, kMostBlocks = 64;
constexpr int64_t kLeastRows = 64, kLeastOfPlanes = 4096;  // values of a channel in a block
// Bytes of a channel's values that a cache holds until the second sweep, and as many such blocks as keep every thread busy.
// A block's x and dy, and those of the next one, which are fetched in its second sweep, fit into an L2 of 512 KiB.
constexpr int64_t kCachedBytes = int64_t{2} << 20, kCachedBlockBytes = int64_t{128} << 10, kLeastBlocks = 16;
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
// elements is then paid once for all of them. So many lines remain that merging the sums of each costs little beside.
constexpr int64_t kShortRow = 512, kLeastLines = 64;
// Planes smaller than this leave vectors empty, and sums end as soon as they begin. An image is then a row, each of its
// elements a channel, if there are images enough to sum over.
constexpr int64_t kShortPlane = 64;
// Neighbouring elements that a block has of an image at the least, which memory then reads as a stream.
constexpr int64_t kNeighbours = 1024;

void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Sets of statistics; `num_splits` of 0: one for each image.
int64_t splits_of(const Tensor& x, const Optional& stats, bool training, int64_t num_splits) {
  if (stats) return stats->size(1);
  return !training ? 1 : num_splits ? num_splits : std::max<int64_t>(x.size(0), 1);
}

// A tensor, and how it is cut into blocks.
struct Task : Problem {
  Task(const Tensor& x_, int64_t splits_, int64_t activation_, bool masked) : Problem{}, splits(splits_) {
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
    if (planes && area < kShortPlane && images >= area && (!masked || area % 8 == 0)) {  // a plane's mask ends with a byte
      planes = false;
      inner = area;
      lines = images;
      channels *= area;
    }
    if (!planes && channels % 8 == 0 && count > 0)  // a row's too
      while (channels < kShortRow && lines % 2 == 0 && lines >= 2 * kLeastLines) {
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
    // By splits, and by features where those lie apart: what has statistics of its own.
    const bool apart = planes || (inner > 1 && channels == features * inner);
    const int64_t owners = splits * (apart ? features : 1), own = bytes / std::max<int64_t>(owners, 1);
    // A plane that is all of them cannot be cut; the larger caches hold more than one at a time of few.
    if (groups > 0 && owners >= kLeastBlocks && (own <= kCachedBytes || (planes && lines == 1))) {
      groups = 1;
      lines_a_block = lines;
      const int64_t wide = std::max(kCachedBlockBytes / std::max<int64_t>(own, 1), kNeighbours / area);
      channels_a_block = apart ? inner * std::clamp<int64_t>(wide, 1, features) : channels;
    }
    parts = channels == 0 ? 0 : ceil_div(channels, channels_a_block);
  }

  int64_t blocks() const { return splits * groups * parts; }
  Block block(int64_t b) const {
    const int64_t split = b / (groups * parts), group = b / parts % groups, part_ = b % parts;
    const int64_t first_line = group * lines_a_block, first_channel = part_ * channels_a_block;
    return {split, split * lines + first_line, std::min(lines_a_block, lines - first_line), first_channel,
            std::min(channels_a_block, channels - first_channel)};
  }
  // f(k) for each channel k of a line that is feature c; the first is its home, where what is found of the feature goes.
  template <class F>
  void for_each_channel(int64_t c, const F& f) const {
    for (int64_t row = 0; row < channels; row += features * inner)
      for (int64_t i = 0; i < inner; ++i) f(row + home(c) + i);
  }
  int64_t home(int64_t c) const { return c * inner; }
  int64_t mask_bytes() const { return ceil_div(length, 8) * lines * splits * (planes ? channels : 1); }

  // f(begin, end) for ranges of blocks.
  template <class F>
  void for_blocks(const F& f) const {
    const int64_t grain = bytes < kWorthThreads ? std::max<int64_t>(blocks(), 1) : 1;
    torch::stable::parallel_for(0, blocks(), grain, f);
  }

  // f(b) for every block, the last first where what came before went from first to last.
  template <class F>
  void sweep(const F& f) const {
    for_blocks([&](int64_t begin, int64_t end) {
      for (int64_t i = end; i-- > begin;) f(block(i));
      if (stream) fence();
    });
  }

  // sum(task, block, first, second, work): what a block adds to (groups, splits, channels) arrays, two of them; and then
  // after(block).
  template <class F, class G>
  void sum_blocks(double* first, double* second, const F& sum, const G& after) const {
    Failure failure;
    for_blocks([&](int64_t begin, int64_t end) {
      failure.guard([&] {
        const Buffer<float> work(kernels().work(*this, channels_a_block));
        for (int64_t i = begin; i < end; ++i) {
          Block b = block(i);
          const int64_t at = ((i / parts % groups) * splits + b.split) * channels + b.first_channel;
          sum(*this, b, first + at, second + at, work.get());
          if (i + 1 < end) b.ahead = planes ? b.channels * length : parts > 1 ? b.channels : b.count * length;
          after(b);
        }
      });
      if (stream) fence();
    });
    failure.rethrow();
  }
  template <class F>
  void sum_blocks(double* first, double* second, const F& sum) const {
    sum_blocks(first, second, sum, [](const Block&) {});
  }

  // Sums; finish(split, first, last) with those of all blocks, for a range of features; and then(block).
  template <class F, class G, class H>
  void two_sweeps(double* first, double* second, const F& sum, const G& finish, const H& then) const {
    // A block has all values of its features, and finds them in the cache again. Its first sweep reads memory and its second
    // writes it; the next block is fetched meanwhile, or either sweep would wait for its own direction alone.
    if (groups == 1) {
      return sum_blocks(first, second, sum, [&](const Block& b) {
        finish(b.split, first_of(b), last_of(b));
        then(b);
      });
    }
    sum_blocks(first, second, sum);
    for (int64_t s = 0; s < splits; ++s) finish(s, 0, features);
    sweep(then);
  }
  // The features of a block that has all values of its own.
  int64_t first_of(const Block& b) const { return b.first_channel / inner; }
  int64_t last_of(const Block& b) const { return std::min((b.first_channel + b.channels) / inner, features); }
  int64_t size() const { return splits * channels; }  // of an array of sums

  // Whether vectors of an output start where a store past the caches may.
  void choose_stream(std::initializer_list<const void*> outputs) {
    stream = bytes >= kStreamBytes && length % kMostLanes == 0 && (planes || parts == 1 || channels_a_block % kMostLanes == 0);
    for (const void* out : outputs) stream = stream && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  }

  int64_t splits;
  int64_t features;                 // C; `channels` is a multiple where several rows or a whole image make a line
  int64_t inner = 1;                // neighbours in a line that are one feature
  int64_t count;                    // values of a feature in a split
  int64_t lines;                    // rows, or images, of a split
  int64_t bytes;
  int64_t groups, lines_a_block;    // blocks of lines in a split
  int64_t parts, channels_a_block;  // and of channels: of planes, and of images as rows
};

// The two arrays of sums of all blocks.
struct Pair {
  explicit Pair(const Task& p)
      : size(std::max<int64_t>(p.groups, 1) * p.size()), scratch(2 * size * static_cast<int64_t>(sizeof(double))),
        first(static_cast<double*>(scratch.get())), second(first + size) {}

  int64_t size;
  Scratch scratch;
  double *first, *second;
};

// Mean and sum of squares about it of `before` and of n values, by Chan's rule, into the former.
void merge(double& mean, double& m2, double before, double other_mean, double other_m2, double n) {
  const double delta = other_mean - mean, all = before + n;
  mean += delta * (n / all);
  m2 += other_m2 + delta * delta * (before * n / all);
}

// Of features [first, last) of a split, what the blocks found into their homes. Where blocks have parts of the lines, the
// features are all.
void merge_moments(const Task& p, double* mean, double* m2, int64_t split, int64_t first, int64_t last) {
  mean += split * p.channels;
  m2 += split * p.channels;
  if (p.groups == 0) {
    std::fill(mean, mean + p.channels, 0.0);
    std::fill(m2, m2 + p.channels, 0.0);
    return;
  }
  const int64_t size = p.size(), copies = p.channels / p.features;
  const double line = static_cast<double>(p.count / (p.lines * copies)), all = static_cast<double>(p.count / copies);
  for (int64_t g = 1; g < p.groups; ++g) {
    const double before = line * static_cast<double>(g * p.lines_a_block);
    const double n = line * static_cast<double>(p.block(g * p.parts).count);
    for (int64_t k = 0; k < p.channels; ++k) merge(mean[k], m2[k], before, mean[g * size + k], m2[g * size + k], n);
  }
  if (copies == 1) return;
  for (int64_t c = first; c < last; ++c) {
    double sum = 0, squares = 0;
    p.for_each_channel(c, [&](int64_t k) { sum += mean[k]; });
    const double centre = sum / static_cast<double>(copies);
    p.for_each_channel(c, [&](int64_t k) { squares += m2[k] + all * (mean[k] - centre) * (mean[k] - centre); });
    mean[p.home(c)] = centre;
    m2[p.home(c)] = squares;
  }
}

void merge_sums(const Task& p, double* sums, int64_t split, int64_t first, int64_t last) {
  sums += split * p.channels;
  if (p.groups == 0) return std::fill(sums, sums + p.channels, 0.0);
  for (int64_t g = 1; g < p.groups; ++g)
    for (int64_t k = 0; k < p.channels; ++k) sums[k] += sums[g * p.size() + k];
  if (p.channels == p.features) return;
  for (int64_t c = first; c < last; ++c) {
    double sum = 0;
    p.for_each_channel(c, [&](int64_t k) { sum += sums[k]; });
    sums[p.home(c)] = sum;
  }
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

// Of each feature, the sum of what the splits have.
std::vector<double> over_splits(const Task& p, const double* of_splits) {
  std::vector<double> sums(p.features);
  for (int64_t s = 0; s < p.splits; ++s)
    for (int64_t c = 0; c < p.features; ++c) sums[c] += of_splits[s * p.channels + p.home(c)];
  return sums;
}

void update_running(const Task& p, const double* mean, const double* m2, const Running& running) {
  if (running.count) ++*static_cast<int64_t*>(running.count->data_ptr());
  if (p.count == 0 || !(running.mean || running.var)) return;
  const double weight = running.momentum ? *running.momentum
                                         : 1.0 / static_cast<double>(*static_cast<int64_t*>(running.count->data_ptr()));
  const double unbiased = p.count > 1 ? 1.0 / static_cast<double>(p.count - 1) : std::numeric_limits<double>::quiet_NaN();
  const auto follow = [&](const Optional& values, const double* of_splits, double factor) {
    if (!values) return;
    float* const out = fp32(*values);
    const std::vector<double> sums = over_splits(p, of_splits);
    for (int64_t c = 0; c < p.features; ++c)
      out[c] = static_cast<float>(out[c] + weight * (sums[c] * factor / static_cast<double>(p.splits) - out[c]));
  };
  follow(running.mean, mean, 1.0);
  follow(running.var, m2, unbiased);
}

float inverse_deviation(double var, double eps) { return static_cast<float>(1 / std::sqrt(var + eps)); }

// The mean of a split's features [first, last), what its rounding left out, and of the biased variance what `of_variance`
// is, into (3, S, C).
template <class F>
void write_stats(const Task& p, const double* mean, const double* m2, int64_t split, int64_t first, int64_t last,
                 float* stats, const F& of_variance) {
  const int64_t plane = p.splits * p.features;
  const double n = static_cast<double>(std::max<int64_t>(p.count, 1));
  for (int64_t c = first; c < last; ++c) {
    const int64_t from = split * p.channels + p.home(c), to = split * p.features + c;
    stats[to] = static_cast<float>(mean[from]);
    stats[plane + to] = remainder(mean[from]);
    stats[2 * plane + to] = of_variance(m2[from] / n);
  }
}

// The arrays over channels that u needs, 3 or, with room for the backward's two, 5.
struct Arrays {
  Arrays(Task& p, const Optional& weight, const Optional& bias, int arrays)
      : stride(p.per.stride), buffer((arrays * p.splits + 2) * stride), w(buffer.get() + arrays * p.splits * stride),
        b(w + stride) {
    std::fill(buffer.get(), b + stride, 0.0f);
    copy_channels(weight, p.features, 1, "weight", w);
    copy_channels(bias, p.features, 0, "bias", b);
    p.per.mean = array(p, 0);
    p.per.scale = array(p, 1);
    p.per.shift = array(p, 2);
    p.per.slope = p.per.offset = p.per.shift;
  }
  float* array(const Task& p, int k) const { return buffer.get() + k * p.splits * stride; }

  // What follows from the statistics of a split's features [first, last).
  void set(const Task& p, const float* stats, int64_t split, int64_t first, int64_t last) const {
    const float *mean = stats + split * p.features, *low = mean + p.splits * p.features;
    const float* invstd = low + p.splits * p.features;
    float *const means = array(p, 0) + split * stride, *const scales = array(p, 1) + split * stride;
    float* const shifts = array(p, 2) + split * stride;
    for (int64_t c = first; c < last; ++c) {
      const float scale = w[c] * invstd[c], shift = static_cast<float>(b[c] - static_cast<double>(low[c]) * scale);
      p.for_each_channel(c, [&](int64_t k) {
        means[k] = mean[c];
        scales[k] = scale;
        shifts[k] = shift;
      });
    }
  }
  void check(const Task& p, const Tensor& stats) const {
    STD_TORCH_CHECK(stats.is_cpu() && stats.scalar_type() == ScalarType::Float && stats.is_contiguous() &&
                        stats.numel() == 3 * p.splits * p.features,
                    "batch_norm (native CPU): stats must be contiguous float32 of shape (3, S, C) on the CPU");
  }
  void set(const Task& p, const Tensor& stats) const {
    check(p, stats);
    for (int64_t s = 0; s < p.splits; ++s) set(p, fp32(stats), s, 0, p.features);
  }

  int64_t stride;
  Buffer<float> buffer;
  float *w, *b;
};

void moments_of(const Task& p, const Block& b, double* mean, double* m2, float* work) {
  kernels().moments(p, b, {mean, m2}, work);
}

// y into `out`, and the statistics unless they were given.
Tensor forward(Task& p, void* out, const Optional& residual, const Optional& weight, const Optional& bias,
               const Running& running, const Optional& given, bool training, double eps, uint8_t* new_mask) {
  check_fp32(running.mean, p.features, "running_mean");
  check_fp32(running.var, p.features, "running_var");
  const Arrays arrays(p, weight, bias, 3);
  p.residual = data(residual);
  p.y = out;
  p.new_mask = new_mask;
  const auto apply = [&](const Block& b) { kernels().apply(p, b); };
  Tensor stats = given ? empty({0}) : empty({3, p.splits, p.features});
  if (training && !given) {
    float* const found = fp32(stats);
    const Pair sums(p);
    p.two_sweeps(sums.first, sums.second, moments_of, [&](int64_t split, int64_t first, int64_t last) {
      merge_moments(p, sums.first, sums.second, split, first, last);
      write_stats(p, sums.first, sums.second, split, first, last, found,
                  [&](double var) { return inverse_deviation(var, eps); });
      arrays.set(p, found, split, first, last);
    }, apply);
    update_running(p, sums.first, sums.second, running);
    return stats;
  }
  if (!given) {
    STD_TORCH_CHECK(running.mean && running.var, "batch_norm (native CPU): no running statistics to use");
    for (int64_t c = 0; c < p.features; ++c) {
      fp32(stats)[c] = fp32(*running.mean)[c];
      fp32(stats)[p.features + c] = 0;
      fp32(stats)[2 * p.features + c] = inverse_deviation(fp32(*running.var)[c], eps);
    }
  }
  arrays.set(p, given ? *given : stats);
  p.sweep(apply);
  return stats;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_fwd(const Tensor& x, const Optional& residual, const Optional& weight,
                                                  const Optional& bias, const Optional& running_mean,
                                                  const Optional& running_var, const Optional& num_batches_tracked,
                                                  const Optional& stats, bool training, std::optional<double> momentum,
                                                  double eps, int64_t num_splits, int64_t activation, bool keep_mask) {
  Task p(x, splits_of(x, stats, training, num_splits), activation, keep_mask);
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
  Task p(x, splits_of(x, stats, training, num_splits), activation, false);
  forward(p, x.data_ptr(), residual, weight, bias, {running_mean, running_var, num_batches_tracked, momentum}, stats,
          training, eps, nullptr);
}

Tensor batch_norm_stats(const Tensor& x, int64_t num_splits) {
  const Task p(x, splits_of(x, {}, true, num_splits), kIdentity, false);
  const Pair sums(p);
  p.sum_blocks(sums.first, sums.second, moments_of);
  Tensor stats = empty({3, p.splits, p.features});
  for (int64_t s = 0; s < p.splits; ++s) {
    merge_moments(p, sums.first, sums.second, s, 0, p.features);
    write_stats(p, sums.first, sums.second, s, 0, p.features, fp32(stats), [](double var) { return static_cast<float>(var); });
  }
  return stats;
}

void sums_of(const Task& p, const Block& b, double* dz, double* dz_x, float* work) {
  kernels().sums(p, b, {dz, dz_x}, work);
}

// The sums of dz and of dz * xhat of a split's features [first, last), from those of the blocks.
void finish_sums(const Task& p, const float* stats, double* dz, double* dz_xhat, int64_t split, int64_t first, int64_t last) {
  merge_sums(p, dz, split, first, last);
  merge_sums(p, dz_xhat, split, first, last);
  const float *low = stats + (p.splits + split) * p.features, *invstd = low + p.splits * p.features;
  for (int64_t c = first; c < last; ++c) {
    const int64_t k = split * p.channels + p.home(c);
    dz_xhat[k] = invstd[c] * (dz_xhat[k] - low[c] * dz[k]);
  }
}

// The problem of a backward.
Task backward_task(const Tensor& dy, const Tensor& x, const Optional& residual, const Optional& mask, const Tensor& stats,
                   int64_t activation) {
  Task p(x, stats.size(1), activation, mask.has_value());
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
  const Arrays arrays(p, weight, bias, 3);
  arrays.set(p, stats);
  const Pair sums(p);
  p.sum_blocks(sums.first, sums.second, sums_of);
  Tensor out = empty({2, p.splits, p.features});
  for (int64_t s = 0; s < p.splits; ++s) {
    finish_sums(p, fp32(stats), sums.first, sums.second, s, 0, p.features);
    for (int64_t c = 0; c < p.features; ++c) {
      fp32(out)[s * p.features + c] = static_cast<float>(sums.first[s * p.channels + p.home(c)]);
      fp32(out)[(p.splits + s) * p.features + c] = static_cast<float>(sums.second[s * p.channels + p.home(c)]);
    }
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_bwd(const Tensor& dy, const Tensor& x, const Optional& residual,
                                                          const Optional& mask, const Optional& weight,
                                                          const Optional& bias, const Tensor& stats,
                                                          const Optional& means, bool training, int64_t activation,
                                                          bool need_dx, bool need_dresidual) {
  Task p = backward_task(dy, x, residual, mask, stats, activation);
  const Arrays arrays(p, weight, bias, 5);
  const bool at_once = !means && p.groups == 1;  // a block sets the arrays of its features, which no other has
  if (at_once)
    arrays.check(p, stats);
  else
    arrays.set(p, stats);
  check_fp32(means, 2 * p.splits * p.features, "means");
  Tensor dx = need_dx ? output_like(x) : empty({0}), dresidual = need_dresidual ? output_like(x) : empty({0});
  float *const slope = arrays.array(p, 3), *const offset = arrays.array(p, 4);
  p.batch = training;
  p.per.slope = slope;
  p.per.offset = offset;
  p.dx = need_dx ? dx.data_ptr() : nullptr;
  p.dresidual = need_dresidual ? dresidual.data_ptr() : nullptr;
  p.choose_stream({p.dx, p.dresidual});
  const auto backward = [&](const Block& b) {
    if (need_dx || need_dresidual) kernels().backward(p, b);
  };
  // From the means of dz and of dz * xhat of a channel.
  const auto set_slopes = [&](int64_t split, int64_t c, double mean_dz, double mean_dz_xhat) {
    const float *low = fp32(stats) + (p.splits + split) * p.features + c, *invstd = low + p.splits * p.features;
    const int64_t at = split * p.per.stride;
    const double scale = arrays.w[c] * *invstd, along = scale * *invstd * mean_dz_xhat;
    if (!training) return;
    p.for_each_channel(c, [&](int64_t k) {
      slope[at + k] = static_cast<float>(-along);
      offset[at + k] = static_cast<float>(along * *low - scale * mean_dz);
    });
  };
  if (means) {
    const float *const dz = fp32(*means), *const dz_xhat = dz + p.splits * p.features;
    for (int64_t s = 0; s < p.splits; ++s)
      for (int64_t c = 0; c < p.features; ++c)
        set_slopes(s, c, dz[s * p.features + c], dz_xhat[s * p.features + c]);
    p.sweep(backward);
    return {std::move(dx), std::move(dresidual), empty({0}), empty({0})};
  }
  const Pair sums(p);
  const double n = static_cast<double>(std::max<int64_t>(p.count, 1));
  const auto sum = [&](const Task&, const Block& b, double* dz, double* dz_x, float* work) {
    if (at_once) arrays.set(p, fp32(stats), b.split, p.first_of(b), p.last_of(b));
    sums_of(p, b, dz, dz_x, work);
  };
  p.two_sweeps(sums.first, sums.second, sum, [&](int64_t split, int64_t first, int64_t last) {
    finish_sums(p, fp32(stats), sums.first, sums.second, split, first, last);
    for (int64_t c = first; c < last; ++c) {
      const int64_t k = split * p.channels + p.home(c);
      set_slopes(split, c, sums.first[k] / n, sums.second[k] / n);
    }
  }, backward);
  Tensor dweight = empty({p.features}), dbias = empty({p.features});
  const std::vector<double> dz = over_splits(p, sums.first), dz_xhat = over_splits(p, sums.second);
  std::copy(dz.begin(), dz.end(), fp32(dbias));
  std::copy(dz_xhat.begin(), dz_xhat.end(), fp32(dweight));
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
