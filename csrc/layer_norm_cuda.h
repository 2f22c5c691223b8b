// Layer norm on a GPU, both ways: the kernels behind layer_norm.cu.
//
// Plain C++ wherever mma.h's instructions and CUDA's built-ins have a stand-in: the tests run the same code on the host.
//
// Memory is N blocks of D rows of L numbers, with statistics over D for each of N L positions. Rows (L = 1): `across`
// threads share one, V numbers each, so that a block of threads has several narrow rows at a time; a wider row is walked
// over forward, and backward is cut into columns of as many numbers, behind a launch that finds its two means. Planes: a
// warp reads 32 V neighbouring positions, and the warps of a block share D. Every block of the backward owns a run of
// tiles and leaves one partial of the affine gradients, which the last launch adds in order.
#pragma once

#include "batch_norm_cuda.h"

namespace ssl_fast::layer_norm {

using batch_norm::kIdentity;
using batch_norm::kLeakyRelu;
using batch_norm::kWarp;
using batch_norm::Pack;

constexpr int kThreads = 256, kWarps = kThreads / 32;

struct Problem {
  int64_t N, D, L;
  int64_t tiles, per_part;  // of kThreads / across rows, or of 32 V positions; and of them for each part
  int parts, across;
  const void *x, *residual, *dy;
  const float *weight, *bias;
  void *y, *dx, *dresidual;
  float *stats, *means, *partials;  // (3, N L); (2, N L) or none; (parts, 2, D) or none
  float *dweight, *dbias;
  float eps;
  int activation;
};

template <int V>
constexpr int kSharedBytes = 2 * V * kThreads * static_cast<int>(sizeof(float));

__device__ inline float* shared_floats() { return reinterpret_cast<float*>(dynamic_shared()); }

// Two sums over the threads that share a row, for each of them. The whole block calls it.
__device__ inline void sum_across(float (&v)[2], int across) {
  for (int lanes = 1; lanes < across && lanes < 32; lanes *= 2) {
    v[0] += __shfl_xor_sync(kWarp, v[0], lanes);
    v[1] += __shfl_xor_sync(kWarp, v[1], lanes);
  }
  if (across <= 32) return;
  float* const scratch = shared_floats();
  const int warp = thread_index() / 32, warps = across / 32, first = warp / warps * warps;
  __syncthreads();
  if (thread_index() % 32 == 0) {
    scratch[2 * warp] = v[0];
    scratch[2 * warp + 1] = v[1];
  }
  __syncthreads();
  v[0] = v[1] = 0;
  for (int other = first; other < first + warps; ++other) {
    v[0] += scratch[2 * other];
    v[1] += scratch[2 * other + 1];
  }
}

// Sums over the warps of a block of what each holds for its positions. The whole block calls it.
template <int V>
__device__ void sum_down(float (&a)[V], float (&b)[V]) {
  float* const scratch = shared_floats();
  const int thread = thread_index(), lane = thread % 32;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < V; ++j) {
    scratch[j * kThreads + thread] = a[j];
    scratch[(V + j) * kThreads + thread] = b[j];
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < V; ++j) {
    a[j] = b[j] = 0;
    for (int warp = 0; warp < kWarps; ++warp) {
      a[j] += scratch[j * kThreads + 32 * warp + lane];
      b[j] += scratch[(V + j) * kThreads + 32 * warp + lane];
    }
  }
}

template <class T, int V>
__device__ void load(const void* from, int64_t at, bool live, float (&values)[V]) {
  const auto v = live ? *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(from) + at) : Pack<T, V>{};
#pragma unroll
  for (int j = 0; j < V; ++j) values[j] = static_cast<float>(v.x[j]);
}

template <class T, int V>
__device__ void store(void* to, int64_t at, bool live, const float (&values)[V]) {
  if (!live) return;
  Pack<T, V> v;
#pragma unroll
  for (int j = 0; j < V; ++j) v.x[j] = static_cast<T>(values[j]);
  *reinterpret_cast<Pack<T, V>*>(static_cast<T*>(to) + at) = v;
}

