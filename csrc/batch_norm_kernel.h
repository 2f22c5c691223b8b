// The sweeps of batch norm over a block, for one instruction set; after simd_types.h. No include guard: see simd.h.

#include "activations_simd.h"

constexpr int64_t kTile = 128;          // values of a channel in rows, summed in fp32 before they are merged in fp64
constexpr int64_t kPlaneTile = 4096;    // the same in planes, in as many chains as there are lanes
constexpr int64_t kFirst = 256, kFirstRows = 8;  // values of a channel whose mean is the first shift

// ---- what each element needs

// Pointers to what a split's lines hold; at(line, c) moves them to the plane of channel c, or to that channel of a row.
// From there a block has `length` elements.
template <class T, bool kPlanes>
struct Reader {
  const T *x, *dy, *residual;
  T *y, *dx, *dresidual;
  const uint8_t* mask;
  uint8_t* new_mask;
  const float *mean, *scale, *shift, *slope, *offset;
  int64_t line_length, length, activation;
  bool has_residual, has_mask, stream;

  Reader(const Problem& p, const Block& b)
      : x(static_cast<const T*>(p.x)), dy(static_cast<const T*>(p.dy)), residual(static_cast<const T*>(p.residual)),
        y(static_cast<T*>(p.y)), dx(static_cast<T*>(p.dx)), dresidual(static_cast<T*>(p.dresidual)),
        mask(p.mask), new_mask(p.new_mask),
        mean(p.per.mean + b.split * p.per.stride), scale(p.per.scale + b.split * p.per.stride),
        shift(p.per.shift + b.split * p.per.stride), slope(p.per.slope + b.split * p.per.stride),
        offset(p.per.offset + b.split * p.per.stride),
        line_length(p.length), length(kPlanes ? p.length : b.channels), activation(p.activation),
        has_residual(p.residual != nullptr), has_mask(p.mask != nullptr || p.new_mask != nullptr), stream(p.stream) {}

  SSL_FAST_INLINE Reader at(int64_t line, int64_t c) const {
    Reader r = *this;
    const int64_t inside = kPlanes ? 0 : c;
    const int64_t element = line * line_length + inside, byte = line * ceil_div(line_length, 8) + inside / 8;
    r.x += element, r.dy += element, r.residual += element, r.y += element, r.dx += element, r.dresidual += element;
    r.mask += byte, r.new_mask += byte;
    r.mean += c, r.scale += c, r.shift += c, r.slope += c, r.offset += c;
    return r;
  }
  // Values of a channel array for a vector that starts at element i of the line.
  static SSL_FAST_INLINE V channel(const float* values, int64_t i) { return kPlanes ? broadcast(*values) : load(values + i); }
  SSL_FAST_INLINE V centred(int64_t i, int n) const { return load_first(x + i, n) - channel(mean, i); }
  // The one expression of u, so that the backward finds the sign that the forward saw.
  SSL_FAST_INLINE V pre_activation(V centred_x, int64_t i) const {
    return centred_x * channel(scale, i) + channel(shift, i);
  }
  template <int64_t kActivation>
  SSL_FAST_INLINE V gradient(V centred_x, int64_t i, int n) const {
    const V g = load_first(dy + i, n);
    if constexpr (kActivation == kIdentity) return g;
    if (kActivation == kReLU || activation == kLeakyReLU) {
      const VInt above = has_mask ? from_bits(read_bits(mask, i, n)) : positive(pre_activation(centred_x, i));
      return kActivation == kReLU ? keep(g, above) : above ? g : g * kNegativeSlope;
    }
    V u = pre_activation(centred_x, i);
    if (has_residual) u += load_first(residual + i, n);
    return g * smooth_derivative(u, activation);
  }
};

// f(i, n) for each vector of a line, n lanes of it in use.
template <class F>
SSL_FAST_INLINE void for_each_vector_of(int64_t length, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) f(i, kLanes);
  if (i < length) f(i, static_cast<int>(length - i));
}

