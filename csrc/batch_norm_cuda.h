// Batch norm on a GPU, both ways: the kernels behind batch_norm.cu.
//
// Plain C++ wherever mma.h's instructions and CUDA's built-ins have a stand-in: the tests run the same code on the host.
//
// Memory is rows of `width` numbers: of channels (channels_last, or (N, C)), or planes, one row for each image and channel.
// A unit is a piece of a row that kX threads read side by side, V numbers each. With channels innermost a block of threads
// owns one piece of every row, and units are rows; else it owns one channel, and each of its planes is `pieces` units. The
// units of a channel block are cut into parts, for each split of the batch, and one thread block has one part.
//
// A kernel has two phases: it leaves a partial for each part, then merges those of its channels, in order, and writes. Two
// launches have a phase each, the second with its parts and chunks in reverse, so that it finds in the L2 cache what the
// first read last. Where all of x (and dy) fits into the shared memory of the chip one cooperative launch has both, and
// reads x once. Where a block has all of its channels' numbers in a split, as of an instance norm, it needs no other: one
// launch of any size has both, and finds in shared memory, or in a cache, what it read before. What takes the partials of
// all splits, running statistics and the gradients for weight and bias, then has a small launch of its own.
#pragma once

#include <cmath>
#include <cstdint>

namespace ssl_fast::batch_norm {

constexpr int kThreads = 384, kWarps = kThreads / 32;
constexpr unsigned kWarp = 0xffffffff;
constexpr float kNegativeSlope = 0.01f;

enum Activation { kIdentity, kRelu, kLeakyRelu, kSilu, kGelu };  // as the home page numbers them
enum Phases {
  kReduce = 1,
  kWrite = 2,
  kKept = 4,    // vectors stay in shared memory from one to the other
  kAlone = 8,   // no block needs another, but for all splits' partials
  kMerge = 16,  // of kWrite, what is not of x's size
  kResident = kReduce | kWrite | kKept,
};

template <class T, int V>
struct alignas(V * sizeof(T)) Pack {
  T x[V];
};

constexpr int kMostParts = 128;  // every block reads the partials of its channels

struct Shape {
  int64_t batch, channels, positions;
  bool inner;  // channels innermost
};

struct Cut {
  int64_t channels, units;  // units of a channel block, in a split
  int64_t chunks_per_part;
  int width, blocks, splits, parts, pieces;

  C10_HOST_DEVICE int grid() const { return blocks * splits * parts; }
};

// Mean, what its rounding left out, and the squared deviations of n numbers.
struct Moments {
  float mean = 0, low = 0, squares = 0, n = 0;

  // Chan, Golub & LeVeque's rule.
  __device__ void merge(const Moments& other) {
    if (other.n == 0) return;
    if (n == 0) {
      *this = other;
      return;
    }
    const float total = n + other.n, share = other.n / total;
    const float apart = (other.mean - mean) + (other.low - low), shift = low + apart * share;
    squares += other.squares + apart * apart * n * share;
    move(shift);
    n = total;
  }

  __device__ void move(float shift) {
    const float moved = mean + shift;
    low = (mean - moved) + shift;
    mean = moved;
  }
};

struct Sums {
  float dz = 0, moment = 0;  // of the gradient for u, and of it times the deviation

