// Layer norm over units of work, for one instruction set; after simd_types.h. No include guard: see simd.h.
//
// The mean is first guessed by a sum of x - pivot, the pivot being a position's first number: exact where all are equal,
// and near enough whatever the pivot is. A second pass finds what the guess left out, and the squares about it. With
// x - mean exact near the mean,
//   xhat = (x - mean) * invstd + offset, offset = -low * invstd        u = xhat * weight + bias + residual

#include "activations_simd.h"

// ---- sums

template <int kCount>
struct Sums {
  V of[kCount];
};

// The sums over n numbers of what terms(i, n) gives for each vector of them, n lanes in use.
template <int kCount, class F>
SSL_FAST_INLINE Sums<kCount> sum_over(int64_t length, const F& terms) {
  constexpr int kChains = 4;
  Sums<kCount> chains[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes <= length; i += kChains * kLanes)
    SSL_FAST_UNROLL
    for (int chain = 0; chain < kChains; ++chain) {
      const Sums<kCount> t = terms(i + chain * kLanes, kLanes);
      for (int k = 0; k < kCount; ++k) chains[chain].of[k] += t.of[k];
    }
  for (; i < length; i += kLanes) {
    const Sums<kCount> t = terms(i, static_cast<int>(std::min<int64_t>(kLanes, length - i)));
    for (int k = 0; k < kCount; ++k) chains[0].of[k] += t.of[k];
  }
  Sums<kCount> sum;
  for (int k = 0; k < kCount; ++k) sum.of[k] = (chains[0].of[k] + chains[1].of[k]) + (chains[2].of[k] + chains[3].of[k]);
  return sum;
}

// f(i, n) for each vector of a line, n lanes of it in use.
template <class F>
SSL_FAST_INLINE void for_each_vector_of(int64_t length, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) f(i, kLanes);
  if (i < length) f(i, static_cast<int>(length - i));
}

// Lanes beyond n made 0, where there are any: n is a constant in all but the last vector.
SSL_FAST_INLINE V first_of(V v, int n) { return n == kLanes ? v : keep(v, first_lanes(n)); }

// A line of a tensor that has no numbers from `end` on. Lanes beyond n hold whatever follows the line: a part of a vector
// is slow to load.
template <class T>
struct Line {
  const T *at, *end;

  static SSL_FAST_INLINE Line of(const Problem& p, const void* tensor, int64_t element) {
    const T* const first = static_cast<const T*>(tensor);
    return tensor == nullptr ? Line{} : Line{first + element, first + p.N * p.D * p.L};
  }
  SSL_FAST_INLINE V operator()(int64_t i, int n) const {
    return n == kLanes || at + i + kLanes <= end ? load_as_float(at + i) : load_first(at + i, n);
  }
  explicit SSL_FAST_INLINE operator bool() const { return at != nullptr; }
  // Asks for what a later step reads first, while this one computes and writes.
  SSL_FAST_INLINE void fetch(int64_t i) const { prefetch(at + i); }
};

template <class T>
SSL_FAST_INLINE T* line_of(void* tensor, int64_t element) {
  return tensor == nullptr ? nullptr : static_cast<T*>(tensor) + element;
}

// ---- what each element needs

struct Position {
  float mean, low, invstd;
};

// Of a guess of the mean, and the sums of n numbers' deviations from it and of their squares.
SSL_FAST_INLINE Position position_of(float guess, double sum, double squares, double n, double eps) {
  const double rest = sum / n, mean = guess + rest, var = squares / n - rest * rest;
  const float rounded_mean = static_cast<float>(mean);
  return {rounded_mean, static_cast<float>(mean - rounded_mean), static_cast<float>(1 / std::sqrt((var < 0 ? 0 : var) + eps))};
}

template <int64_t kActivation>
SSL_FAST_INLINE V finish(V u, int64_t activation) {
  if (kActivation == kIdentity || activation == kIdentity) return u;
  return activation == kReLU ? keep(u, positive(u)) : activate<kOther>(u, activation);
}

