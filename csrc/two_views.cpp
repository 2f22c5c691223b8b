// Augmented views of uint8 images on the CPU: one parallel loop over the views, each made from the crop's bytes to the
// normalised outputs in a thread's own work space.
#include "two_views.h"

#include <optional>
#include <type_traits>
#include <vector>

namespace ssl_fast::two_views {
namespace {

#define SSL_FAST_KERNELS "two_views_kernel.h"
#include "instruction_sets.h"

MakeView kernel_for(ScalarType dtype, int64_t channels) {
  const Kernels& all = kernels();
  const int at = channels == 3;
  switch (dtype) {
    case ScalarType::Float: return all.as_float[at];
    case ScalarType::BFloat16: return all.as_bfloat16[at];
    case ScalarType::Half: return all.as_half[at];
    default:
      STD_TORCH_CHECK(false, "two_views (native CPU): got dtype ", torch::headeronly::toString(dtype),
                      ", allowed: float32, bfloat16, float16");
      return nullptr;
  }
}

// Pixels of views below which waking a second thread takes longer than it saves.
constexpr int64_t kGrainPixels = 8192;

// (N, C, H, W), either format, or with a table of (offset, height, width) images of rows of pixels in one buffer.
std::vector<Image> find_images(const Tensor& images, const std::optional<Tensor>& table, int64_t channels) {
  const auto* const data = static_cast<const uint8_t*>(images.const_data_ptr());
  std::vector<Image> found;
  if (!table) {
    STD_TORCH_CHECK(images.dim() == 4 && images.size(1) == channels, "two_views: images are not (N, ", channels, ", H, W)");
    const int64_t height = images.size(2), width = images.size(3), area = height * width;
    const bool planes = images.is_contiguous();
    STD_TORCH_CHECK(area > 0 || images.size(0) == 0, "two_views: images of ", height, " by ", width, " pixels");
    const int64_t last[4] = {channels * area, 1, channels * width, channels};
    for (int d = 0; !planes && d < 4; ++d)
      STD_TORCH_CHECK(images.size(d) < 2 || images.stride(d) == last[d],
                      "two_views: images are neither contiguous nor channels_last");
    for (int64_t i = 0; i < images.size(0); ++i)
      found.push_back({data + i * channels * area, height, width, planes ? width : width * channels,
                       planes ? 1 : channels, planes ? area : 1});
    return found;
  }
  STD_TORCH_CHECK(table->is_cpu() && table->is_contiguous() && table->dim() == 2 && table->size(1) == 3 &&
                      table->scalar_type() == ScalarType::Long && images.dim() == 1 && images.is_contiguous(),
                  "two_views: packed images are a flat buffer and an (N, 3) int64 table of offsets, heights and widths");
  const auto* const rows = static_cast<const int64_t*>(table->const_data_ptr());
  for (int64_t i = 0; i < table->size(0); ++i) {
    const int64_t offset = rows[3 * i], height = rows[3 * i + 1], width = rows[3 * i + 2];
    STD_TORCH_CHECK(lies_within(offset, height, width, channels, images.numel()), "two_views: image ", i, " of ", height, " by ", width, " pixels at ", offset,
                    " does not lie in a buffer of ", images.numel(), " bytes");
    found.push_back({data + offset, height, width, width * channels, channels, 1});
  }
  return found;
}

Tensor two_views(Tensor images, std::optional<Tensor> table, Tensor params, int64_t channels, int64_t size,
                 std::vector<double> mean, std::vector<double> std, ScalarType dtype) {
  STD_TORCH_CHECK(channels == 1 || channels == 3, "two_views: ", channels, " channels, allowed: 1, 3");
  STD_TORCH_CHECK(size > 0 && size <= 1 << 16, "two_views: views of ", size, " pixels");
  STD_TORCH_CHECK(static_cast<int64_t>(mean.size()) == channels && static_cast<int64_t>(std.size()) == channels,
                  "two_views: mean and std of ", mean.size(), " and ", std.size(), " channels");
  STD_TORCH_CHECK(images.is_cpu() && images.scalar_type() == ScalarType::Byte, "two_views: images are not uint8 on the CPU");
  STD_TORCH_CHECK(params.is_cpu() && params.scalar_type() == ScalarType::Float && params.is_contiguous() &&
                      params.dim() == 2 && params.size(1) == kColumns,
                  "two_views: params are not a contiguous (V, ", static_cast<int64_t>(kColumns), ") of float32");
  const std::vector<Image> found = find_images(images, table, channels);
  const int64_t count = static_cast<int64_t>(found.size()), rows = params.size(0);
  STD_TORCH_CHECK(count ? rows % count == 0 : rows == 0, "two_views: ", rows, " rows of params for ", count, " images");

  Output output{channels, size, {}, {}};
  for (int64_t c = 0; c < channels; ++c) {
    output.mean[c] = static_cast<float>(mean[c]);
    output.scale[c] = static_cast<float>(1 / std[c]);
  }
  const int64_t sizes[] = {rows, channels, size, size};
  const int64_t strides[] = {channels * size * size, 1, channels * size, channels};
  const MakeView make = kernel_for(dtype, channels);
  const int32_t code = dtype == ScalarType::Float ? aoti_torch_dtype_float32()
                       : dtype == ScalarType::Half ? aoti_torch_dtype_float16() : aoti_torch_dtype_bfloat16();
  Tensor out = on_huge_pages(empty_strided(4, sizes, strides, code));
  if (rows == 0) return out;

  const auto* const drawn = static_cast<const float*>(params.const_data_ptr());
  const int64_t each = rows / count;
  std::vector<View> views;  // the views of an image one after the other, which finds it in the cache
  views.reserve(rows);
  int64_t height = 1, width = 1;
  bool waits = false;
  for (int64_t i = 0; i < rows; ++i) {
    const View& view = views.emplace_back(drawn + (i % each * count + i / each) * kColumns, found[i / each], channels, size);
    height = std::max(height, view.height);
    width = std::max(width, view.width);
    waits = waits || view.contrast || view.radius;
  }
  const Space space(channels, size, height, width, waits);
  auto* const to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t bytes = channels * size * size * static_cast<int64_t>(out.element_size());
  Failure failure;
  torch::stable::parallel_for(0, rows, ceil_div(kGrainPixels, size * size), [&](int64_t begin, int64_t end) {
    failure.guard([&] {
      const Scratch work(space.total * static_cast<int64_t>(sizeof(float)));
      for (int64_t i = begin; i < end; ++i)
        make(found[i / each], views[i], output, space, static_cast<float*>(work.get()),
             to + (i % each * count + i / each) * bytes);
    });
  });
  failure.rethrow();
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ssl_fast_native, CPU, m) {
  m.impl("two_views", TORCH_BOX(&two_views));
}

}  // namespace ssl_fast::two_views