// Of a guess of the mean, and the means of what lies off it and of the squares of that.
struct Position {
  float mean, low, invstd;

  __device__ static Position of(float guess, float rest, float squares, float eps) {
    const float mean = guess + rest, var = squares - rest * rest;
    return {mean, (guess - mean) + rest, rsqrtf((var < 0 ? 0 : var) + eps)};
  }
  __device__ static Position at(const Problem& p, int64_t i, bool inside) {
    if (!inside) return {0, 0, 0};
    const int64_t all = p.N * p.L;
    return {p.stats[i], p.stats[all + i], p.stats[2 * all + i]};
  }
  __device__ void keep(const Problem& p, int64_t i) const {
    const int64_t all = p.N * p.L;
    p.stats[i] = mean;
    p.stats[all + i] = low;
    p.stats[2 * all + i] = invstd;
  }
  __device__ float operator()(float x) const { return ((x - mean) - low) * invstd; }
};

__device__ inline float weight_of(const Problem& p, int64_t d) { return p.weight ? p.weight[d] : 1; }
__device__ inline float bias_of(const Problem& p, int64_t d) { return p.bias ? p.bias[d] : 0; }

// u from xhat, spelt out alike both ways: signs found again are the forward's.
template <class T, int V>
__device__ void pre_activation(const Problem& p, const float (&xhat)[V], const float (&weight)[V], const float (&bias)[V],
                               int64_t at, bool live, float (&u)[V]) {
  float residual[V] = {};
  if (p.residual) load<T, V>(p.residual, at, live, residual);
#pragma unroll
  for (int j = 0; j < V; ++j) u[j] = std::fma(xhat[j], weight[j], bias[j]) + residual[j];
}

// dz, 0 where nothing is.
template <class T, int V>
__device__ void gradient(const Problem& p, const float (&xhat)[V], const float (&weight)[V], const float (&bias)[V], int64_t at,
                         bool live, float (&dz)[V]) {
  load<T, V>(p.dy, at, live, dz);
  if (p.activation == kIdentity) return;
  float u[V];
  pre_activation<T, V>(p, xhat, weight, bias, at, live, u);
  const float slope = batch_norm::slope_of(p.activation);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    if (p.activation > kLeakyRelu) {
      dz[j] *= batch_norm::derivative(u[j], p.activation);
    } else if (u[j] <= 0) {
      dz[j] = batch_norm::sloped(dz[j], slope);
    }
  }
}

// ---- rows

// Calls f(column, whether it exists) for this thread's vectors of a row; all threads that share one go on together.
template <int V, class F>
__device__ void over_columns(const Problem& p, int x, const F& f) {
  for (int64_t first = 0; first < p.D; first += static_cast<int64_t>(p.across) * V) {
    const int64_t column = first + x * V;
    f(column, column < p.D);
  }
}