// f(line, c) for each line of a block.
template <class F>
SSL_FAST_INLINE void for_each_line(const Problem& p, const Block& b, const F& f) {
  if (!p.planes) {
    for (int64_t line = b.first; line < b.first + b.count; ++line) f(line, b.first_channel);
    return;
  }
  for (int64_t image = b.first; image < b.first + b.count; ++image)
    for (int64_t c = b.first_channel; c < b.first_channel + b.channels; ++c) f(image * p.channels + c, c);
}

template <class T, bool kPlanes, int64_t kActivation, bool kResidual>
void apply_block(const Problem& p, const Block& b) {
  const Reader<T, kPlanes> all{p, b};
  for_each_line(p, b, [&](int64_t line, int64_t c) SSL_FAST_LAMBDA {
    const auto r = all.at(line, c);
    for_each_vector_of(r.length, [&](int64_t i, int n) SSL_FAST_LAMBDA {
      if (b.ahead) prefetch(r.x + i + b.ahead);
      V u = r.pre_activation(r.centred(i, n), i);
      if (kResidual && r.has_residual) {
        if (b.ahead) prefetch(r.residual + i + b.ahead);
        u += load_first(r.residual + i, n);
        if (r.has_mask) write_bits(r.new_mask, i, n, to_bits(positive(u)));
      }
      store_first(r.y + i, activate<kActivation>(u, r.activation), n, r.stream);
    });
  });
}

template <class T, bool kPlanes, int64_t kActivation>
void backward_block(const Problem& p, const Block& b) {
  const Reader<T, kPlanes> all{p, b};
  const bool need_dx = p.dx != nullptr, need_dresidual = p.dresidual != nullptr, batch = p.batch;
  for_each_line(p, b, [&](int64_t line, int64_t c) SSL_FAST_LAMBDA {
    const auto r = all.at(line, c);
    for_each_vector_of(r.length, [&](int64_t i, int n) SSL_FAST_LAMBDA {
      if (b.ahead) {
        prefetch(r.x + i + b.ahead);
        prefetch(r.dy + i + b.ahead);
      }
      const V x = r.centred(i, n);
      const V dz = r.template gradient<kActivation>(x, i, n);
      if (need_dresidual) store_first(r.dresidual + i, dz, n, r.stream);
      if (need_dx) {
        V dx = dz * r.channel(r.scale, i);
        if (batch) dx += x * r.channel(r.slope, i) + r.channel(r.offset, i);
        store_first(r.dx + i, dx, n, r.stream);
      }
    });
  });
}

// ---- sums over a block

// Two sums a channel. `terms(reader, i, n)` gives what a vector of the reader's line adds to each; merge(first, second,
// count) takes the block's channels' sums over a tile of `count` values each.
struct Terms {
  V first, second;
};

template <class R, class F, class G>
SSL_FAST_INLINE void sum_rows(const Block& b, const R& all, float* work, const F& terms, const G& merge) {
  const int64_t padded = round_up(b.channels, kLanes);
  float *const first = work, *const second = work + padded;
  for (int64_t begin = b.first, end; begin < b.first + b.count; begin = end) {
    end = std::min(begin + kTile, b.first + b.count);
    std::fill(work, work + 2 * padded, 0.0f);
    // Row by row: several at a time would spare loads and stores of the sums, but memory likes one stream best.
    for (int64_t row = begin; row < end; ++row) {
      const R r = all.at(row, b.first_channel);
      for_each_vector_of(r.length, [&](int64_t i, int n) SSL_FAST_LAMBDA {
        const Terms t = terms(r, i, n);
        store(first + i, load(first + i) + t.first);
        store(second + i, load(second + i) + t.second);
      });
    }
    merge(first, second, end - begin);
  }
}