  __device__ void merge(const Sums& other) {
    dz += other.dz;
    moment += other.moment;
  }
};

__device__ inline Moments other_lane(const Moments& m, int lanes) {
  return {__shfl_xor_sync(kWarp, m.mean, lanes), __shfl_xor_sync(kWarp, m.low, lanes),
          __shfl_xor_sync(kWarp, m.squares, lanes), __shfl_xor_sync(kWarp, m.n, lanes)};
}

__device__ inline Sums other_lane(const Sums& s, int lanes) {
  return {__shfl_xor_sync(kWarp, s.dz, lanes), __shfl_xor_sync(kWarp, s.moment, lanes)};
}

__device__ inline float normal_cdf(float u) { return 0.5f * (1 + std::erf(u * 0.70710678f)); }

// What an activation that depends on the sign multiplies the negative side by; 1 for none.
__device__ inline float slope_of(int activation) {
  return activation == kIdentity ? 1.0f : activation == kRelu ? 0.0f : kNegativeSlope;
}

// 0 for ReLU whatever the value, -inf and NaN not excepted.
__device__ inline float sloped(float value, float slope) { return slope == 0 ? 0.0f : value * slope; }

template <int V>
__device__ inline void activate(float (&u)[V], int activation) {
  if (activation <= kLeakyRelu) {
    const float slope = slope_of(activation);
#pragma unroll
    for (int j = 0; j < V; ++j) u[j] = u[j] <= 0 ? sloped(u[j], slope) : u[j];  // NaN stays
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) u[j] = activation == kSilu ? u[j] / (1 + std::exp(-u[j])) : u[j] * normal_cdf(u[j]);
  }
}

__device__ inline float derivative(float u, int activation) {
  if (activation == kSilu) {
    const float sigmoid = 1 / (1 + std::exp(-u));
    return sigmoid * (1 + u * (1 - sigmoid));
  }
  return normal_cdf(u) + u * std::exp(-0.5f * u * u) * 0.39894228f;
}

// u = (x - mean) * scale + shift. Signs found again in the backward are the forward's: each rounding is spelt out.
struct Affine {
  float mean, scale, shift;

  __device__ static Affine of(float mean, float low, float invstd, const float* weight, const float* bias, int64_t channel) {
    const float scale = weight ? invstd * weight[channel] : invstd;
    return {mean, scale, std::fma(-low, scale, bias ? bias[channel] : 0.0f)};
  }
  __device__ float operator()(float x) const { return std::fma(x - mean, scale, shift); }
};

// Where a thread works, for numbers of type T that are read V at a time, kVectors at once: those are a chunk.
template <class T_, int V_, bool kInner_, int kVectors_>
struct Place {
  using T = T_;
  static constexpr int V = V_;
  static constexpr bool kInner = kInner_;  // channels are
  static constexpr int kVectors = kVectors_;
  static constexpr int kX = !kInner || V == 1 ? 32 : 8, kY = kThreads / kX, kColumns = kX * V;
  static constexpr int kChannels = kInner ? kColumns : 1;  // of a block
  static constexpr int kOwn = kInner ? V : 1;              // of a thread
  static constexpr int kChunk = kVectors * kY;             // units
  static constexpr int kGroups = kThreads / kChannels < kWarps ? kThreads / kChannels : kWarps;
  using Vector = Pack<T, V>;

  // Shared memory: what groups of threads found for each channel, the channels' numbers, and the vectors that stay.
  static constexpr int kScratchBytes = kWarps * kChannels * static_cast<int>(sizeof(Moments));
  static constexpr int kFixedBytes = (kScratchBytes + 5 * kChannels * static_cast<int>(sizeof(float)) + 15) / 16 * 16;
  static constexpr int kChunkBytes = kVectors * kThreads * static_cast<int>(sizeof(Vector));

  // Into as many blocks of threads as run at a time, if there is work for them; the host's part.
  static Cut cut(const Shape& shape, int64_t splits, int64_t slots) {
    const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const auto within = [](int64_t low, int64_t value, int64_t high) { return value < low ? low : value < high ? value : high; };
    Cut cut{};
    cut.channels = shape.channels;
    cut.width = static_cast<int>(kInner ? shape.channels : shape.positions);
    cut.splits = static_cast<int>(splits);
    cut.pieces = kInner ? 1 : static_cast<int>(within(1, ceil_div(cut.width, kColumns), cut.width));
    cut.units = shape.batch / splits * (kInner ? shape.positions : cut.pieces);
    if (shape.channels * shape.positions == 0) cut.units = 0;
    cut.blocks = static_cast<int>(within(1, ceil_div(shape.channels, kChannels), shape.channels));
    const int64_t chunks = ceil_div(cut.units, kChunk), parts = within(1, slots / (cut.blocks * splits), kMostParts);
    cut.chunks_per_part = within(1, ceil_div(chunks, parts), chunks);
    cut.parts = static_cast<int>(within(1, ceil_div(chunks, cut.chunks_per_part), parts));
    return cut;
  }

