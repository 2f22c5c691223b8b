// A 32 x 32 block of fp32 sums in four AMX tiles, and the same four operations in software, for tests on any machine.
#pragma once

#include "common.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define SSL_FAST_HAS_AMX 1
#endif

namespace ssl_fast {

// Strides count elements. a: 32 rows of 32 bf16; b: 16 rows of 32 pairs of bf16; sums: 32 rows of 32 floats.
class EmulatedTiles {
 public:
  static constexpr int kHeight = 32;
  static constexpr bool kInRegisters = false;

  void zero() { std::memset(sums_, 0, sizeof(sums_)); }
  void load(const float* sums, int64_t ld) {
    for (int r = 0; r < 32; ++r) std::memcpy(sums_[r], sums + r * ld, sizeof(sums_[r]));
  }
  void store(float* sums, int64_t ld) const {
    for (int r = 0; r < 32; ++r) std::memcpy(sums + r * ld, sums_[r], sizeof(sums_[r]));
  }
  // As TDPBF16PS but for denormals: sums of their own over the first and the second of each pair, then their sum.
  void multiply(const uint16_t* a, int64_t ld_a, const uint32_t* b, int64_t ld_b) {
    for (int r = 0; r < 32; ++r) {
      float first[32] = {}, second[32] = {};
      for (int k = 0; k < 16; ++k)
        for (int c = 0; c < 32; ++c) {
          const uint32_t pair = b[k * ld_b + c];
          first[c] += widen(a[r * ld_a + 2 * k]) * widen(static_cast<uint16_t>(pair));
          second[c] += widen(a[r * ld_a + 2 * k + 1]) * widen(static_cast<uint16_t>(pair >> 16));
        }
      for (int c = 0; c < 32; ++c) sums_[r][c] += first[c] + second[c];
    }
  }

 private:
  static float widen(uint16_t bf16) {
    const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  float sums_[32][32];
};

#if defined(SSL_FAST_HAS_AMX)
SSL_FAST_TARGET_BEGIN("amx-tile,amx-bf16")
// Tiles 0 .. 3 hold the sums, 4 and 5 the halves of a, 6 and 7 those of b: four products for four loads. An object owns
// the tiles of its thread while it lives. The fences keep the compiler from moving ordinary stores past the tile loads, and
// from leaving out stores to the configuration, of which GCC's intrinsic names the first 8 bytes alone.
class AMXTiles {
 public:
  static constexpr int kHeight = 32;
  static constexpr bool kInRegisters = false;

  AMXTiles() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    const Config config;
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~AMXTiles() { _tile_release(); }
  AMXTiles(const AMXTiles&) = delete;
  AMXTiles& operator=(const AMXTiles&) = delete;

  SSL_FAST_INLINE void zero() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  SSL_FAST_INLINE void load(const float* sums, int64_t ld) {
    fence();
    _tile_loadd(0, sums, ld * 4);
    _tile_loadd(1, sums + 16, ld * 4);
    _tile_loadd(2, sums + 16 * ld, ld * 4);
    _tile_loadd(3, sums + 16 * ld + 16, ld * 4);
  }
  SSL_FAST_INLINE void store(float* sums, int64_t ld) {
    _tile_stored(0, sums, ld * 4);
    _tile_stored(1, sums + 16, ld * 4);
    _tile_stored(2, sums + 16 * ld, ld * 4);
    _tile_stored(3, sums + 16 * ld + 16, ld * 4);
    fence();
  }
  SSL_FAST_INLINE void multiply(const uint16_t* a, int64_t ld_a, const uint32_t* b, int64_t ld_b) {
    fence();
    _tile_loadd(4, a, ld_a * 2);
    _tile_loadd(6, b, ld_b * 4);
    _tile_loadd(7, b + 16, ld_b * 4);
    _tile_loadd(5, a + 16 * ld_a, ld_a * 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }

 private:
  static SSL_FAST_INLINE void fence() { asm volatile("" ::: "memory"); }
};
SSL_FAST_TARGET_END
#endif

}  // namespace ssl_fast