template <class R, class F, class G>
SSL_FAST_INLINE void sum_planes(const Problem& p, const Block& b, const R& all, float* work, const F& terms, const G& merge) {
  float* const sums = work;  // (channels, 2, kLanes)
  const int64_t padded = round_up(b.channels, kLanes);
  float *const first = work + 2 * kLanes * b.channels, *const second = first + padded;
  const int64_t piece = std::min(p.part, kPlaneTile), images = std::max<int64_t>(1, kPlaneTile / piece);
  const int64_t last = b.first + b.count;
  for (int64_t image = b.first; image < last; image += images) {
    const int64_t end = std::min(image + images, last);
    for (int64_t from = 0; from < p.part; from += piece) {
      const int64_t to = std::min(from + piece, p.part);
      std::fill(sums, sums + 2 * kLanes * b.channels, 0.0f);
      for (int64_t k = image; k < end; ++k)
        for (int64_t c = 0; c < b.channels; ++c) {
          const R r = all.at(k * p.channels + b.first_channel + c, b.first_channel + c);
          float* const own = sums + 2 * kLanes * c;
          constexpr int kChains = 4;
          V sum[kChains] = {load(own)}, sum2[kChains] = {load(own + kLanes)};
          int64_t i = from;
          for (; i + kChains * kLanes <= to; i += kChains * kLanes)
            SSL_FAST_UNROLL
            for (int chain = 0; chain < kChains; ++chain) {
              const Terms t = terms(r, i + chain * kLanes, kLanes);
              sum[chain] += t.first;
              sum2[chain] += t.second;
            }
          for (; i < to; i += kLanes) {
            const Terms t = terms(r, i, static_cast<int>(std::min<int64_t>(kLanes, to - i)));
            sum[0] += t.first;
            sum2[0] += t.second;
          }
          store(own, (sum[0] + sum[1]) + (sum[2] + sum[3]));
          store(own + kLanes, (sum2[0] + sum2[1]) + (sum2[2] + sum2[3]));
        }
      for (int64_t c = 0; c < b.channels; ++c) {
        first[c] = sum_lanes(load(sums + 2 * kLanes * c));
        second[c] = sum_lanes(load(sums + 2 * kLanes * c + kLanes));
      }
      merge(first, second, (end - image) * (to - from));
    }
  }
}

template <class T, bool kPlanes, class F, class G>
SSL_FAST_INLINE void sum_block(const Problem& p, const Block& b, float* work, const F& terms, const G& merge) {
  const Reader<T, kPlanes> all{p, b};
  if constexpr (kPlanes)
    sum_planes(p, b, all, work, terms, merge);
  else
    sum_rows(b, all, work, terms, merge);
}

int64_t work_of(const Problem& p, int64_t channels) {
  return (p.planes ? 2 * kLanes + 3 : 3) * round_up(channels, kLanes);
}

// One sweep: sums of x - shift and of its square, the shift being the mean of the tile before. What cancellation loses,
// (mean - shift)^2, is then a few times what the variance between the tiles adds at the most. Tiles are merged by Chan's
// rule in fp64.
template <class T, bool kPlanes>
void moments_of_block(const Problem& p, const Block& b, const Moments& out, float* work) {
  float* const shift = work;  // which takes the place of the mean, from the block's first channel on
  work += round_up(b.channels, kLanes);
  std::fill(shift, work, 0.0f);
  std::fill(out.mean, out.mean + b.channels, 0.0);
  std::fill(out.m2, out.m2 + b.channels, 0.0);
  Problem shifted = p;
  shifted.per = {};
  shifted.per.mean = shift - b.first_channel;
  const auto terms = [](const Reader<T, kPlanes>& r, int64_t i, int n) SSL_FAST_LAMBDA {
    V d = r.centred(i, n);
    if (kPlanes && n < kLanes) d = keep(d, first_lanes(n));
    return Terms{d, d * d};
  };
  Problem start = shifted;
  Block some = b;
  some.count = std::min<int64_t>(b.count, kPlanes ? 1 : kFirstRows);
  if constexpr (kPlanes) start.part = std::min(p.length, kFirst);
  sum_block<T, kPlanes>(start, some, work, terms, [&](const float* sum, const float*, int64_t count) SSL_FAST_LAMBDA {
    for (int64_t c = 0; c < b.channels; ++c) shift[c] = sum[c] / static_cast<float>(count);
  });
  int64_t done = 0;
  sum_block<T, kPlanes>(shifted, b, work, terms, [&](const float* sum, const float* square, int64_t count) SSL_FAST_LAMBDA {
    const double n = static_cast<double>(count), before = static_cast<double>(done), all = before + n;
    for (int64_t c = 0; c < b.channels; ++c) {
      const double d = sum[c] / n, mean = shift[c] + d, delta = mean - out.mean[c];
      const double own = square[c] - sum[c] * d;
      out.m2[c] += (own < 0 ? 0 : own) + delta * delta * (before * n / all);
      out.mean[c] += delta * (n / all);
      shift[c] = static_cast<float>(mean);
    }
    done += count;
  });
}