  // With both phases in one launch, and so many tensors like x that stay in shared memory.
  static int64_t resident_bytes(const Cut& cut, int tensors) { return kFixedBytes + tensors * cut.chunks_per_part * kChunkBytes; }

  int x, y, block, split, part;
  int64_t first, last;  // chunks

  __device__ static Place of(const Cut& cut, bool reverse) {
    const int thread = thread_index(), number = static_cast<int>(reverse ? cut.grid() - 1 - blockIdx.x : blockIdx.x);
    Place at{thread % kX, thread / kX, number % cut.blocks, number / cut.blocks % cut.splits,
             number / cut.blocks / cut.splits, 0, 0};
    at.first = at.part * cut.chunks_per_part;
    const int64_t chunks = (cut.units + kChunk - 1) / kChunk, last = at.first + cut.chunks_per_part;
    at.last = last < chunks ? last : chunks;
    return at;
  }

  // The first number of a vector: its row and its column, which is no less than `width` where nothing is there.
  struct Spot {
    int64_t row;
    int column;
  };

  __device__ Spot spot(const Cut& cut, int64_t chunk, int i) const {
    const int64_t unit = (chunk * kVectors + i) * kY + y;
    if (unit >= cut.units) return {0, cut.width};
    if constexpr (kInner) return {split * cut.units + unit, block * kColumns + x * V};
    const auto of_split = static_cast<unsigned>(unit), pieces = static_cast<unsigned>(cut.pieces);  // 32 bits divide faster
    const int64_t images = static_cast<unsigned>(cut.units) / pieces, image = split * images + of_split / pieces;
    return {image * cut.channels + block, static_cast<int>(of_split % pieces) * kColumns + x * V};
  }

  // How many numbers of a channel the parts in front of this one hold.
  __device__ static int64_t counted(const Cut& cut, int part) {
    int64_t unit = part * cut.chunks_per_part * kChunk;
    unit = unit < cut.units ? unit : cut.units;
    if constexpr (kInner) return unit;
    const auto units = static_cast<unsigned>(unit), pieces = static_cast<unsigned>(cut.pieces);
    return static_cast<int64_t>(units / pieces) * cut.width + units % pieces * kColumns;
  }

  __device__ int64_t channel(int i) const { return static_cast<int64_t>(block) * kChannels + i; }

  // Where number `index` of `count` that a part leaves for a channel lies.
  __device__ static int64_t partial_at(const Cut& cut, int split, int part, int count, int index, int64_t channel) {
    return ((split + static_cast<int64_t>(cut.splits) * part) * count + index) * cut.channels + channel;
  }

  __device__ static Vector load(const void* from, const Cut& cut, const Spot& at) {
    return at.column < cut.width ? *reinterpret_cast<const Vector*>(static_cast<const T*>(from) + at.row * cut.width + at.column)
                                 : Vector{};
  }

  __device__ static void store(void* to, const Cut& cut, const Spot& at, const float (&values)[V]) {
    if (at.column >= cut.width) return;
    Vector v;
    for (int j = 0; j < V; ++j) v.x[j] = static_cast<T>(values[j]);
    *reinterpret_cast<Vector*>(static_cast<T*>(to) + at.row * cut.width + at.column) = v;
  }

  // Bit k of byte b of a row is its number 8 b + k; 8 / V neighbouring threads bring the bits of a byte.
  __device__ void store_bits(uint8_t* mask, const Cut& cut, const Spot& at, unsigned bits) const {
    constexpr int kShare = V < 8 ? 8 / V : 1;
    bits <<= x % kShare * V;
#pragma unroll
    for (int lanes = 1; lanes < kShare; lanes *= 2) bits |= __shfl_xor_sync(kWarp, bits, lanes);
    if (x % kShare == 0 && at.column < cut.width) mask[at.row * ((cut.width + 7) / 8) + at.column / 8] = static_cast<uint8_t>(bits);
  }