// dz of dy, where u is needed for it.
template <int64_t kActivation, class F>
SSL_FAST_INLINE V through(V dy, int64_t activation, const F& u) {
  if (kActivation == kIdentity || activation == kIdentity) return dy;
  if (activation > kLeakyReLU) return dy * smooth_derivative(u(), activation);
  const VInt above = positive(u());
  return activation == kReLU ? keep(dy, above) : above ? dy : dy * kNegativeSlope;
}

// ---- rows

// Narrow rows are taken some at a time, each step for all of them: a step waits for the one before.
constexpr int64_t kRowsAtOnce = 8, kBytesAtOnce = 16 << 10;

SSL_FAST_INLINE int64_t rows_at_once(const Problem& p) {
  return std::clamp<int64_t>(kBytesAtOnce / (p.D * static_cast<int64_t>(sizeof(float))), 1, kRowsAtOnce);
}

// Wide rows' gradients are taken some at a time and piece by piece, so that the sums of a piece stay in the nearest cache.
constexpr int64_t kWide = 4096, kWideRows = 4, kPiece = 2048;

template <class T, int64_t kActivation>
void forward_rows(const Problem& p, int64_t first, int64_t last) {
  // What stores might change, for all the compiler knows, is kept out of memory.
  const int64_t D = p.D, rows = p.N, activation = p.activation, step = rows_at_once(p);
  const float *const weight = p.weight, *const bias = p.bias;
  const bool stream = p.stream;
  const double n = static_cast<double>(D);
  float guess[kRowsAtOnce];
  Position at[kRowsAtOnce];
  for (int64_t begin = first; begin < last; begin += step) {
    const int64_t count = std::min(step, last - begin);
    for (int64_t r = 0; r < count; ++r) {
      const auto x = Line<T>::of(p, p.x, (begin + r) * D);
      const float pivot = static_cast<float>(*x.at);
      const auto off = sum_over<1>(D, [&](int64_t i, int k) SSL_FAST_LAMBDA { return Sums<1>{first_of(x(i, k) - pivot, k)}; });
      guess[r] = static_cast<float>(pivot + sum_lanes(off.of[0]) / n);
    }
    for (int64_t r = 0; r < count; ++r) {
      const auto x = Line<T>::of(p, p.x, (begin + r) * D);
      const auto moments = sum_over<2>(D, [&](int64_t i, int k) SSL_FAST_LAMBDA {
        const V off = first_of(x(i, k) - guess[r], k);
        return Sums<2>{off, off * off};
      });
      at[r] = position_of(guess[r], sum_lanes(moments.of[0]), sum_lanes(moments.of[1]), n, p.eps);
      p.stats[begin + r] = at[r].mean;
      p.stats[rows + begin + r] = at[r].low;
      p.stats[2 * rows + begin + r] = at[r].invstd;
    }
    for (int64_t r = 0; r < count; ++r) {
      const auto x = Line<T>::of(p, p.x, (begin + r) * D), residual = Line<T>::of(p, p.residual, (begin + r) * D);
      const auto next = Line<T>::of(p, p.x, (begin + r + step) * D);
      T* const y = line_of<T>(p.y, (begin + r) * D);
      const float mean = at[r].mean, invstd = at[r].invstd, offset = -at[r].low * invstd;
      for_each_vector_of(D, [&](int64_t i, int k) SSL_FAST_LAMBDA {
        next.fetch(i);
        V u = ((x(i, k) - mean) * invstd + offset) * load(weight + i) + load(bias + i);
        if (residual) u += residual(i, k);
        store_first(y + i, finish<kActivation>(u, activation), k, stream);
      });
    }
  }
}

