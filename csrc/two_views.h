// What the host code and the vector code of the views share: an image, what is drawn for a view, and work space for it.
#pragma once

#include "common.h"

#include <cmath>
#include <utility>

namespace ssl_fast::two_views {

// Columns of a row of parameters, as COLUMNS of ssl_fast/ops/two_views.py.
enum Column {
  kTop, kLeft, kHeight, kWidth, kAngle, kFlip, kOrder, kBrightness, kContrast, kSaturation, kHue, kGray, kSigma, kKernel,
  kSolarize, kColumns
};

constexpr int64_t kPad = 64;  // lanes that are read beyond the end of a row, as zeros

struct Image {
  const uint8_t* data;
  int64_t height, width, row, pixel, channel;  // the last three: strides in bytes
};

// Whether an image of a table lies in a buffer of so many bytes; for any numbers, without overflow.
inline bool lies_within(int64_t offset, int64_t height, int64_t width, int64_t channels, int64_t bytes) {
  constexpr int64_t kMost = int64_t{1} << 24;
  return offset >= 0 && height > 0 && width > 0 && height <= kMost && width <= kMost &&
         height * width * channels <= bytes - offset;
}

struct Step {
  enum Kind { kBrightness, kContrast, kSaturation, kHue, kGray } kind;
  float factor;
};

// A row of parameters within their bounds, whatever was given, so that nothing outside the image is read.
struct View {
  int64_t top, left, height, width;
  double angle;
  bool flip;
  Step steps[5];
  int count = 0, before = 0;  // steps; those before contrast
  bool contrast = false;
  float sigma, solarize;
  int64_t radius = 0;  // of the blur; 0: none

  View(const float* p, const Image& image, int64_t channels, int64_t size) {
    const auto within = [](double x, double low, double high) {
      return static_cast<int64_t>(std::isfinite(x) ? std::min(std::max<double>(x, low), high) : low);
    };
    top = within(p[kTop], 0, static_cast<double>(image.height - 1));
    left = within(p[kLeft], 0, static_cast<double>(image.width - 1));
    height = within(p[kHeight], 1, static_cast<double>(image.height - top));
    width = within(p[kWidth], 1, static_cast<double>(image.width - left));
    angle = std::isfinite(p[kAngle]) ? p[kAngle] : 0;
    flip = p[kFlip] != 0;
    int64_t order = within(p[kOrder], 0, 23);  // of the permutations of 4 in lexicographic order
    int left_over[4] = {0, 1, 2, 3};
    constexpr int64_t kOthers[4] = {6, 2, 1, 1};
    for (int i = 0; i < 4; ++i) {
      const int at = static_cast<int>(order / kOthers[i]);
      order %= kOthers[i];
      const int kind = left_over[at];
      for (int j = at; j + 1 < 4; ++j) left_over[j] = left_over[j + 1];
      const float factor = p[kBrightness + kind];
      const bool changes = std::isfinite(factor) && factor != (kind == 3 ? 0.0f : 1.0f);
      if (changes && (channels == 3 || kind < 2)) add({static_cast<Step::Kind>(kind), factor});
    }
    if (p[kGray] != 0 && channels == 3) add({Step::kGray, 0});
    if (!contrast) before = count;
    sigma = p[kSigma];
    constexpr double kNegligible = 5;  // deviations: a weight of 4e-6
    if (sigma > 0 && std::isfinite(sigma))
      radius = std::min({within(p[kKernel], 1, 1e6) / 2, within(std::ceil(kNegligible * sigma), 1, 1e6), size - 1});
    solarize = p[kSolarize];
  }

 private:
  void add(Step step) {
    if (step.kind == Step::kContrast) {
      contrast = true;
      before = count;
    }
    steps[count++] = step;
  }
};

// Taps of the antialiased bilinear (triangle) filter along one dimension, from `from` pixels to `to`: those of torch's
// interpolate(antialias=True).
struct Filter {
  double scale, support;
  int64_t from, taps;  // at most so many for an output

  Filter(int64_t from, int64_t to)
      : scale(static_cast<double>(from) / static_cast<double>(to)), support(std::max(scale, 1.0)), from(from),
        taps(std::min(from, static_cast<int64_t>(std::ceil(support)) * 2 + 1)) {}

  // Writes the weights of an output, `stride` apart, and returns its first input; `count` inputs have a weight.
  int64_t weights(int64_t output, float* out, int64_t stride, float factor, int64_t& count) const {
    const double centre = scale * (static_cast<double>(output) + 0.5);
    const int64_t first = std::max<int64_t>(static_cast<int64_t>(centre - support + 0.5), 0);
    count = std::clamp<int64_t>(std::min(static_cast<int64_t>(centre + support + 0.5), from) - first, 1, taps);
    double sum = 0;
    for (int64_t t = 0; t < count; ++t) sum += weight(first + t, centre);
    for (int64_t t = 0; t < count; ++t) out[t * stride] = static_cast<float>(weight(first + t, centre) / sum) * factor;
    for (int64_t t = count; t < taps; ++t) out[t * stride] = 0;
    return first;
  }

 private:
  double weight(int64_t input, double centre) const {
    return std::max(0.0, 1 - std::abs(static_cast<double>(input) + 0.5 - centre) / support);
  }
};

// Offsets in floats into a thread's work space, for the largest view of a call.
struct Space {
  int64_t padded, columns, column_weights, row_weights, rows, source, ring, buffer, line, blur, total;

  Space(int64_t channels, int64_t size, int64_t height, int64_t width, bool whole_view)
      : padded(round_up(size, 16)) {
    const int64_t across = Filter(width, size).taps, down = Filter(height, size).taps;
    int64_t at = 0;
    const auto take = [&](int64_t count) { return std::exchange(at, at + round_up(count, 16)); };
    columns = take(padded);
    column_weights = take(padded * across);
    row_weights = take(std::max(down, 2 * size));
    rows = take(std::max(down, 2 * size) * static_cast<int64_t>(sizeof(float*) / sizeof(float)));
    source = take(channels * (width + across + kPad));
    ring = take(channels * padded * down);
    buffer = take(channels * padded * (whole_view ? size : 1));
    line = take(channels * padded + 2 * size + kPad);
    blur = take(size);
    total = at;
  }
};

struct Output {
  int64_t channels, size;
  float mean[3], scale[3];  // scale: 1 / std
};

using MakeView = void (*)(const Image&, const View&, const Output&, const Space&, float* work, void* out);

struct Kernels {
  MakeView as_float[2], as_bfloat16[2], as_half[2];  // of 1 and of 3 channels
};

}  // namespace ssl_fast::two_views