  __device__ static unsigned load_bits(const uint8_t* mask, const Cut& cut, const Spot& at) {
    if (at.column >= cut.width) return 0;
    return mask[at.row * ((cut.width + 7) / 8) + at.column / 8] >> at.column % 8;
  }

  // Merges what the threads of a block hold of each channel. The result is that of thread i for channel i.
  template <class Found>
  __device__ Found over_threads(const Found (&own)[kOwn]) const {
    auto* scratch = reinterpret_cast<Found*>(dynamic_shared());
    const int thread = thread_index(), lane = thread % 32, warp = thread / 32;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      Found found = own[j];
      for (int lanes = kInner ? kX : 1; lanes < 32; lanes *= 2) {
        const Found other = other_lane(found, lanes);
        if ((lane & lanes) == 0) found.merge(other);
      }
      if (lane < (kInner ? kX : 1)) scratch[warp * kChannels + lane * kOwn + j] = found;
    }
    __syncthreads();
    return gathered(scratch, kWarps);
  }

  // Merges `parts` partials, which `found(part, channel)` reads; as above.
  template <class F>
  __device__ auto over_parts(const Cut& cut, int parts, const F& found) const {
    using Found = decltype(found(0, int64_t{0}));
    auto* scratch = reinterpret_cast<Found*>(dynamic_shared());
    const int thread = thread_index(), i = thread % kChannels, group = thread / kChannels;
    __syncthreads();
    if (group < kGroups) {
      Found sum;
      if (channel(i) < cut.channels) {
        for (int part = group; part < parts; part += kGroups) sum.merge(found(part, channel(i)));
      }
      scratch[group * kChannels + i] = sum;
    }
    __syncthreads();
    return gathered(scratch, kGroups);
  }

  template <class Found>
  __device__ static Found gathered(const Found* scratch, int groups) {
    Found sum;
    const int i = thread_index();
    if (i < kChannels) {
      for (int group = 0; group < groups; ++group) sum.merge(scratch[group * kChannels + i]);
    }
    return sum;
  }

  // Does this thread look after channel i of its block?
  __device__ bool keeps_channel(const Cut& cut) const {
    return thread_index() < kChannels && channel(thread_index()) < cut.channels;
  }

  // Number k of five for each channel of the block, in shared memory.
  __device__ static float& number(int k, int i) {
    return reinterpret_cast<float*>(dynamic_shared() + kScratchBytes)[k * kChannels + i];
  }

  // A place in shared memory for vector i of a chunk, this thread's own.
  __device__ Vector& kept(int64_t chunk, int i) const {
    auto* vectors = reinterpret_cast<Vector*>(dynamic_shared() + kFixedBytes);
    return vectors[((chunk - first) * kVectors + i) * kThreads + thread_index()];
  }

  __device__ void share(const Affine& affine) const {
    const int i = thread_index();
    number(0, i) = affine.mean;
    number(1, i) = affine.scale;
    number(2, i) = affine.shift;
  }

  __device__ Affine affine(int j) const {
    const int i = kInner ? x * V + j : 0;
    return {number(0, i), number(1, i), number(2, i)};
  }
};

// ---- forward

struct Forward {
  Cut cut;
  const void *x, *residual;
  const float *weight, *bias, *given;
  float *running_mean, *running_var;
  int64_t* num_batches_tracked;
  float momentum, eps;
  bool from_batch, by_count;  // statistics of x; a momentum of 1 / num_batches_tracked
  int activation;
  void* y;  // or none: statistics alone
  float* stats;
  bool variance;  // for 1 / std in stats
  uint8_t* mask;
  float* partials;  // (parts, splits, 3, C)
};