template <class T, int64_t kActivation>
void backward_rows(const Problem& p, int64_t first, int64_t last, float* sums) {
  const int64_t D = p.D, rows = p.N, activation = p.activation;
  const int64_t step = D < kWide ? rows_at_once(p) : kWideRows, piece = D < kWide ? D : kPiece;
  const float *const weight = p.weight, *const bias = p.bias;
  const bool stream = p.stream;
  float *const dweight = sums, *const dbias = sums + D;
  const float scale = 1.0f / static_cast<float>(D);
  // Of a row: xhat, and dz, for each vector; 0 in lanes beyond k.
  struct Row {
    Line<T> x, dy, residual;
    float mean, invstd, offset;
    const float *weight, *bias;
    int64_t activation;

    SSL_FAST_INLINE V normalised(int64_t i, int k) const { return first_of((x(i, k) - mean) * invstd + offset, k); }
    SSL_FAST_INLINE V gradient(V xhat, int64_t i, int k) const {
      return through<kActivation>(first_of(dy(i, k), k), activation, [&]() SSL_FAST_LAMBDA {
        const V u = xhat * load(weight + i) + load(bias + i);
        return residual ? u + residual(i, k) : u;
      });
    }
  };
  const auto row_of = [&](int64_t row) SSL_FAST_LAMBDA {
    const float invstd = p.stats[2 * rows + row];
    return Row{Line<T>::of(p, p.x, row * D), Line<T>::of(p, p.dy, row * D), Line<T>::of(p, p.residual, row * D),
               p.stats[row], invstd, -p.stats[rows + row] * invstd, weight, bias, activation};
  };
  float even[kRowsAtOnce], along[kRowsAtOnce];
  if (sums != nullptr) std::fill(sums, sums + 2 * D, 0.0f);
  for (int64_t begin = first; begin < last; begin += step) {
    const int64_t count = std::min(step, last - begin);
    for (int64_t r = 0; p.dx != nullptr && r < count; ++r) {
      const Row row = row_of(begin + r);
      const auto both = sum_over<2>(D, [&](int64_t i, int k) SSL_FAST_LAMBDA {
        const V xhat = row.normalised(i, k), g = row.gradient(xhat, i, k) * load(weight + i);
        return Sums<2>{g, g * xhat};
      });
      even[r] = sum_lanes(both.of[0]) * scale;
      along[r] = sum_lanes(both.of[1]) * scale;
    }
    for (int64_t from = 0; from < D; from += piece)
      for (int64_t r = 0; r < count; ++r) {
        const Row row = row_of(begin + r);
        const auto next_x = Line<T>::of(p, p.x, (begin + r + step) * D), next_dy = Line<T>::of(p, p.dy, (begin + r + step) * D);
        T *const dx = line_of<T>(p.dx, (begin + r) * D), *const dresidual = line_of<T>(p.dresidual, (begin + r) * D);
        for_each_vector_of(std::min(piece, D - from), [&](int64_t at, int k) SSL_FAST_LAMBDA {
          const int64_t i = from + at;
          next_x.fetch(i);
          next_dy.fetch(i);
          const V xhat = row.normalised(i, k), dz = row.gradient(xhat, i, k);
          if (dresidual != nullptr) store_first(dresidual + i, dz, k, stream);
          if (dx != nullptr) store_first(dx + i, (dz * load(weight + i) - even[r] - xhat * along[r]) * row.invstd, k, stream);
          if (sums != nullptr) {
            store_first(dweight + i, load_first(dweight + i, k) + dz * xhat, k);
            store_first(dbias + i, load_first(dbias + i, k) + dz, k);
          }
        });
      }
  }
}

// ---- planes

// Where a unit lies: its first number, its first position, how many there are, and how many numbers on the next one lies.
struct Tile {
  int64_t element, position, count, next;

  static SSL_FAST_INLINE Tile of(const Problem& p, int64_t unit) {
    const int64_t n = unit / p.tiles, from = unit % p.tiles * p.tile, count = std::min(p.tile, p.L - from);
    return {n * p.D * p.L + from, n * p.L + from, count, from + count < p.L ? count : p.D * p.L - from};
  }
};

