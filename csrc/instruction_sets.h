// SSL_FAST_KERNELS, a header that defines `const Kernels kKernels` in vectors of SSL_FAST_LANES floats, compiled once for
// each instruction set; and kernels(), those for this machine. With SSL_FAST_WRITES_BF16 also for AVX-512 whose rounding to
// bf16 is an instruction. No include guard: included inside an op's own namespace.

#define SSL_FAST_LANES 4
namespace portable {
#include "simd.h"
#include "simd_types.h"
#include SSL_FAST_KERNELS
}  // namespace portable
#undef SSL_FAST_LANES

#if defined(__x86_64__)
#define SSL_FAST_LANES 8
#define SSL_FAST_X86_LANES 8
SSL_FAST_TARGET_BEGIN("avx2,fma,f16c")
namespace avx2 {
#include "simd.h"
#include "simd_types.h"
#include SSL_FAST_KERNELS
}  // namespace avx2
SSL_FAST_TARGET_END
#undef SSL_FAST_X86_LANES
#undef SSL_FAST_LANES

#define SSL_FAST_LANES 16
#define SSL_FAST_X86_LANES 16
SSL_FAST_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 {
#include "simd.h"
#include "simd_types.h"
#include SSL_FAST_KERNELS
}  // namespace avx512
SSL_FAST_TARGET_END

#if defined(SSL_FAST_WRITES_BF16)
#define SSL_FAST_X86_BF16
SSL_FAST_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
namespace avx512_bf16 {
#include "simd.h"
#include "simd_types.h"
#include SSL_FAST_KERNELS
}  // namespace avx512_bf16
SSL_FAST_TARGET_END
#undef SSL_FAST_X86_BF16
#endif
#undef SSL_FAST_X86_LANES
#undef SSL_FAST_LANES
#endif

const Kernels& kernels() {
#if defined(__x86_64__)
  const Capability capability = std::min(cpu_capability(), detected_capability());
#if defined(SSL_FAST_WRITES_BF16)
  if (capability >= Capability::kAVX512BF16) return avx512_bf16::kKernels;
#endif
  if (capability >= Capability::kAVX512) return avx512::kKernels;
  if (capability >= Capability::kAVX2) return avx2::kKernels;
#endif
  return portable::kKernels;
}