// Adds a chunk's numbers of one channel, value(k) for k below kCount where there(k), to `seen` others; all of them are
// 1 / inverse. Deviations are from the mean of those others, or of the chunk where it is the first, so that neither a large
// mean nor a drift costs digits.
template <int kCount, class Value, class There>
__device__ inline void add_chunk(Moments& m, float seen, float inverse, const Value& value, const There& there) {
  float sum = 0, squares = 0;
  if (seen == 0) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) sum += there(k) ? value(k) : 0.0f;
    m.mean = sum * inverse;
    sum = 0;
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const float centred = there(k) ? value(k) - m.mean : 0.0f;
    sum += centred;
    squares = std::fma(centred, centred, squares);
  }
  const float before = seen * m.low, shift = (before + sum) * inverse;
  m.squares += before * m.low + (squares - (before + sum) * shift);
  m.move(shift);
}

template <class Place>
__device__ void leave_moments(const Forward& p, const Place& at, bool keep) {
  constexpr int V = Place::V, kOwn = Place::kOwn, kVectors = Place::kVectors;
  Moments own[kOwn];
  float seen = 0;
  for (int64_t chunk = at.first; chunk < at.last; ++chunk) {
    typename Place::Vector v[kVectors];
    bool there[kVectors];
    int vectors = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const auto spot = at.spot(p.cut, chunk, i);
      there[i] = spot.column < p.cut.width;
      vectors += there[i];
      v[i] = Place::load(p.x, p.cut, spot);
      if (keep) at.kept(chunk, i) = v[i];
    }
    if (vectors == 0) continue;
    const float n = seen + static_cast<float>(vectors * (V / kOwn)), inverse = 1 / n;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      constexpr int kEach = V / kOwn;  // numbers of a vector that are of one channel
      add_chunk<kVectors * kEach>(
          own[j], seen, inverse, [&](int k) { return static_cast<float>(v[k / kEach].x[j + k % kEach]); },
          [&](int k) { return there[k / kEach]; });
    }
    seen = n;
  }
#pragma unroll
  for (int j = 0; j < kOwn; ++j) own[j].n = seen;
  const Moments found = at.over_threads(own);
  if (at.keeps_channel(p.cut)) {
    const float numbers[3] = {found.mean, found.low, found.squares};
    for (int k = 0; k < 3; ++k) {
      p.partials[Place::partial_at(p.cut, at.split, at.part, 3, k, at.channel(thread_index()))] = numbers[k];
    }
  }
}

template <class Place>
__device__ Moments merged_moments(const Forward& p, const Place& at, int split) {
  return at.over_parts(p.cut, p.cut.parts, [&](int part, int64_t channel) {
    const auto number = [&](int k) { return p.partials[Place::partial_at(p.cut, split, part, 3, k, channel)]; };
    const int64_t count = Place::counted(p.cut, part + 1) - Place::counted(p.cut, part);
    return Moments{number(0), number(1), number(2), static_cast<float>(count)};
  });
}

// As torch.lerp: exact at 0 and 1.
__device__ inline float moved(float running, float value, float weight) {
  return weight < 0.5f ? running + weight * (value - running) : value - (1 - weight) * (value - running);
}

// The sums over splits of their means and unbiased variances.
struct Running {
  float mean = 0, var = 0;

  __device__ static Running of(const Moments& m) { return {m.mean, (m.squares < 0 ? 0 : m.squares) / (m.n - 1)}; }
  __device__ void merge(const Running& other) {
    mean += other.mean;
    var += other.var;
  }
};

template <class Place>
__device__ void update_running(const Forward& p, const Place& at) {
  Running all;
  if (p.cut.parts == 1) {  // of many splits, perhaps
    const auto n = static_cast<float>(Place::counted(p.cut, 1));
    all = at.over_parts(p.cut, p.cut.splits, [&](int split, int64_t channel) {
      const auto number = [&](int k) { return p.partials[Place::partial_at(p.cut, split, 0, 3, k, channel)]; };
      return Running::of({number(0), number(1), number(2), n});
    });
  } else {
    for (int split = 0; split < p.cut.splits; ++split) all.merge(Running::of(merged_moments(p, at, split)));
  }
  const float mean = all.mean / p.cut.splits, var = all.var / p.cut.splits;
  if (!at.keeps_channel(p.cut) || p.cut.units == 0) return;
  const int64_t channel = at.channel(thread_index());
  const float weight = p.by_count ? 1 / static_cast<float>(*p.num_batches_tracked) : p.momentum;
  if (p.running_mean) p.running_mean[channel] = moved(p.running_mean[channel], mean, weight);
  if (p.running_var) p.running_var[channel] = moved(p.running_var[channel], var, weight);
}

