// SSL_FAST_KERNELS, a header that defines `const Kernels kKernels` in vectors of SSL_FAST_LANES floats, compiled once for
// each instruction set; and kernels(), those for this machine. No include guard: included inside an op's own namespace.

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
#undef SSL_FAST_X86_LANES
#undef SSL_FAST_LANES
#endif

const Kernels& kernels() {
#if defined(__x86_64__)
  const Capability capability = std::min(cpu_capability(), detected_capability());
  if (capability >= Capability::kAVX512) return avx512::kKernels;
  if (capability >= Capability::kAVX2) return avx2::kKernels;
#endif
  return portable::kKernels;
}
