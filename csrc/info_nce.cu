// softmax(x y^T / t) y and its row statistics for queries x (N, D) against keys y (K, D) without a gradient, in one pass.
//
// Flops: two products, 4 N K D. Bytes: y once, 2 K D in 16 bits, as all tiles of queries walk over it together; partials,
// 8 D for each of the rows at work, at most 256 a multiprocessor. For N = 256, K = 65,536, D = 128 that is 8.6 GFLOP, and
// 17 MB of keys beside as much again written and read of partials, which stay in the L2 cache. On an H100 the floor is
// 9 us by its 989 TFLOP/s, nearer 14 us by what mma.sync reaches of them, and 5 us by its 3.35 TB/s. Not yet measured.
#include <torch/headeronly/macros/Macros.h>

#include "mma.h"

#include "error_check.h"
#include "info_nce.h"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <optional>
#include <tuple>

namespace {

using ssl_fast::BFloat16;
using ssl_fast::Half;
using namespace ssl_fast::info_nce;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Matrix matrix_of(const Tensor& tensor) {
  Matrix matrix{tensor.const_data_ptr(), tensor.size(0), tensor.stride(0), tensor.stride(1), false};
  matrix.vectors = matrix.column_stride == 1 && matrix.row_stride % 8 == 0 && tensor.size(1) % 8 == 0 &&
                   reinterpret_cast<uintptr_t>(matrix.data) % sizeof(Piece) == 0;
  return matrix;
}

// Contiguous int64 ids, one for each row of a matrix.
Tensor ids_of(const char* name, const Tensor& ids, const Tensor& rows) {
  STD_TORCH_CHECK(ids.is_cuda() && ids.get_device_index() == rows.get_device_index() && ids.dim() == 1 &&
                      ids.size(0) == rows.size(0),
                  "info_nce_one_pass: ", name, ": allowed: one integer for each of the ", rows.size(0),
                  " rows, on their CUDA device");
  return torch::stable::contiguous(ids.scalar_type() == ScalarType::Long ? ids : torch::stable::to(ids, ScalarType::Long));
}

Tensor new_floats(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, ScalarType::Float);
}

// One call: the problem, and where its partials lie.
struct Launch {
  Problem problem;
  Tensor stats, out;
  cudaStream_t stream;

  // Tile sizes in rows of x and y, and the columns of a chunk.
  template <class Kernel, class SharedBytes>
  void operator()(Kernel kernel, int threads, int rows, int keys, int columns, const SharedBytes& shared_bytes) {
    Problem& p = problem;
    p.chunks = static_cast<int>(ceil_div(p.columns, columns));
    p.key_tiles = ceil_div(p.y.rows, keys);
    // Two blocks for each multiprocessor, in one wave; a split's partial is not worth its merging below four tiles.
    const int64_t units = ceil_div(p.x.rows, rows) * p.chunks;
    p.splits = static_cast<int>(std::clamp<int64_t>(2 * multiprocessors() / units, 1, ceil_div(p.key_tiles, 4)));
    p.width = ceil_div(p.columns, 4) * 4;
    const int64_t merge_blocks = p.x.rows * ceil_div(p.columns, kMergeColumns);
    STD_TORCH_CHECK(std::max(units * p.splits, merge_blocks) <= std::numeric_limits<int32_t>::max(),
                    "info_nce_one_pass: ", p.x.rows, " rows of x are more than one grid has blocks; pass fewer");
    // Freed when the call returns, to be used again behind it on the same stream.
    const Tensor partial_stats = new_floats(stats, {3 * p.stats_plane()});
    const Tensor partial_out = new_floats(stats, {p.splits * p.x.rows * p.width});
    p.partial_stats = static_cast<float*>(partial_stats.mutable_data_ptr());
    p.partial_out = static_cast<float*>(partial_out.mutable_data_ptr());

    const int bytes = shared_bytes(p.chunks);
    if (bytes > 0) STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    kernel<<<static_cast<unsigned>(units * p.splits), threads, bytes, stream>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    merge<<<static_cast<unsigned>(merge_blocks), 32 * kMergeWarps, 0, stream>>>(
        p, columns, static_cast<float*>(stats.mutable_data_ptr()), static_cast<float*>(out.mutable_data_ptr()));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <class Tiles>
  void tiles() {
    (*this)(one_pass_16_bit<Tiles>, Tiles::kThreads, Tiles::kRows, Tiles::kT, Tiles::kD, Tiles::shared_bytes);
  }

  // At most 96 KiB of dynamic shared memory and 128 output registers a thread.
  template <class T>
  void tensor_cores() {
    if (problem.columns <= 64) return tiles<Tiles<T, 64, 2, 64>>();
    if (problem.columns <= 128) return tiles<Tiles<T, 128, 2, 48>>();
    tiles<Tiles<T, 256, 1, 32>>();
  }

  void fp32() {
    (*this)(one_pass_fp32, Fp32::kThreads, Fp32::kRows, Fp32::kT, Fp32::kD, [](int) { return 0; });
  }

  int64_t multiprocessors() const {
    int count;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, stats.get_device_index()));
    return count;
  }
};