template <class T>
void forward_planes(const Problem& p, int64_t first, int64_t last, float* work) {
  const int64_t padded = round_up(p.tile, kLanes), positions = p.N * p.L, D = p.D, L = p.L, activation = p.activation;
  const bool stream = p.stream;
  const double n = static_cast<double>(D);
  float *const mean = work, *const sum = mean + padded, *const squares = sum + padded;
  float *const invstd = sum, *const offset = squares;
  for (int64_t unit = first; unit < last; ++unit) {
    const Tile tile = Tile::of(p, unit);
    const auto x = Line<T>::of(p, p.x, tile.element), residual = Line<T>::of(p, p.residual, tile.element);
    T* const y = line_of<T>(p.y, tile.element);
    std::fill(sum, sum + 2 * padded, 0.0f);
    for_each_vector_of(tile.count, [&](int64_t i, int k) SSL_FAST_LAMBDA { store(mean + i, x(i, k)); });
    for (int64_t d = 1; d < D; ++d)
      for_each_vector_of(tile.count, [&](int64_t i, int k) SSL_FAST_LAMBDA {
        store(sum + i, load(sum + i) + (x(d * L + i, k) - load(mean + i)));
      });
    for (int64_t i = 0; i < tile.count; ++i) mean[i] = static_cast<float>(mean[i] + sum[i] / n);
    std::fill(sum, sum + padded, 0.0f);
    for (int64_t d = 0; d < D; ++d)
      for_each_vector_of(tile.count, [&](int64_t i, int k) SSL_FAST_LAMBDA {
        const V off = x(d * L + i, k) - load(mean + i);
        store(sum + i, load(sum + i) + off);
        store(squares + i, load(squares + i) + off * off);
      });
    for (int64_t i = 0; i < tile.count; ++i) {
      const Position at = position_of(mean[i], sum[i], squares[i], n, p.eps);
      float* const stats = p.stats + tile.position + i;
      stats[0] = mean[i] = at.mean;
      stats[positions] = at.low;
      stats[2 * positions] = invstd[i] = at.invstd;
      offset[i] = -at.low * at.invstd;
    }
    for (int64_t d = 0; d < D; ++d) {
      const V weight = broadcast(p.weight[d]), bias = broadcast(p.bias[d]);
      for_each_vector_of(tile.count, [&](int64_t i, int k) SSL_FAST_LAMBDA {
        x.fetch(d * L + i + tile.next);
        V u = ((x(d * L + i, k) - load(mean + i)) * load(invstd + i) + load(offset + i)) * weight + bias;
        if (residual) u += residual(d * L + i, k);
        store_first(y + d * L + i, finish<kOther>(u, activation), k, stream);
      });
    }
  }
}

