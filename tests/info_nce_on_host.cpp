// The kernels of csrc/info_nce.h, launched on the host as csrc/info_nce.cu launches them.
#include "cuda_on_host.h"

#include "info_nce.h"

using namespace ssl_fast::info_nce;

template <class Kernel>
static int run(Problem p, Kernel kernel, int threads, int rows, int keys, int columns, int (*shared_bytes)(int), float* stats,
               float* out) {
  p.chunks = static_cast<int>((p.columns + columns - 1) / columns);
  p.key_tiles = (p.y.rows + keys - 1) / keys;
  if (p.splits > p.key_tiles) p.splits = static_cast<int>(p.key_tiles);
  p.width = (p.columns + 3) / 4 * 4;
  std::vector<float> partial_stats(3 * p.stats_plane(), NAN), partial_out(p.splits * p.x.rows * p.width, NAN);
  p.partial_stats = partial_stats.data();
  p.partial_out = partial_out.data();
  const auto blocks = static_cast<unsigned>((p.x.rows + rows - 1) / rows * p.chunks * p.splits);
  if (!on_host::launch(blocks, threads, shared_bytes(p.chunks), [&] { kernel(p); })) return 1;
  const auto merge_blocks = static_cast<unsigned>(p.x.rows * ((p.columns + kMergeColumns - 1) / kMergeColumns));
  return !on_host::launch(merge_blocks, 32 * kMergeWarps, 0, [&] { merge(p, columns, stats, out); });
}

template <class Tiles>
static int tiles(const Problem& p, float* stats, float* out) {
  return run(p, one_pass_16_bit<Tiles>, Tiles::kThreads, Tiles::kRows, Tiles::kT, Tiles::kD, Tiles::shared_bytes, stats, out);
}

template <class T>
static int tensor_cores(const Problem& p, float* stats, float* out) {
  if (p.columns <= 64) return tiles<Tiles<T, 64, 2, 64>>(p, stats, out);
  if (p.columns <= 128) return tiles<Tiles<T, 128, 2, 48>>(p, stats, out);
  return tiles<Tiles<T, 256, 1, 32>>(p, stats, out);
}

static Matrix matrix_of(const void* data, int64_t rows, const int64_t* strides, int64_t columns) {
  const bool vectors = strides[1] == 1 && strides[0] % 8 == 0 && columns % 8 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  return {data, rows, strides[0], strides[1], vectors};
}

// 0 when done. type: 0 fp32, 1 bf16, 2 fp16.
extern "C" int one_pass(int type, const void* x, const void* y, const int64_t* sizes, const int64_t* strides,
                        const float* temperature, const int64_t* x_ids, const int64_t* y_ids, const int64_t* diagonal,
                        int normalize, int splits, float* stats, float* out) {
  Problem p{};
  p.x = matrix_of(x, sizes[0], strides, sizes[2]);
  p.y = matrix_of(y, sizes[1], strides + 2, sizes[2]);
  p.columns = sizes[2];
  p.temperature = temperature;
  p.x_ids = x_ids;
  p.y_ids = y_ids;
  p.has_diagonal = diagonal != nullptr;
  p.diagonal = diagonal ? *diagonal : 0;
  p.normalize = normalize != 0;
  p.splits = splits;
  if (type == 1) return tensor_cores<torch::headeronly::BFloat16>(p, stats, out);
  if (type == 2) return tensor_cores<torch::headeronly::Half>(p, stats, out);
  return run(p, one_pass_fp32, Fp32::kThreads, Fp32::kRows, Fp32::kT, Fp32::kD, [](int) { return 0; }, stats, out);
}