// The mean is guessed by a sum of x - pivot, the pivot being a row's first number: exact where all are equal.
template <class T, int V>
__device__ void forward_rows(const Problem& p) {
  const int x = thread_index() % p.across;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / p.across) + thread_index() / p.across;
  const bool inside = row < p.N;
  const int64_t start = inside ? row * p.D : 0;
  const float pivot = inside ? static_cast<float>(static_cast<const T*>(p.x)[start]) : 0, share = 1 / static_cast<float>(p.D);
  // What a row of at most across V numbers holds stays in registers.
  float held[V];
  load<T, V>(p.x, start + x * V, inside && x * V < p.D, held);
  const auto values = [&](int64_t column, bool live, float(&v)[V]) {
    if (column == x * V) {
      for (int j = 0; j < V; ++j) v[j] = held[j];
    } else {
      load<T, V>(p.x, start + column, live, v);
    }
  };
  float sums[2] = {};
  over_columns<V>(p, x, [&](int64_t column, bool exists) {
    float v[V];
    values(column, exists && inside, v);
    for (int j = 0; j < V; ++j) sums[0] += exists ? v[j] - pivot : 0;
  });
  sum_across(sums, p.across);
  const float guess = pivot + sums[0] * share;
  sums[0] = sums[1] = 0;
  over_columns<V>(p, x, [&](int64_t column, bool exists) {
    float v[V];
    values(column, exists && inside, v);
    for (int j = 0; j < V; ++j) {
      const float off = exists ? v[j] - guess : 0;
      sums[0] += off;
      sums[1] += off * off;
    }
  });
  sum_across(sums, p.across);
  const auto position = Position::of(guess, sums[0] * share, sums[1] * share, p.eps);
  if (inside && x == 0) position.keep(p, row);
  over_columns<V>(p, x, [&](int64_t column, bool exists) {
    const bool live = exists && inside;
    if (!live) return;
    float v[V], weight[V], bias[V], u[V];
    values(column, live, v);
    for (int j = 0; j < V; ++j) {
      v[j] = position(v[j]);
      weight[j] = weight_of(p, column + j);
      bias[j] = bias_of(p, column + j);
    }
    pre_activation<T, V>(p, v, weight, bias, start + column, live, u);
    batch_norm::activate(u, p.activation);
    store<T, V>(p.y, start + column, live, u);
  });
}

// Means over a row of g = weight dz, and of g xhat.
template <class T, int V>
__device__ void means_of_rows(const Problem& p) {
  const int x = thread_index() % p.across;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / p.across) + thread_index() / p.across;
  const bool inside = row < p.N;
  const auto position = Position::at(p, row, inside);
  float sums[2] = {};
  over_columns<V>(p, x, [&](int64_t column, bool exists) {
    const bool live = exists && inside;
    float xhat[V], weight[V], bias[V], dz[V];
    load<T, V>(p.x, row * p.D + column, live, xhat);
    for (int j = 0; j < V; ++j) {
      xhat[j] = position(xhat[j]);
      weight[j] = live ? weight_of(p, column + j) : 0;
      bias[j] = live ? bias_of(p, column + j) : 0;
    }
    gradient<T, V>(p, xhat, weight, bias, row * p.D + column, live, dz);
    for (int j = 0; j < V; ++j) {
      sums[0] += dz[j] * weight[j];
      sums[1] += dz[j] * weight[j] * xhat[j];
    }
  });
  sum_across(sums, p.across);
  if (inside && x == 0) {
    p.means[row] = sums[0] / static_cast<float>(p.D);
    p.means[p.N + row] = sums[1] / static_cast<float>(p.D);
  }
}