template <class T>
void backward_planes(const Problem& p, int64_t first, int64_t last, float* sums, float* work) {
  const int64_t padded = round_up(p.tile, kLanes), positions = p.N * p.L, D = p.D, L = p.L, activation = p.activation;
  const bool stream = p.stream;
  const float scale = 1.0f / static_cast<float>(D);
  float *const mean = work, *const invstd = mean + padded, *const offset = invstd + padded;
  float *const even = offset + padded, *const along = even + padded;
  if (sums != nullptr) std::fill(sums, sums + 2 * D, 0.0f);
  for (int64_t unit = first; unit < last; ++unit) {
    const Tile tile = Tile::of(p, unit);
    std::fill(work, work + 5 * padded, 0.0f);
    for (int64_t i = 0; i < tile.count; ++i) {
      const float* const stats = p.stats + tile.position + i;
      mean[i] = stats[0];
      invstd[i] = stats[2 * positions];
      offset[i] = -stats[positions] * invstd[i];
    }
    const auto x = Line<T>::of(p, p.x, tile.element), dy = Line<T>::of(p, p.dy, tile.element);
    const auto residual = Line<T>::of(p, p.residual, tile.element);
    T *const dx = line_of<T>(p.dx, tile.element), *const dresidual = line_of<T>(p.dresidual, tile.element);
    // Of number i of line d, which lies `at` numbers on.
    const auto normalised = [&](int64_t at, int64_t i, int k) SSL_FAST_LAMBDA {
      return (x(at, k) - load(mean + i)) * load(invstd + i) + load(offset + i);
    };
    const auto gradient = [&](V xhat, V weight, V bias, int64_t at, int k) SSL_FAST_LAMBDA {
      return through<kOther>(dy(at, k), activation, [&]() SSL_FAST_LAMBDA {
        const V u = xhat * weight + bias;
        return residual ? u + residual(at, k) : u;
      });
    };
    for (int64_t d = 0; dx != nullptr && d < D; ++d) {
      const V weight = broadcast(p.weight[d]), bias = broadcast(p.bias[d]);
      for_each_vector_of(tile.count, [&](int64_t i, int k) SSL_FAST_LAMBDA {
        const V xhat = normalised(d * L + i, i, k), g = gradient(xhat, weight, bias, d * L + i, k) * weight;
        store(even + i, load(even + i) + g);
        store(along + i, load(along + i) + g * xhat);
      });
    }
    for_each_vector_of(padded, [&](int64_t i, int) SSL_FAST_LAMBDA {
      store(even + i, load(even + i) * scale);
      store(along + i, load(along + i) * scale);
    });
    for (int64_t d = 0; d < D; ++d) {
      const V weight = broadcast(p.weight[d]), bias = broadcast(p.bias[d]);
      V dweight = {}, dbias = {};
      for_each_vector_of(tile.count, [&](int64_t i, int k) SSL_FAST_LAMBDA {
        const int64_t at = d * L + i;
        x.fetch(at + tile.next);
        dy.fetch(at + tile.next);
        const V xhat = normalised(at, i, k), dz = gradient(xhat, weight, bias, at, k);
        if (dresidual != nullptr) store_first(dresidual + at, dz, k, stream);
        if (dx != nullptr) {
          store_first(dx + at, (dz * weight - load(even + i) - xhat * load(along + i)) * load(invstd + i), k, stream);
        }
        dweight += first_of(dz * xhat, k);
        dbias += first_of(dz, k);
      });
      if (sums != nullptr) {
        sums[d] += sum_lanes(dweight);
        sums[D + d] += sum_lanes(dbias);
      }
    }
  }
}

// ---- by dtype, layout and activation

// Rows are compiled for the identity, and for every activation; planes for the latter alone.
template <class F>
void with_types(const Problem& p, const F& f) {
  dispatch_float(p.dtype, "layer_norm", [&](auto zero) {
    if (p.L == 1 && p.activation == kIdentity) return f(zero, std::integral_constant<int64_t, kIdentity>{});
    f(zero, std::integral_constant<int64_t, kOther>{});
  });
}

int64_t work_of(const Problem& p) {
  return p.L == 1 ? 0 : 5 * round_up(p.tile, kLanes);
}

void forward(const Problem& p, int64_t first, int64_t last, float* work) {
  with_types(p, [&](auto zero, auto activation) {
    using T = decltype(zero);
    p.L == 1 ? forward_rows<T, activation.value>(p, first, last) : forward_planes<T>(p, first, last, work);
  });
}

void backward(const Problem& p, int64_t first, int64_t last, float* sums, float* work) {
  with_types(p, [&](auto zero, auto activation) {
    using T = decltype(zero);
    p.L == 1 ? backward_rows<T, activation.value>(p, first, last, sums)
             : backward_planes<T>(p, first, last, sums, work);
  });
}

constexpr Kernels kKernels = {work_of, forward, backward};
