// One view in vectors of SSL_FAST_LANES floats; after simd.h and simd_types.h. No include guard: see there.
//
// A row of the source becomes floats, then `size` outputs (horizontal filter), which stay in a ring of as many rows as
// the vertical filter reads. A row of outputs gets all colour steps at once, unless there is contrast, whose mean all
// rows before it must have: then the view waits in a buffer, as it does for the vertical half of a blur.

#if SSL_FAST_X86_LANES == 16
SSL_FAST_INLINE V gather(const float* p, VInt at) { return (V)_mm512_i32gather_ps((__m512i)at, p, 4); }
// Lanes of (a, b), 0 to 2 * kLanes - 1.
SSL_FAST_INLINE V pick(V a, V b, VInt at) { return (V)_mm512_permutex2var_ps((__m512)a, (__m512i)at, (__m512)b); }
#elif SSL_FAST_X86_LANES == 8
SSL_FAST_INLINE V gather(const float* p, VInt at) { return (V)_mm256_i32gather_ps(p, (__m256i)at, 4); }
SSL_FAST_INLINE V pick(V a, V b, VInt at) {
  const __m256 low = _mm256_permutevar8x32_ps((__m256)a, (__m256i)at), high = _mm256_permutevar8x32_ps((__m256)b, (__m256i)at);
  return (V)_mm256_blendv_ps(low, high, (__m256)(at << 28));
}
#else
SSL_FAST_INLINE V gather(const float* p, VInt at) {
  V v;
  for (int lane = 0; lane < kLanes; ++lane) v[lane] = p[at[lane]];
  return v;
}
SSL_FAST_INLINE V pick(V a, V b, VInt at) {
  float both[2 * kLanes];
  store(both, a);
  store(both + kLanes, b);
  return gather(both, at);
}
#endif

SSL_FAST_INLINE V clamped(V x) { return at_most(at_least(x, 0.0f), 1.0f); }
SSL_FAST_INLINE V smaller(V a, V b) { return a < b ? a : b; }
SSL_FAST_INLINE V larger(V a, V b) { return a > b ? a : b; }
SSL_FAST_INLINE V gray_of(const V* x) { return 0.2989f * x[0] + 0.587f * x[1] + 0.114f * x[2]; }

// The hue turned by `turn` sixths of a circle, 0 <= turn < 6, with saturation and value kept. A channel is
// value - range * clamp(min(k, 4 - k), 0, 1), k = (hue + 5, 3, 1 for r, g, b) mod 6.
SSL_FAST_INLINE void turn_hue(V* x, float turn) {
  const V most = larger(larger(x[0], x[1]), x[2]), least = smaller(smaller(x[0], x[1]), x[2]);
  const V range = most - least, by = 1.0f / (range == 0.0f ? broadcast(1.0f) : range);
  V hue = most == x[0] ? (x[1] - x[2]) * by : most == x[1] ? (x[2] - x[0]) * by + 2.0f : (x[0] - x[1]) * by + 4.0f;
  hue += turn;  // -1 to 11
  constexpr float kOffset[3] = {5, 3, 1};
  for (int c = 0; c < 3; ++c) {
    V k = hue + kOffset[c];
    k = k >= 12.0f ? k - 12.0f : k;
    k = k >= 6.0f ? k - 6.0f : k;
    x[c] = clamped(most - range * clamped(smaller(k, 4.0f - k)));
  }
}

template <int C>
SSL_FAST_INLINE void apply(const Step& step, V* x, float mean) {
  const float f = step.factor;
  switch (step.kind) {
    case Step::kBrightness:
      for (int c = 0; c < C; ++c) x[c] = clamped(x[c] * f);
      return;
    case Step::kContrast:
      for (int c = 0; c < C; ++c) x[c] = clamped(x[c] * f + (1 - f) * mean);
      return;
    default: break;
  }
  if constexpr (C == 3) {
    if (step.kind == Step::kHue) return turn_hue(x, 6 * (f - std::floor(f)));
    const V gray = gray_of(x);
    for (int c = 0; c < C; ++c) x[c] = step.kind == Step::kGray ? gray : clamped(x[c] * f + (1 - f) * gray);
  }
}