template <class T, int V>
__device__ void backward_rows(const Problem& p) {
  const int x = thread_index() % p.across, y = thread_index() / p.across, rows = kThreads / p.across;
  const int part = static_cast<int>(blockIdx.x) % p.parts;
  const int64_t block = static_cast<int64_t>(blockIdx.x) / p.parts * p.across * V, column = block + x * V;
  const bool exists = column < p.D;
  const float share = 1 / static_cast<float>(p.D);
  float weight[V], bias[V], dweight[V] = {}, dbias[V] = {};
  for (int j = 0; j < V; ++j) {
    weight[j] = exists ? weight_of(p, column + j) : 0;
    bias[j] = exists ? bias_of(p, column + j) : 0;
  }
  for (int64_t tile = part * p.per_part; tile < p.tiles && tile < (part + 1) * p.per_part; ++tile) {
    const int64_t row = tile * rows + y, at = row * p.D + column;
    const bool inside = row < p.N, live = inside && exists;
    const auto position = Position::at(p, row, inside);
    float xhat[V], dz[V];
    load<T, V>(p.x, at, live, xhat);
    for (int j = 0; j < V; ++j) xhat[j] = live ? position(xhat[j]) : 0;
    gradient<T, V>(p, xhat, weight, bias, at, live, dz);
    if (p.dresidual) store<T, V>(p.dresidual, at, live, dz);
    if (p.dx) {
      float sums[2] = {};
      if (p.means) {
        sums[0] = inside ? p.means[row] : 0;
        sums[1] = inside ? p.means[p.N + row] : 0;
      } else {
        for (int j = 0; j < V; ++j) {
          sums[0] += dz[j] * weight[j];
          sums[1] += dz[j] * weight[j] * xhat[j];
        }
        sum_across(sums, p.across);
        sums[0] *= share;
        sums[1] *= share;
      }
      float dx[V];
      for (int j = 0; j < V; ++j) dx[j] = (dz[j] * weight[j] - sums[0] - xhat[j] * sums[1]) * position.invstd;
      store<T, V>(p.dx, at, live, dx);
    }
    for (int j = 0; j < V; ++j) {
      dweight[j] += dz[j] * xhat[j];
      dbias[j] += dz[j];
    }
  }
  if (!p.partials) return;
  float* const scratch = shared_floats();  // (rows, 2, across V)
  const int width = p.across * V;
  __syncthreads();
  for (int j = 0; j < V; ++j) {
    scratch[2 * y * width + x * V + j] = dweight[j];
    scratch[(2 * y + 1) * width + x * V + j] = dbias[j];
  }
  __syncthreads();
  for (int i = thread_index(); i < 2 * width; i += kThreads) {
    const int64_t d = block + i % width;
    float sum = 0;
    for (int row = 0; row < rows; ++row) sum += scratch[2 * row * width + i];
    if (d < p.D) p.partials[(2 * static_cast<int64_t>(part) + i / width) * p.D + d] = sum;
  }
}

// ---- planes

// Of a tile: the number and the first element of this thread's first position, and whether there is one.
template <int V>
struct Place {
  int64_t position, element;
  bool inside;

  __device__ static Place of(const Problem& p, int64_t tile) {
    const int64_t tiles = p.tiles / p.N, n = tile / tiles, l = (tile % tiles * 32 + thread_index() % 32) * V;
    return {n * p.L + l, n * p.D * p.L + l, l < p.L};
  }
};

template <class T, int V>
__device__ void forward_planes(const Problem& p) {
  const auto place = Place<V>::of(p, blockIdx.x);
  const int y = thread_index() / 32;
  const float share = 1 / static_cast<float>(p.D);
  float guess[V], sum[V] = {}, squares[V] = {}, v[V];
  load<T, V>(p.x, place.element, place.inside, guess);
  for (int64_t d = y; d < p.D; d += kWarps) {
    load<T, V>(p.x, place.element + d * p.L, place.inside, v);
    for (int j = 0; j < V; ++j) sum[j] += v[j] - guess[j];
  }
  sum_down(sum, squares);
  for (int j = 0; j < V; ++j) {
    guess[j] += sum[j] * share;
    sum[j] = squares[j] = 0;
  }
  for (int64_t d = y; d < p.D; d += kWarps) {
    load<T, V>(p.x, place.element + d * p.L, place.inside, v);
    for (int j = 0; j < V; ++j) {
      const float off = v[j] - guess[j];
      sum[j] += off;
      squares[j] += off * off;
    }
  }
  sum_down(sum, squares);
  Position positions[V];
  for (int j = 0; j < V; ++j) {
    positions[j] = Position::of(guess[j], sum[j] * share, squares[j] * share, p.eps);
    if (place.inside && y == 0) positions[j].keep(p, place.position + j);
  }
  for (int64_t d = y; d < p.D; d += kWarps) {
    const int64_t at = place.element + d * p.L;
    float weight[V], bias[V], u[V];
    load<T, V>(p.x, at, place.inside, v);
    for (int j = 0; j < V; ++j) {
      v[j] = positions[j](v[j]);
      weight[j] = weight_of(p, d);
      bias[j] = bias_of(p, d);
    }
    pre_activation<T, V>(p, v, weight, bias, at, place.inside, u);
    batch_norm::activate(u, p.activation);
    store<T, V>(p.y, at, place.inside, u);
  }
}

