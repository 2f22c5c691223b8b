// The views of csrc/two_views_kernel.h under the sanitizers: images and outputs in blocks of their own size, gaps that
// must not be touched between the parts of the work space, odd shapes, and tables and parameters that no one should give.
#include "two_views.h"

#include <sanitizer/asan_interface.h>

#include <cstdio>
#include <limits>
#include <type_traits>

#if defined(__AVX2__)
#define SSL_FAST_LANES 8
#define SSL_FAST_X86_LANES 8
#else
#define SSL_FAST_LANES 4
#endif

namespace ssl_fast::two_views {
#include "simd.h"
#include "simd_types.h"
#include "two_views_kernel.h"
}  // namespace ssl_fast::two_views

using namespace ssl_fast;
using namespace ssl_fast::two_views;

namespace {

uint32_t state = 1;
uint32_t draw(uint32_t below) { return (state = state * 1664525 + 1013904223, state >> 8) % below; }

constexpr int64_t kGap = 64;

// The parts of the work space, further apart.
Space apart(Space space) {
  int64_t shift = 0;
  for (int64_t* part : {&space.columns, &space.column_weights, &space.row_weights, &space.rows, &space.source, &space.ring,
                        &space.buffer, &space.line, &space.blur, &space.total})
    *part += shift, shift += kGap;
  return space;
}

void poison(const Space& space, float* work, void (*change)(const volatile void*, size_t)) {
  for (int64_t end : {space.column_weights, space.row_weights, space.rows, space.source, space.ring, space.buffer,
                      space.line, space.blur, space.total})
    change(work + end - kGap, kGap * sizeof(float));
}

template <class T>
bool view_is_finite(MakeView make, const Image& image, const float* params, int64_t channels, int64_t size) {
  const View view(params, image, channels, size);
  const Output output{channels, size, {0.1f, 0.2f, 0.3f}, {1, 2, 3}};
  const Space space = apart(Space(channels, size, view.height, view.width, view.contrast || view.radius));
  std::unique_ptr<T[]> out(new T[channels * size * size]);
  const Buffer<float> work(space.total);
  std::fill(work.get(), work.get() + space.total, std::numeric_limits<float>::quiet_NaN());
  poison(space, work.get(), __asan_poison_memory_region);
  make(image, view, output, space, work.get(), out.get());
  poison(space, work.get(), __asan_unpoison_memory_region);
  for (int64_t i = 0; i < channels * size * size; ++i)
    if (!std::isfinite(static_cast<float>(out[i]))) return false;
  return true;
}

}  // namespace

int main() {
  const float odd[] = {0, 1, -1, 1e30f, -1e30f, std::numeric_limits<float>::infinity(),
                       std::numeric_limits<float>::quiet_NaN(), 0.5f, 3, 7};
  for (int round = 0; round < 400; ++round) {
    const int64_t channels = draw(2) ? 3 : 1, size = 1 + draw(round % 4 ? 40 : 3);
    const int64_t height = 1 + draw(60), width = 1 + draw(round % 8 ? 60 : 400), area = height * width;
    std::unique_ptr<uint8_t[]> bytes(new uint8_t[channels * area]);
    for (int64_t i = 0; i < channels * area; ++i) bytes[i] = static_cast<uint8_t>(draw(256));
    const bool planes = draw(2) || channels == 1;
    const Image image{bytes.get(), height, width, planes ? width : width * channels, planes ? 1 : channels, planes ? area : 1};
    float params[kColumns] = {0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 2};
    params[kTop] = static_cast<float>(draw(height)), params[kLeft] = static_cast<float>(draw(width));
    params[kHeight] = 1 + draw(height), params[kWidth] = 1 + draw(width);
    params[kAngle] = draw(3) ? 0 : draw(360), params[kFlip] = draw(2), params[kOrder] = draw(24);
    for (int column : {kBrightness, kContrast, kSaturation}) params[column] = draw(3) ? draw(200) / 100.0f : 1;
    params[kHue] = draw(100) / 100.0f - 0.5f, params[kGray] = draw(2), params[kSigma] = draw(2) ? draw(50) / 10.0f : 0;
    params[kKernel] = 2 * draw(40) + 1, params[kSolarize] = draw(3);
    const bool hostile = round % 3 == 0;
    if (hostile) params[draw(kColumns)] = odd[draw(10)], params[draw(kColumns)] = odd[draw(10)];
    const int at = channels == 3;
    const bool finite = round % 3 == 0   ? view_is_finite<float>(kKernels.as_float[at], image, params, channels, size)
                        : round % 3 == 1 ? view_is_finite<BFloat16>(kKernels.as_bfloat16[at], image, params, channels, size)
                                         : view_is_finite<Half>(kKernels.as_half[at], image, params, channels, size);
    if (!finite && !hostile) return std::printf("round %d: not finite\n", round), 1;
  }
  // Rows of a table from all kinds of numbers: an image that is said to lie in the buffer is read whole.
  const int64_t most = std::numeric_limits<int64_t>::max(), bytes = 96;
  const int64_t numbers[] = {0, 1, 2, 4, 5, 8, 31, 32, 33, 95, 96, 97, -1, -4, 1 << 24, (1 << 24) + 1, int64_t{1} << 31,
                             int64_t{1} << 62, most, most - 95, std::numeric_limits<int64_t>::min()};
  std::unique_ptr<uint8_t[]> buffer(new uint8_t[bytes]());
  const float row[kColumns] = {0, 0, 1e9f, 1e9f, 0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 2};  // the whole image
  int inside = 0;
  for (int64_t offset : numbers)
    for (int64_t height : numbers)
      for (int64_t width : numbers)
        for (int64_t channels : {1, 3}) {
          if (!lies_within(offset, height, width, channels, bytes)) continue;
          const Image image{buffer.get() + offset, height, width, width * channels, channels, 1};
          ++inside;
          if (!view_is_finite<float>(kKernels.as_float[channels == 3], image, row, channels, 5))
            return std::puts("a table: not finite"), 1;
        }
  if (inside < 50 || lies_within(92, 1, 5, 1, bytes) || lies_within(bytes, 1, 1, 1, bytes) || !lies_within(91, 1, 5, 1, bytes))
    return std::printf("a table: %d images\n", inside), 1;
  std::puts("done");
}
