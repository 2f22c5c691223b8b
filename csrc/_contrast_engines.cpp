// The kernels of contrastive losses, compiled once for each instruction set, and the choice between them.
#include "amx_tiles.h"
#include "contrast_tiles.h"
#include "transpose.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace ssl_fast::contrast {
namespace {

#define SSL_FAST_EXP_DEGREE 5
#define SSL_FAST_LANES 4
#if defined(__aarch64__)
#define SSL_FAST_ROWS 12
#else
#define SSL_FAST_ROWS 6
#endif
namespace portable {
#include "simd.h"
#include "contrast_register_tile.h"
#include "contrast_fp32.h"
#include "contrast_kernel.h"
}  // namespace portable
#undef SSL_FAST_LANES
#undef SSL_FAST_ROWS

#if defined(__x86_64__)
#define SSL_FAST_LANES 8
#define SSL_FAST_ROWS 6
SSL_FAST_TARGET_BEGIN("avx2,fma")
namespace avx2 {
#include "simd.h"
#include "contrast_register_tile.h"
#include "contrast_fp32.h"
#include "contrast_kernel.h"
}  // namespace avx2
SSL_FAST_TARGET_END
#undef SSL_FAST_LANES
#undef SSL_FAST_ROWS

#define SSL_FAST_LANES 16
#define SSL_FAST_ROWS 12
SSL_FAST_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512 {
#include "simd.h"
#include "contrast_register_tile.h"
#include "contrast_fp32.h"
#include "contrast_kernel.h"
}  // namespace avx512
SSL_FAST_TARGET_END
#undef SSL_FAST_ROWS
#undef SSL_FAST_LANES
#endif
#undef SSL_FAST_EXP_DEGREE

#define SSL_FAST_EXP_DEGREE 3
#define SSL_FAST_LANES 16
#define SSL_FAST_TILES PairTiles
#if defined(__x86_64__)
#define SSL_FAST_HAS_BF16
#define SSL_FAST_ROWS 12
SSL_FAST_TARGET_BEGIN("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512_bf16 {
#include "simd.h"
#include "contrast_register_tile.h"
#include "pair_tiles.h"
#include "contrast_bf16.h"
#include "contrast_kernel.h"
}  // namespace avx512_bf16
SSL_FAST_TARGET_END
#undef SSL_FAST_ROWS
#undef SSL_FAST_HAS_BF16
#endif

#define SSL_FAST_EMULATE_PAIRS
#define SSL_FAST_ROWS 2
namespace avx512_bf16_emulated {
#include "simd.h"
#include "contrast_register_tile.h"
#include "pair_tiles.h"
#include "contrast_bf16.h"
#include "contrast_kernel.h"
}  // namespace avx512_bf16_emulated
#undef SSL_FAST_ROWS
#undef SSL_FAST_EMULATE_PAIRS
#undef SSL_FAST_TILES

#if defined(SSL_FAST_HAS_AMX)
#define SSL_FAST_TILES AMXTiles
#define SSL_FAST_HAS_BF16
#define SSL_FAST_ROWS 8
SSL_FAST_TARGET_BEGIN("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace amx {
#include "simd.h"
#include "contrast_register_tile.h"
#include "contrast_bf16.h"
#include "contrast_kernel.h"
}  // namespace amx
SSL_FAST_TARGET_END
#undef SSL_FAST_ROWS
#undef SSL_FAST_HAS_BF16
#undef SSL_FAST_TILES
#endif

#define SSL_FAST_TILES EmulatedTiles
#define SSL_FAST_ROWS 2
namespace amx_emulated {
#include "simd.h"
#include "contrast_register_tile.h"
#include "contrast_bf16.h"
#include "contrast_kernel.h"
}  // namespace amx_emulated
#undef SSL_FAST_ROWS
#undef SSL_FAST_TILES
#undef SSL_FAST_LANES
#undef SSL_FAST_EXP_DEGREE

}  // namespace

Engine choose_engine(ScalarType dtype) {
  const bool bf16 = dtype == ScalarType::BFloat16;
  const Capability capability = cpu_capability();
  if (bf16 && capability == Capability::kEmulatedAMX) return {amx_emulated::kKernels, true};
  if (bf16 && capability == Capability::kEmulatedAVX512BF16) return {avx512_bf16_emulated::kKernels, true};
#if defined(SSL_FAST_HAS_AMX)
  if (bf16 && capability == Capability::kAMX) return {amx::kKernels, true};
#endif
#if defined(__x86_64__)
  const Capability detected = std::min(capability, detected_capability());
  if (bf16 && detected >= Capability::kAVX512BF16) return {avx512_bf16::kKernels, true};
  if (detected >= Capability::kAVX512) return {avx512::kKernels, false};
  if (detected >= Capability::kAVX2) return {avx2::kKernels, false};
#endif
  return {portable::kKernels, false};
}

}  // namespace ssl_fast::contrast