// Steps first .. last - 1 of a row of C planes; the sum of its grey values afterwards where `sums`.
template <int C>
double colour_row(const View& view, int first, int last, float* row, int64_t padded, float mean, bool sums) {
  V sum{};
  for (int64_t i = 0; i < padded; i += kLanes) {
    V x[C];
    for (int c = 0; c < C; ++c) x[c] = load(row + c * padded + i);
    for (int s = first; s < last; ++s) apply<C>(view.steps[s], x, mean);
    for (int c = 0; c < C; ++c) store(row + c * padded + i, x[c]);
    if (!sums) continue;
    if constexpr (C == 3) {
      sum += gray_of(x);  // 0 in the padding, which every step but contrast leaves at 0
    } else {
      sum += x[0];
    }
  }
  return sums ? sum_lanes(sum) : 0;
}

// Solarised, normalised and interleaved.
template <int C, class T>
void store_row(const View& view, const Output& output, const float* row, int64_t padded, T* out) {
  const float threshold = view.solarize;
  VInt pixel[C], channel[C];
  for (int k = 0; k < C; ++k) {
    for (int lane = 0; lane < kLanes; ++lane) {
      pixel[k][lane] = (k * kLanes + lane) / C;
      channel[k][lane] = (k * kLanes + lane) % C;
    }
  }
  for (int64_t i = 0; i < output.size; i += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, output.size - i) * C;
    V x[C];
    for (int c = 0; c < C; ++c) {
      V v = load(row + c * padded + i);
      v = v >= threshold ? 1.0f - v : v;
      x[c] = (v - output.mean[c]) * output.scale[c];
    }
    for (int k = 0; k < C && k * kLanes < n; ++k) {
      V v = x[0];
      if constexpr (C == 3) {
        v = pick(x[0], x[1], pixel[k] + (channel[k] == 1 ? VInt{} + kLanes : VInt{}));
        v = channel[k] == 2 ? pick(x[2], x[2], pixel[k]) : v;
      }
      store_first(out + i * C + k * kLanes, v, static_cast<int>(std::min<int64_t>(kLanes, n - k * kLanes)));
    }
  }
}

// Calls f with the number of vectors to take at a time, several while they last: their sums do not wait for each other.
template <class F>
SSL_FAST_INLINE void in_vectors(int64_t length, const F& f) {
  constexpr int kVectors = 4;
  int64_t i = 0;
  for (; i + kVectors * kLanes <= length; i += kVectors * kLanes) f(i, std::integral_constant<int, kVectors>{});
  for (; i < length; i += kLanes) f(i, std::integral_constant<int, 1>{});
}

// out = sum of weights[t] * rows[t], t < count; `length` a multiple of kLanes.
SSL_FAST_INLINE void weighted_sum(const float* weights, const float* const* rows, int64_t count, int64_t length, float* out) {
  in_vectors(length, [&](int64_t i, auto vectors) SSL_FAST_LAMBDA {
    V sum[vectors];
    for (int v = 0; v < vectors; ++v) sum[v] = weights[0] * load(rows[0] + i + v * kLanes);
    for (int64_t t = 1; t < count; ++t)
      for (int v = 0; v < vectors; ++v) sum[v] += weights[t] * load(rows[t] + i + v * kLanes);
    for (int v = 0; v < vectors; ++v) store(out + i + v * kLanes, sum[v]);
  });
}