// Statistics from where they come, to where they go: `stats`, shared memory, and, with `all` partials there, the running
// ones.
template <class Place>
__device__ void find_statistics(const Forward& p, const Place& at, bool all) {
  Moments found;
  if (p.from_batch) {
    if (all && at.split + at.part == 0 && (p.running_mean || p.running_var)) update_running(p, at);
    found = merged_moments(p, at, at.split);
  }
  if (at.keeps_channel(p.cut)) {
    const int64_t channel = at.channel(thread_index()), plane = p.cut.splits * p.cut.channels;
    const int64_t place = at.split * p.cut.channels + channel;
    float invstd;
    if (p.given) {
      found.mean = p.given[place];
      found.low = p.given[place + plane];
      invstd = p.given[place + 2 * plane];
    } else {
      float var;
      if (p.from_batch) {
        var = found.n == 0 ? 0 : (found.squares < 0 ? 0 : found.squares) / found.n;
      } else {
        found.mean = p.running_mean[channel];
        var = p.running_var[channel];
      }
      invstd = 1 / std::sqrt(var + p.eps);
      if (at.part == 0) {
        p.stats[place] = found.mean;
        p.stats[place + plane] = found.low;
        p.stats[place + 2 * plane] = p.variance ? var : invstd;
      }
    }
    at.share(Affine::of(found.mean, found.low, invstd, p.weight, p.bias, channel));
  }
  __syncthreads();
}

template <class Place>
__device__ void write_y(const Forward& p, const Place& at, bool kept) {
  constexpr int V = Place::V, kOwn = Place::kOwn, kVectors = Place::kVectors;
  Affine affine[kOwn];
#pragma unroll
  for (int j = 0; j < kOwn; ++j) affine[j] = at.affine(j);
  for (int64_t chunk = at.last - 1; chunk >= at.first; --chunk) {
    typename Place::Vector x[kVectors], residual[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const auto spot = at.spot(p.cut, chunk, i);
      x[i] = kept ? at.kept(chunk, i) : Place::load(p.x, p.cut, spot);
      if (p.residual) residual[i] = Place::load(p.residual, p.cut, spot);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const auto spot = at.spot(p.cut, chunk, i);
      float y[V];
#pragma unroll
      for (int j = 0; j < V; ++j) y[j] = affine[j % kOwn](static_cast<float>(x[i].x[j]));
      if (p.residual) {
#pragma unroll
        for (int j = 0; j < V; ++j) y[j] += static_cast<float>(residual[i].x[j]);
      }
      if (p.mask) {
        unsigned bits = 0;
#pragma unroll
        for (int j = 0; j < V; ++j) bits |= (y[j] <= 0 ? 0u : 1u) << j;
        at.store_bits(p.mask, p.cut, spot, spot.column < p.cut.width ? bits : 0);
      }
      activate(y, p.activation);
      Place::store(p.y, p.cut, spot, y);
    }
  }
}

// Between the phases of one launch.
__device__ inline void wait(int phases) {
  if (phases & kAlone) {
    __syncthreads();
  } else if (phases & kReduce && phases & kWrite) {
    wait_for_grid();
  }
}

// Whether the partials of all splits are there in the second phase.
__device__ inline bool all_there(const Cut& cut, int phases) { return !(phases & kAlone) || cut.splits == 1; }

template <class Place>
__device__ void forward(const Forward& p, int phases) {
  const Place at = Place::of(p.cut, phases == kWrite);
  if (phases & kReduce) {
    leave_moments(p, at, phases & kKept);
    if (p.num_batches_tracked && blockIdx.x == 0 && thread_index() == 0) ++*p.num_batches_tracked;
  }
  wait(phases);
  if (phases & (kWrite | kMerge)) find_statistics(p, at, all_there(p.cut, phases));
  if (phases & kWrite) write_y(p, at, phases & kKept);
}