std::tuple<Tensor, Tensor> info_nce_one_pass(Tensor x, Tensor y, Tensor temperature, std::optional<Tensor> x_ids,
                                             std::optional<Tensor> y_ids, std::optional<int64_t> diagonal,
                                             bool normalize) {
  STD_TORCH_CHECK(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1) && x.size(1) > 0 && y.size(0) > 0,
                  "info_nce_one_pass: x and y: allowed: (N, D) and (K, D) with K and D of at least 1");
  const auto device = x.get_device_index();
  for (const Tensor& tensor : {y, temperature}) {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device,
                    "info_nce_one_pass: y and temperature: allowed: the device of x, CUDA device ", device);
  }
  STD_TORCH_CHECK(x.scalar_type() == y.scalar_type(), "info_nce_one_pass: y: allowed: the dtype of x");
  STD_TORCH_CHECK(temperature.scalar_type() == ScalarType::Float && temperature.numel() == 1,
                  "info_nce_one_pass: temperature: allowed: a float32 tensor of one element");

  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  Launch launch{{}, new_floats(x, {4, x.size(0)}), new_floats(x, {x.size(0), x.size(1)}),
                static_cast<cudaStream_t>(stream)};
  if (x.size(0) == 0) return {launch.stats, launch.out};

  Problem& p = launch.problem;
  p.x = matrix_of(x);
  p.y = matrix_of(y);
  p.columns = x.size(1);
  p.temperature = static_cast<const float*>(temperature.const_data_ptr());
  p.has_diagonal = diagonal.has_value();
  p.diagonal = diagonal.value_or(0);
  p.normalize = normalize;
  Tensor x_kept, y_kept;  // ids that were converted live until the launch
  if (x_ids && y_ids) {
    x_kept = ids_of("x_ids", *x_ids, x);
    y_kept = ids_of("y_ids", *y_ids, y);
    p.x_ids = static_cast<const int64_t*>(x_kept.const_data_ptr());
    p.y_ids = static_cast<const int64_t*>(y_kept.const_data_ptr());
  }
  switch (x.scalar_type()) {
    case ScalarType::Half: launch.tensor_cores<Half>(); break;
    case ScalarType::BFloat16: launch.tensor_cores<BFloat16>(); break;
    case ScalarType::Float: launch.fp32(); break;
    default: STD_TORCH_CHECK(false, "info_nce_one_pass: x: allowed: float16, bfloat16, float32");
  }
  return {launch.stats, launch.out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ssl_fast_native, CUDA, m) {
  m.impl("info_nce_one_pass", TORCH_BOX(&info_nce_one_pass));
}