// A plane's row convolved in place with weights[|d|], |d| <= radius; reflected at the borders, which are not repeated.
// line: padded + 2 radius.
SSL_FAST_INLINE void blur_row(const float* weights, int64_t radius, float* row, int64_t size, float* line) {
  for (int64_t i = 0; i < size; i += kLanes) store(line + radius + i, load(row + i));
  for (int64_t d = 1; d <= radius; ++d) {
    line[radius - d] = row[d];
    line[radius + size - 1 + d] = row[size - 1 - d];
  }
  in_vectors(round_up(size, kLanes), [&](int64_t i, auto vectors) SSL_FAST_LAMBDA {
    const float* const at = line + radius + i;
    V sum[vectors];
    for (int v = 0; v < vectors; ++v) sum[v] = weights[0] * load(at + v * kLanes);
    for (int64_t d = 1; d <= radius; ++d)
      for (int v = 0; v < vectors; ++v) sum[v] += weights[d] * (load(at + v * kLanes - d) + load(at + v * kLanes + d));
    for (int v = 0; v < vectors; ++v) store(row + i + v * kLanes, sum[v]);
  });
}

// A row of the crop as C planes of 0 to 255.
template <int C>
void load_row(const Image& image, const View& view, int64_t y, float* planes, int64_t stride) {
  if (view.angle == 0) {
    const uint8_t* const from = image.data + (view.top + y) * image.row + view.left * image.pixel;
    if (image.pixel == 1) {
      for (int c = 0; c < C; ++c) {
        const uint8_t* const plane = from + c * image.channel;
        float* __restrict const to = planes + c * stride;
        for (int64_t x = 0; x < view.width; ++x) to[x] = plane[x];
      }
    } else {
      float* __restrict const to = planes;
      for (int64_t x = 0; x < view.width; ++x)
        for (int c = 0; c < C; ++c) to[c * stride + x] = from[x * C + c];
    }
    return;
  }
  // Bilinear at the place that the rotation about the image's centre brings here; zeros outside.
  const double sine = std::sin(view.angle * (M_PI / 180)), cosine = std::cos(view.angle * (M_PI / 180));
  const double half_x = static_cast<double>(image.width) / 2, half_y = static_cast<double>(image.height) / 2;
  const double down = static_cast<double>(view.top + y) + 0.5 - half_y;
  for (int64_t x = 0; x < view.width; ++x) {
    const double along = static_cast<double>(view.left + x) + 0.5 - half_x;
    const double at_x = cosine * along - sine * down + half_x - 0.5, at_y = sine * along + cosine * down + half_y - 0.5;
    const double floor_x = std::floor(at_x), floor_y = std::floor(at_y);
    const double part_x = at_x - floor_x, part_y = at_y - floor_y;
    double sum[C] = {};
    for (int corner = 0; corner < 4; ++corner) {
      const int64_t px = static_cast<int64_t>(floor_x) + (corner & 1), py = static_cast<int64_t>(floor_y) + (corner >> 1);
      if (px < 0 || py < 0 || px >= image.width || py >= image.height) continue;
      const double weight = (corner & 1 ? part_x : 1 - part_x) * (corner >> 1 ? part_y : 1 - part_y);
      const uint8_t* const from = image.data + py * image.row + px * image.pixel;
      for (int c = 0; c < C; ++c) sum[c] += weight * from[c * image.channel];
    }
    for (int c = 0; c < C; ++c) planes[c * stride + x] = static_cast<float>(sum[c]);
  }
}

// The horizontal filter: `padded` outputs of one plane.
SSL_FAST_INLINE void filter_row(const float* plane, const int32_t* columns, const float* weights, int64_t taps,
                                int64_t padded, float* out) {
  for (int64_t i = 0; i < padded; i += kLanes) {
    const VInt at = load_int(columns + i);
    const int32_t first = std::min(columns[i], columns[i + kLanes - 1]);
    const int32_t last = std::max(columns[i], columns[i + kLanes - 1]) + static_cast<int32_t>(taps);
    V sum{};
    if (last - first <= 2 * kLanes) {
      const V a = load(plane + first), b = load(plane + first + kLanes);
      const VInt from = at - first;
      for (int32_t t = 0; t < taps; ++t) sum += load(weights + t * padded + i) * pick(a, b, from + t);
    } else {
      for (int32_t t = 0; t < taps; ++t) sum += load(weights + t * padded + i) * gather(plane + t, at);
    }
    store(out + i, sum);
  }
}

