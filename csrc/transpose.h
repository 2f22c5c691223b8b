// Transposes of 4-byte elements by vectors of four, which every instruction set has.
#pragma once

#include "common.h"

namespace ssl_fast {

typedef float Quad __attribute__((vector_size(16)));
typedef int32_t QuadIndex __attribute__((vector_size(16)));
typedef float QuadUnaligned __attribute__((vector_size(16), aligned(4)));
// Shuffles take their constants as arguments with clang and as a vector with GCC.
#if defined(__clang__)
#define SSL_FAST_SHUFFLE(Index, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SSL_FAST_SHUFFLE(Index, a, b, ...) __builtin_shuffle(a, b, Index{__VA_ARGS__})
#endif

SSL_FAST_INLINE Quad load_quad(const float* p) { return *reinterpret_cast<const QuadUnaligned*>(p); }
SSL_FAST_INLINE void store_quad(float* p, Quad q) { *reinterpret_cast<QuadUnaligned*>(p) = q; }

SSL_FAST_INLINE void transpose_quads(Quad (&q)[4]) {
  const Quad a = SSL_FAST_SHUFFLE(QuadIndex, q[0], q[1], 0, 4, 1, 5);
  const Quad b = SSL_FAST_SHUFFLE(QuadIndex, q[0], q[1], 2, 6, 3, 7);
  const Quad c = SSL_FAST_SHUFFLE(QuadIndex, q[2], q[3], 0, 4, 1, 5);
  const Quad d = SSL_FAST_SHUFFLE(QuadIndex, q[2], q[3], 2, 6, 3, 7);
  q[0] = SSL_FAST_SHUFFLE(QuadIndex, a, c, 0, 1, 4, 5);
  q[1] = SSL_FAST_SHUFFLE(QuadIndex, a, c, 2, 3, 6, 7);
  q[2] = SSL_FAST_SHUFFLE(QuadIndex, b, d, 0, 1, 4, 5);
  q[3] = SSL_FAST_SHUFFLE(QuadIndex, b, d, 2, 3, 6, 7);
}

// to[c][r] = from[r][c]; rows and cols are multiples of 4.
inline void transpose(const float* from, int64_t ld_from, int64_t rows, int64_t cols, float* to, int64_t ld_to) {
  for (int64_t r = 0; r < rows; r += 4)
    for (int64_t c = 0; c < cols; c += 4) {
      Quad q[4];
      for (int k = 0; k < 4; ++k) q[k] = load_quad(from + (r + k) * ld_from + c);
      transpose_quads(q);
      for (int k = 0; k < 4; ++k) store_quad(to + (c + k) * ld_to + r, q[k]);
    }
}

}  // namespace ssl_fast