// ---- backward

struct Backward {
  Cut cut;
  const void *dy, *x, *residual;
  const uint8_t* mask;
  const float *weight, *bias, *stats, *means;
  bool training;
  int activation;
  void *dx, *dresidual;
  float *dweight, *dbias;
  float* sums;      // (2, S, C), where they are asked for
  float* partials;  // (parts, splits, 2, C)
};

// The vectors that a gradient for x takes, and the gradient for u.
template <class Place>
struct Operands {
  typename Place::Vector x, dy, residual;
  unsigned bits;

  __device__ void load(const Backward& p, const Place& at, int64_t chunk, int i, bool kept) {
    const auto spot = at.spot(p.cut, chunk, i);
    x = kept ? at.kept(chunk, i) : Place::load(p.x, p.cut, spot);
    dy = kept ? at.kept(at.last - at.first + chunk, i) : Place::load(p.dy, p.cut, spot);
    if (p.mask) bits = Place::load_bits(p.mask, p.cut, spot);
    if (p.residual) residual = Place::load(p.residual, p.cut, spot);
  }

  __device__ void gradient(const Backward& p, const Affine (&affine)[Place::kOwn], float (&dz)[Place::V]) const {
    constexpr int V = Place::V, kOwn = Place::kOwn;
    if (p.activation <= kLeakyRelu) {
      const float slope = slope_of(p.activation);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const bool positive = p.mask ? bits >> j & 1 : !(affine[j % kOwn](static_cast<float>(x.x[j])) <= 0);
        const float value = static_cast<float>(dy.x[j]);
        dz[j] = positive ? value : sloped(value, slope);
      }
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        float u = affine[j % kOwn](static_cast<float>(x.x[j]));
        if (p.residual) u += static_cast<float>(residual.x[j]);
        dz[j] = static_cast<float>(dy.x[j]) * derivative(u, p.activation);
      }
    }
  }
};

template <class Place>
__device__ void share_affine(const Backward& p, const Place& at) {
  if (at.keeps_channel(p.cut)) {
    const int64_t channel = at.channel(thread_index()), plane = p.cut.splits * p.cut.channels;
    const float* stats = p.stats + at.split * p.cut.channels + channel;
    at.share(Affine::of(stats[0], stats[plane], stats[2 * plane], p.weight, p.bias, channel));
  }
  __syncthreads();
}

template <class Place>
__device__ void leave_sums(const Backward& p, const Place& at, bool keep) {
  constexpr int V = Place::V, kOwn = Place::kOwn, kVectors = Place::kVectors;
  Affine affine[kOwn];
#pragma unroll
  for (int j = 0; j < kOwn; ++j) affine[j] = at.affine(j);
  Sums own[kOwn];
  for (int64_t chunk = at.first; chunk < at.last; ++chunk) {
    Operands<Place> operands[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      operands[i].load(p, at, chunk, i, false);
      if (keep) {
        at.kept(chunk, i) = operands[i].x;
        at.kept(at.last - at.first + chunk, i) = operands[i].dy;
      }
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (at.spot(p.cut, chunk, i).column >= p.cut.width) continue;
      float dz[V];
      operands[i].gradient(p, affine, dz);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        own[j % kOwn].dz += dz[j];
        own[j % kOwn].moment += dz[j] * (static_cast<float>(operands[i].x.x[j]) - affine[j % kOwn].mean);
      }
    }
  }
  const Sums found = at.over_threads(own);
  if (at.keeps_channel(p.cut)) {
    const int64_t channel = at.channel(thread_index()), plane = p.cut.splits * p.cut.channels;
    const float* stats = p.stats + at.split * p.cut.channels + channel;
    const float moment = (found.moment - stats[plane] * found.dz) * stats[2 * plane];
    p.partials[Place::partial_at(p.cut, at.split, at.part, 2, 0, channel)] = found.dz;
    p.partials[Place::partial_at(p.cut, at.split, at.part, 2, 1, channel)] = moment;
  }
}