template <class T, int V>
__device__ void backward_planes(const Problem& p) {
  const int y = thread_index() / 32, part = static_cast<int>(blockIdx.x);
  const float share = 1 / static_cast<float>(p.D);
  const int64_t first = part * p.per_part;
  for (int64_t tile = first; tile < p.tiles && tile < first + p.per_part; ++tile) {
    const auto place = Place<V>::of(p, tile);
    Position positions[V];
    for (int j = 0; j < V; ++j) positions[j] = Position::at(p, place.position + j, place.inside);
    // dz, xhat and the weight of channel d.
    const auto read = [&](int64_t d, float(&xhat)[V], float(&dz)[V], float(&weight)[V]) {
      const int64_t at = place.element + d * p.L;
      float bias[V];
      load<T, V>(p.x, at, place.inside, xhat);
      for (int j = 0; j < V; ++j) {
        xhat[j] = positions[j](xhat[j]);
        weight[j] = weight_of(p, d);
        bias[j] = bias_of(p, d);
      }
      gradient<T, V>(p, xhat, weight, bias, at, place.inside, dz);
    };
    float even[V] = {}, along[V] = {}, xhat[V], dz[V], weight[V];
    if (p.dx) {
      for (int64_t d = y; d < p.D; d += kWarps) {
        read(d, xhat, dz, weight);
        for (int j = 0; j < V; ++j) {
          even[j] += dz[j] * weight[j];
          along[j] += dz[j] * weight[j] * xhat[j];
        }
      }
      sum_down(even, along);
    }
    for (int64_t d = y; d < p.D; d += kWarps) {
      read(d, xhat, dz, weight);
      const int64_t at = place.element + d * p.L;
      if (p.dresidual) store<T, V>(p.dresidual, at, place.inside, dz);
      if (p.dx) {
        float dx[V];
        for (int j = 0; j < V; ++j) {
          dx[j] = (dz[j] * weight[j] - even[j] * share - xhat[j] * (along[j] * share)) * positions[j].invstd;
        }
        store<T, V>(p.dx, at, place.inside, dx);
      }
      if (p.partials) {
        float sums[2] = {};
        for (int j = 0; j < V; ++j) {
          sums[0] += dz[j] * xhat[j];
          sums[1] += dz[j];
        }
        sum_across(sums, 32);
        if (thread_index() % 32 == 0) {  // alone to write there
          float* const own = p.partials + 2 * static_cast<int64_t>(part) * p.D + d;
          own[0] = tile == first ? sums[0] : own[0] + sums[0];
          own[p.D] = tile == first ? sums[1] : own[p.D] + sums[1];
        }
      }
    }
  }
}

__device__ inline void merge(const Problem& p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + thread_index();
  if (i >= 2 * p.D) return;
  float sum = 0;
  for (int part = 0; part < p.parts; ++part) sum += p.partials[2 * static_cast<int64_t>(part) * p.D + i];
  *(i < p.D ? p.dweight + i : p.dbias + (i - p.D)) = sum;
}

// ---- the host's part

struct Launches {
  int64_t forward, backward, merge;  // blocks of threads
  bool wide;                         // rows that need the launch for their means
};

// Fills in how the problem is cut, for vectors of V numbers and so many blocks of the backward at a time.
inline Launches cut(Problem& p, int V, int64_t slots) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  p.across = 1;
  while (p.across < kThreads && static_cast<int64_t>(p.across) * V < p.D) p.across *= 2;
  const int64_t columns = p.L == 1 ? ceil_div(p.D, static_cast<int64_t>(p.across) * V) : 1;
  p.tiles = p.L == 1 ? ceil_div(p.N, kThreads / p.across) : p.N * ceil_div(p.L, 32 * V);
  p.per_part = ceil_div(p.tiles, slots / columns > 1 ? slots / columns : 1);
  p.parts = static_cast<int>(ceil_div(p.tiles, p.per_part));
  return {p.tiles, p.parts * columns, ceil_div(2 * p.D, kThreads), columns > 1};
}

}  // namespace ssl_fast::layer_norm