template <class T, bool kPlanes, int64_t kActivation>
void sums_of_block(const Problem& p, const Block& b, const Sums& out, float* work) {
  std::fill(out.dz, out.dz + b.channels, 0.0);
  std::fill(out.dz_x, out.dz_x + b.channels, 0.0);
  const auto terms = [](const Reader<T, kPlanes>& r, int64_t i, int n) SSL_FAST_LAMBDA {
    const V x = r.centred(i, n);
    const V dz = r.template gradient<kActivation>(x, i, n);  // 0 in lanes beyond n, as dy is
    return Terms{dz, dz * x};
  };
  sum_block<T, kPlanes>(p, b, work, terms, [&](const float* dz, const float* dz_x, int64_t) SSL_FAST_LAMBDA {
    for (int64_t c = 0; c < b.channels; ++c) {
      out.dz[c] += dz[c];
      out.dz_x[c] += dz_x[c];
    }
  });
}

// ---- by dtype, layout and activation

template <class F>
void with_types(const Problem& p, const F& f) {
  dispatch_float(p.dtype, "batch_norm", [&](auto zero) {
    if (p.planes)
      f(zero, std::true_type{});
    else
      f(zero, std::false_type{});
  });
}

template <class F>
void with_activation(const Problem& p, const F& f) {
  if (p.activation == kIdentity) return f(std::integral_constant<int64_t, kIdentity>{});
  if (p.activation == kReLU) return f(std::integral_constant<int64_t, kReLU>{});
  f(std::integral_constant<int64_t, kOther>{});
}

void moments(const Problem& p, const Block& b, const Moments& out, float* work) {
  with_types(p, [&](auto zero, auto planes) { moments_of_block<decltype(zero), planes.value>(p, b, out, work); });
}

void apply(const Problem& p, const Block& b) {
  with_types(p, [&](auto zero, auto planes) {
    with_activation(p, [&](auto activation) {
      using T = decltype(zero);
      if constexpr (activation.value == kOther)
        apply_block<T, planes.value, activation.value, true>(p, b);
      else if (p.residual != nullptr)
        apply_block<T, planes.value, activation.value, true>(p, b);
      else
        apply_block<T, planes.value, activation.value, false>(p, b);
    });
  });
}

void sums(const Problem& p, const Block& b, const Sums& out, float* work) {
  with_types(p, [&](auto zero, auto planes) {
    with_activation(p, [&](auto activation) {
      sums_of_block<decltype(zero), planes.value, activation.value>(p, b, out, work);
    });
  });
}

void backward(const Problem& p, const Block& b) {
  with_types(p, [&](auto zero, auto planes) {
    with_activation(p, [&](auto activation) { backward_block<decltype(zero), planes.value, activation.value>(p, b); });
  });
}

constexpr Kernels kKernels = {work_of, moments, apply, sums, backward};