template <class Place>
__device__ Sums merged_sums(const Backward& p, const Place& at, int split) {
  return at.over_parts(p.cut, p.cut.parts, [&](int part, int64_t channel) {
    return Sums{p.partials[Place::partial_at(p.cut, split, part, 2, 0, channel)],
                p.partials[Place::partial_at(p.cut, split, part, 2, 1, channel)]};
  });
}

// dx = dz * scale + (x - mean) * slope + offset; slope and offset go to shared memory, sums to where they are asked for.
template <class Place>
__device__ void find_slopes(const Backward& p, const Place& at, bool all) {
  const int64_t channel = at.channel(thread_index()), plane = p.cut.splits * p.cut.channels;
  const int64_t place = at.split * p.cut.channels + channel;
  if (all && p.dweight && at.split + at.part == 0) {
    const Sums total = at.over_parts(p.cut, p.cut.splits * p.cut.parts, [&](int i, int64_t channel) {
      const auto number = [&](int k) { return p.partials[Place::partial_at(p.cut, i, 0, 2, k, channel)]; };
      return Sums{number(0), number(1)};
    });
    if (at.keeps_channel(p.cut)) {
      p.dbias[channel] = total.dz;
      p.dweight[channel] = total.moment;
    }
  }
  Sums mean;
  if (p.partials) {
    mean = merged_sums(p, at, at.split);
    if (p.sums && at.part == 0 && at.keeps_channel(p.cut)) {
      p.sums[place] = mean.dz;
      p.sums[place + plane] = mean.moment;
    }
    const auto count = static_cast<float>(Place::counted(p.cut, p.cut.parts));
    mean.dz /= count;
    mean.moment /= count;
  }
  if (at.keeps_channel(p.cut)) {
    if (p.means) mean = {p.means[place], p.means[place + plane]};
    const float invstd = p.stats[place + 2 * plane], scale = p.weight ? invstd * p.weight[channel] : invstd;
    const float slope = mean.moment * invstd;
    Place::number(3, thread_index()) = p.training ? -slope * scale : 0.0f;
    Place::number(4, thread_index()) = p.training ? (p.stats[place + plane] * slope - mean.dz) * scale : 0.0f;
  }
  __syncthreads();
}

template <class Place>
__device__ void write_dx(const Backward& p, const Place& at, bool kept) {
  constexpr int V = Place::V, kOwn = Place::kOwn, kVectors = Place::kVectors;
  Affine affine[kOwn];
  float slope[kOwn], offset[kOwn];
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    const int i = Place::kInner ? at.x * V + j : 0;
    affine[j] = at.affine(j);
    slope[j] = Place::number(3, i);
    offset[j] = Place::number(4, i);
  }
  for (int64_t chunk = at.last - 1; chunk >= at.first; --chunk) {
    Operands<Place> operands[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) operands[i].load(p, at, chunk, i, kept);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const auto spot = at.spot(p.cut, chunk, i);
      float dz[V], dx[V];
      operands[i].gradient(p, affine, dz);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const Affine& a = affine[j % kOwn];
        const float centred = static_cast<float>(operands[i].x.x[j]) - a.mean;
        dx[j] = std::fma(dz[j], a.scale, std::fma(centred, slope[j % kOwn], offset[j % kOwn]));
      }
      if (p.dresidual) Place::store(p.dresidual, p.cut, spot, dz);
      if (p.dx) Place::store(p.dx, p.cut, spot, dx);
    }
  }
}

template <class Place>
__device__ void backward(const Backward& p, int phases) {
  const Place at = Place::of(p.cut, phases == kWrite);
  share_affine(p, at);
  if (phases & kReduce) leave_sums(p, at, phases & kKept);
  wait(phases);
  if (phases & (kWrite | kMerge)) find_slopes(p, at, all_there(p.cut, phases));
  if (phases & kWrite) write_dx(p, at, phases & kKept);
}

}  // namespace ssl_fast::batch_norm