template <int C, class T>
void make_view(const Image& image, const View& view, const Output& output, const Space& space, float* work, void* to) {
  T* const out = static_cast<T*>(to);
  const int64_t size = output.size, padded = space.padded, planes = C * padded;
  const Filter across(view.width, size), down(view.height, size);
  auto* const columns = reinterpret_cast<int32_t*>(work + space.columns);
  float* const column_weights = work + space.column_weights;
  std::fill(column_weights, column_weights + across.taps * padded, 0.0f);
  int64_t count;
  for (int64_t x = 0; x < size; ++x) {
    const int64_t at = view.flip ? size - 1 - x : x;
    columns[at] = static_cast<int32_t>(across.weights(x, column_weights + at, padded, 1.0f / 255, count));
  }
  std::fill(columns + size, columns + padded, columns[size - 1]);
  float* const source = work + space.source;
  const int64_t stride = view.width + across.taps + kPad;
  for (int c = 0; c < C; ++c) std::fill(source + c * stride + view.width, source + (c + 1) * stride, 0.0f);

  float* const blur = work + space.blur;
  const int64_t radius = view.radius;
  double sum = 0;
  for (int64_t d = 0; d <= radius; ++d) {
    const double over = radius ? static_cast<double>(d) / view.sigma : 0;
    sum += (d ? 2 : 1) * (blur[d] = static_cast<float>(std::exp(-0.5 * over * over)));
  }
  for (int64_t d = 0; d <= radius; ++d) blur[d] = static_cast<float>(blur[d] / sum);

  const bool waits = view.contrast || radius;
  float* const buffer = work + space.buffer;
  float* const line = work + space.line;
  const auto finished = [&](float* row, int64_t y) {  // all colour steps are done
    if (!radius) return store_row<C>(view, output, row, padded, out + y * size * C);
    for (int c = 0; c < C; ++c) blur_row(blur, radius, row + c * padded, size, line);
  };

  float* const ring = work + space.ring;
  float* const row_weights = work + space.row_weights;
  auto** const rows = reinterpret_cast<const float**>(work + space.rows);
  int64_t filtered = 0;
  double gray = 0;
  for (int64_t y = 0; y < size; ++y) {
    const int64_t first = down.weights(y, row_weights, 1, 1.0f, count);
    for (filtered = std::max(filtered, first); filtered < first + count; ++filtered) {
      load_row<C>(image, view, filtered, source, stride);
      for (int c = 0; c < C; ++c)
        filter_row(source + c * stride, columns, column_weights, across.taps, padded,
                   ring + filtered % down.taps * planes + c * padded);
    }
    float* const row = buffer + (waits ? y * planes : 0);
    for (int64_t t = 0; t < count; ++t) rows[t] = ring + (first + t) % down.taps * planes;
    weighted_sum(row_weights, rows, count, planes, row);
    gray += colour_row<C>(view, 0, view.before, row, padded, 0, view.contrast);
    if (!view.contrast) finished(row, y);
  }
  if (view.contrast) {
    const float mean = static_cast<float>(gray / static_cast<double>(size * size));
    for (int64_t y = 0; y < size; ++y) {
      colour_row<C>(view, view.before, view.count, buffer + y * planes, padded, mean, false);
      finished(buffer + y * planes, y);
    }
  }
  if (!radius) return;
  for (int64_t d = 0; d < radius; ++d) row_weights[d] = row_weights[2 * radius - d] = blur[radius - d];
  row_weights[radius] = blur[0];
  for (int64_t y = 0; y < size; ++y) {
    for (int64_t d = -radius; d <= radius; ++d) {
      const int64_t at = std::abs(y + d);
      rows[radius + d] = buffer + (at < size ? at : 2 * size - 2 - at) * planes;
    }
    weighted_sum(row_weights, rows, 2 * radius + 1, planes, line);
    store_row<C>(view, output, line, padded, out + y * size * C);
  }
}

constexpr Kernels kKernels = {
    {make_view<1, float>, make_view<3, float>},
    {make_view<1, BFloat16>, make_view<3, BFloat16>},
    {make_view<1, Half>, make_view<3, Half>},
};
