// softmax(x y^T / t) y and its row statistics in one pass over y: the kernels behind info_nce.cu.
//
// Plain C++ wherever mma.h's instructions and CUDA's built-ins have a stand-in: the tests run the same code on the host.
//
// Work is cut three ways. A block owns a tile of queries (rows of x), a split of the keys (rows of y) and a chunk of the
// output's columns, which is all of them up to kD. It walks over its keys a tile at a time, keeps the largest similarity
// of each query as it goes, and leaves what it found, relative to that, as a partial. A second kernel merges the partials
// in the order of the splits. Chunks do not share the similarities: each computes them over all of D.
//
// y is used as it was loaded. Its norms, found from the tile in shared memory, scale the columns of S = x y^T, and the
// columns of P in front of the second product, P y; the norms of x scale the rows of S, in its exponent.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

namespace ssl_fast::info_nce {

constexpr unsigned kWarp = 0xffffffff;
constexpr float kInfinity = INFINITY;

struct Matrix {
  const void* data;
  int64_t rows, row_stride, column_stride;
  bool vectors;  // its rows are made of aligned pieces of 16 bytes
};

struct Problem {
  Matrix x, y;
  int64_t columns;  // D
  const float* temperature;
  const int64_t *x_ids, *y_ids;  // both or neither
  int64_t diagonal;
  bool has_diagonal, normalize;
  int splits, chunks;
  int64_t key_tiles;
  float* partial_stats;  // (3, splits, chunks, N): largest similarity, sum and moment of exp((s - largest) / t)
  float* partial_out;    // (splits, N, width): the sum of exp((s - largest) / t) times rows of y
  int64_t width;         // D rounded up to whole 16 bytes

  C10_HOST_DEVICE int64_t stats_at(int split, int chunk, int64_t row) const {
    return (static_cast<int64_t>(split) * chunks + chunk) * x.rows + row;
  }
  C10_HOST_DEVICE int64_t stats_plane() const { return static_cast<int64_t>(splits) * chunks * x.rows; }
  C10_HOST_DEVICE int64_t out_at(int split, int64_t row, int64_t column) const {
    return (split * x.rows + row) * width + column;
  }
};

// What one block computes: blocks of one tile of queries are neighbours, splits innermost.
struct Place {
  int split, chunk;
  int64_t row, key_tile, key_tiles_end;

  C10_HOST_DEVICE static Place of(const Problem& p, int64_t block, int rows) {
    const int split = static_cast<int>(block % p.splits);
    return {split, static_cast<int>(block / p.splits % p.chunks), block / p.splits / p.chunks * rows,
            p.key_tiles * split / p.splits, p.key_tiles * (split + 1) / p.splits};
  }
};

// log2(e) / t, NaN where t is not above 0: it reaches every output.
__device__ inline float exponent_scale(const Problem& p) {
  const float t = *p.temperature;
  return t > 0 ? 1.4426950408889634f / t : NAN;
}

// What exponents are relative to: 0 for a row that has seen nothing, as -inf less -inf is not a number.
C10_HOST_DEVICE inline float finite_shift(float largest) { return largest == -kInfinity ? 0.0f : largest; }

// 1 / max(norm, 1e-12). A NaN is lost here, and still in the row.
__device__ inline float inverse_norm(float squares) { return fminf(rsqrtf(squares), 1e12f); }

// Which columns of one tile of keys a query may not see.
struct Mask {
  int keys;      // in the tile, of those that exist
  int diagonal;  // the key left out by position, or none: -1
  bool ids;
  int64_t id;

  __device__ static Mask of(const Problem& p, int64_t row, int64_t key, int tile, int64_t row_id) {
    const int64_t rest = p.y.rows - key, at = row + p.diagonal - key;
    return {rest < tile ? static_cast<int>(rest) : tile,
            p.has_diagonal && at >= 0 && at < tile ? static_cast<int>(at) : -1, p.x_ids != nullptr, row_id};
  }

  __device__ bool hides(int key, int64_t key_id) const {
    return key >= keys || key == diagonal || (ids && key_id == id);
  }

  // Whether any of the queries needs a mask on a tile of keys.
  __device__ static bool needed(const Problem& p, int64_t row, int rows, int64_t key, int tile) {
    const int64_t first = row + p.diagonal - key;  // the diagonal crosses the tile at the keys first to first + rows - 1
    return p.x_ids || key + tile > p.y.rows || (p.has_diagonal && first < tile && first + rows > 0);
  }
};

// ---- 16-bit inputs: tensor cores

// kD columns, a power of two from 64 up; a warp owns 16 kM queries, a tile of y has kT keys. Two blocks of these share a
// multiprocessor, so that one's exponentials run under the other's products.
template <class T_, int kD_, int kM_, int kT_>
struct Tiles {
  using T = T_;
  static constexpr int kD = kD_, kM = kM_, kT = kT_, kThreads = 128;
  static constexpr int kRows = kThreads / 32 * 16 * kM;
  static constexpr int kPieces = kD / 8;  // of 16 bytes in a row
  static constexpr bool kChunked = kD == 256;  // takes any D
  static constexpr int kXBytes = kRows * kD * 2, kYBytes = kT * kD * 2;

  // Two tiles of y, one read as the next arrives; where D is cut in chunks, the queries arrive with them.
  static constexpr int shared_bytes(int chunks) { return (chunks > 1 ? 2 : 1) * kXBytes + 2 * kYBytes; }
};

struct alignas(16) Piece {
  uint16_t bits[8];
};

// Where a piece of a tile's row lies. Pieces are permuted within groups of eight by the row, so that neither eight rows of
// one piece (a matrix load) nor eight pieces of one row (a copy) meet in a bank.
template <int kPieces>
C10_HOST_DEVICE inline int piece_at(int row, int piece) {
  return (row * kPieces + (piece ^ (row & 7))) * static_cast<int>(sizeof(Piece));
}

// The piece that a lane names in a matrix load of 16 x 16 numbers: of the left operand as it lies, and of the right operand
// of P y, transposed, tiles go down the rows first; of the right operand of x y^T, along D first.
template <int kPieces>
C10_HOST_DEVICE inline int down_first(int lane) {
  return piece_at<kPieces>(lane & 15, lane >> 4);
}

template <int kPieces>
C10_HOST_DEVICE inline int along_first(int lane) {
  return piece_at<kPieces>((lane & 7) + ((lane >> 4) << 3), lane >> 3 & 1);
}

// The address of such a piece moved by whole rows, a multiple of eight, and by pairs of pieces. Tiles lie at multiples of
// their rows' bytes, so that a pair's bits meet nothing but the permutation.
template <int kPieces>
C10_HOST_DEVICE inline uint32_t moved_by(uint32_t address, int rows, int pairs) {
  return (address ^ static_cast<uint32_t>(pairs * 2 * sizeof(Piece))) + static_cast<uint32_t>(rows * kPieces * sizeof(Piece));
}

// kRows rows of a matrix and kD of its columns into shared memory, zeros beyond its edges.
template <int kRows, int kD, int kThreads>
__device__ inline void stage(char* tile, const Matrix& matrix, int64_t first_row, int64_t first_column, int64_t columns) {
  constexpr int kPieces = kD / 8, kStep = kThreads / kPieces;
  static_assert(kThreads % kPieces == 0 && kRows % kStep == 0);
  const auto* data = static_cast<const uint16_t*>(matrix.data);
  const int thread = thread_index(), piece = thread % kPieces;
  const int64_t column = first_column + 8 * piece;
  if (matrix.vectors) {
#pragma unroll 2
    for (int row = thread / kPieces; row < kRows; row += kStep) {
      const bool inside = first_row + row < matrix.rows && column < columns;
      const auto* from = inside ? data + (first_row + row) * matrix.row_stride + column : data;
      copy_async(tile + piece_at<kPieces>(row, piece), from, inside);
    }
    return;
  }
#pragma unroll 1
  for (int row = thread / kPieces; row < kRows; row += kStep) {
    Piece copy;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const bool inside = first_row + row < matrix.rows && column + e < columns;
      copy.bits[e] = inside ? data[(first_row + row) * matrix.row_stride + (column + e) * matrix.column_stride] : 0;
    }
    *reinterpret_cast<Piece*>(tile + piece_at<kPieces>(row, piece)) = copy;
  }
}

template <class T>
__device__ inline float sum_of_squares(const Piece& piece) {
  float sum = 0;
#pragma unroll
  for (int e = 0; e < 8; ++e) {
    const float value = T(piece.bits[e], T::from_bits());
    sum += value * value;
  }
  return sum;
}

// Adds the squares of a tile's rows to those of the chunks before. A row is always the same eight lanes'; its first lane
// alone touches squares[row].
template <class T, int kRows, int kD, int kThreads>
__device__ inline void add_squares(const char* tile, float* squares, bool first) {
  constexpr int kPieces = kD / 8;
  static_assert(kRows % (kThreads / 8) == 0);
  const int thread = thread_index();
#pragma unroll 2
  for (int row = thread / 8; row < kRows; row += kThreads / 8) {
    float sum = 0;
#pragma unroll
    for (int piece = thread % 8; piece < kPieces; piece += 8) {
      sum += sum_of_squares<T>(*reinterpret_cast<const Piece*>(tile + piece_at<kPieces>(row, piece)));
    }
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) sum += __shfl_xor_sync(kWarp, sum, lanes);
    if (thread % 8 == 0) squares[row] = first ? sum : squares[row] + sum;
  }
}

// How a key enters: its column of S is multiplied by `similarity`, its column of P by `weight`, its row of y by
// `row`, a power of two. fp16 holds P / norm only where the norm is of moderate size: other rows are moved there, which
// a key's first 16-bit product, S, need not know.
struct KeyScales {
  float similarity, weight, row;
};

template <class T>
__device__ inline KeyScales key_scales(float squares) {
  KeyScales scales{inverse_norm(squares), inverse_norm(squares), 1};
  if constexpr (std::is_same_v<T, Half>) {
    if (squares == 0) {
      scales.weight = 0;
    } else if ((squares < 0x1p-12f || squares > 0x1p12f) && squares < kInfinity) {
      const int exponent = std::ilogb(squares) / 2;
      scales.weight = std::ldexp(scales.weight, exponent);
      scales.row = std::ldexp(1.0f, -exponent);
    }
  }
  return scales;
}

template <int kRows, int kD, int kThreads>
__device__ inline void scale_rows(char* tile, const float* scale) {
  constexpr int kPieces = kD / 8;
  for (int i = thread_index(); i < kRows * kPieces; i += kThreads) {
    const int row = i / kPieces;
    if (scale[row] == 1) continue;
    auto* piece = reinterpret_cast<Piece*>(tile + piece_at<kPieces>(row, i % kPieces));
    for (auto& bits : piece->bits) bits = Half(static_cast<float>(Half(bits, Half::from_bits())) * scale[row]).x;
  }
}

template <class Tiles>
__global__ void __launch_bounds__(Tiles::kThreads, 2) one_pass_16_bit(const __grid_constant__ Problem p) {
  using T = typename Tiles::T;
  constexpr int kD = Tiles::kD, kM = Tiles::kM, kT = Tiles::kT, kRows = Tiles::kRows, kThreads = Tiles::kThreads;
  constexpr int kPieces = Tiles::kPieces;
  constexpr bool kMoves = std::is_same_v<T, Half>;  // whether rows of y may want another scale
  static_assert(kT <= kThreads && kRows <= kThreads);
  __shared__ float x_squares[kRows], y_squares[kT];
  __shared__ float largest[kRows];  // of what a row has seen; its own four lanes use it, and registers are scarce
  __shared__ float similarity_scale[kT], weight_scale[kT], row_scale[kT];
  __shared__ int64_t x_ids[kRows], y_ids[kT];
  const int chunks = Tiles::kChunked ? p.chunks : 1;  // a constant leaves its registers to the products
  char* const x_tiles = dynamic_shared();
  char* const y_tiles = x_tiles + (chunks > 1 ? 2 : 1) * Tiles::kXBytes;

  const Place place = Place::of(p, blockIdx.x, kRows);
  const int thread = thread_index(), lane = thread % 32, warp_row = thread / 32 * 16 * kM;
  // The queries of a lane: r = 0 and 1 of each 16 rows, those of c[0..1] and c[2..3] of a product.
  const auto local_row = [&](int m, int r) { return warp_row + 16 * m + 8 * r + lane / 4; };

  // A step is one chunk of D of one tile of keys. A tile's last step is the block's own chunk: it stays for P y.
  const int steps = static_cast<int>(place.key_tiles_end - place.key_tile) * chunks;
  const auto x_tile = [&](int step) { return x_tiles + (chunks > 1 ? step % 2 * Tiles::kXBytes : 0); };
  const auto y_tile = [&](int step) { return y_tiles + step % 2 * Tiles::kYBytes; };
  const auto stage_step = [&](int step) {
    const int64_t column = static_cast<int64_t>((place.chunk + 1 + step) % chunks) * kD;
    if (step == 0 || chunks > 1) stage<kRows, kD, kThreads>(x_tile(step), p.x, place.row, column, p.columns);
    const int64_t key = (place.key_tile + step / chunks) * kT;
    stage<kT, kD, kThreads>(y_tile(step), p.y, key, column, p.columns);
  };

  if (thread < kRows) {
    x_squares[thread] = 1;
    largest[thread] = -kInfinity;
    x_ids[thread] = p.x_ids && place.row + thread < p.x.rows ? p.x_ids[place.row + thread] : 0;
  }
  if (thread < kT) similarity_scale[thread] = weight_scale[thread] = row_scale[thread] = 1;
  stage_step(0);

  const float scale = exponent_scale(p);
  float sum[kM][2], moment[kM][2], out[kM][kD / 8][4];  // sum and moment of the lane's own columns
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[m][r] = moment[m][r] = 0;
    }
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) out[m][n][0] = out[m][n][1] = out[m][n][2] = out[m][n][3] = 0;
  }

  for (int step = 0; step < steps;) {
    // Found anew for each tile: kept through the products, what follows from them would spill.
    const int thread = thread_index(), lane = thread % 32, warp_row = thread / 32 * 16 * kM;
    const auto local_row = [&](int m, int r) { return warp_row + 16 * m + 8 * r + lane / 4; };
    const int64_t key = (place.key_tile + step / chunks) * kT;
    float s[kM][kT / 8][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kT / 8; ++n) s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0;
    }

    bool moved = false;
    for (int chunk = 0; chunk < chunks; ++chunk, ++step) {
      wait_for_copies();
      __syncthreads();  // the step's tiles have come, and the whole block is done with those of the step before
      if (step + 1 < steps) stage_step(step + 1);
      if (p.normalize) {
        if (step < chunks) add_squares<T, kRows, kD, kThreads>(x_tile(step), x_squares, step == 0);
        add_squares<T, kT, kD, kThreads>(y_tile(step), y_squares, chunk == 0);
      }
      if (chunk == chunks - 1) {
        if (p.x_ids && thread < kT) y_ids[thread] = key + thread < p.y.rows ? p.y_ids[key + thread] : 0;
        if (p.normalize && thread % 8 == 0) {  // the lanes that have just summed these squares
          for (int i = thread / 8; i < kT; i += kThreads / 8) {
            const KeyScales scales = key_scales<T>(y_squares[i]);
            similarity_scale[i] = scales.similarity;
            weight_scale[i] = scales.weight;
            row_scale[i] = scales.row;
            moved |= scales.row != 1;
          }
        }
        if constexpr (kMoves) {
          moved = __syncthreads_or(moved);
        } else {
          __syncthreads();
        }
      }

      // S += x y^T
      const uint32_t x_lane = moved_by<kPieces>(shared_address(x_tile(step) + down_first<kPieces>(lane)), warp_row, 0);
      const uint32_t y_lane = shared_address(y_tile(step) + along_first<kPieces>(lane));
#pragma unroll
      for (int k = 0; k < kD / 16; ++k) {
        uint32_t a[kM][4];
#pragma unroll
        for (int m = 0; m < kM; ++m) load_tiles(a[m], moved_by<kPieces>(x_lane, 16 * m, k));
#pragma unroll
        for (int n = 0; n < kT / 16; ++n) {
          uint32_t b[4];
          load_tiles(b, moved_by<kPieces>(y_lane, 16 * n, k));
#pragma unroll
          for (int m = 0; m < kM; ++m) {
            multiply_add<T>(s[m][2 * n], a[m], b[0], b[1]);
            multiply_add<T>(s[m][2 * n + 1], a[m], b[2], b[3]);
          }
        }
      }
    }
    char* const y_own = y_tile(step - 1);

#pragma unroll
    for (int n = 0; n < kT / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float by = similarity_scale[8 * n + lane % 4 * 2 + c];
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          s[m][n][c] *= by;
          s[m][n][c + 2] *= by;
        }
      }
    }
    if (Mask::needed(p, place.row, kRows, key, kT)) {
      uint64_t hidden = 0;  // in the order of s; found in loops that are not unrolled, for want of registers
      static_assert(kM * kT <= 128);
#pragma unroll 1
      for (int q = 0; q < 2 * kM; ++q) {
        const int row = local_row(q / 2, q % 2);
        const Mask mask = Mask::of(p, place.row + row, key, kT, x_ids[row]);
#pragma unroll 1
        for (int i = 0; i < kT / 4; ++i) {
          const int column = i / 2 * 8 + lane % 4 * 2 + i % 2;
          hidden |= static_cast<uint64_t>(mask.hides(column, y_ids[column])) << (q * (kT / 4) + i);
        }
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kT / 8; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            if (hidden >> ((2 * m + c / 2) * (kT / 4) + 2 * n + c % 2) & 1) s[m][n][c] = -kInfinity;
          }
        }
      }
    }

    // s becomes P, unnormalised, relative to the largest similarity so far.
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      bool risen = false;
      float carry[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = local_row(m, r);
        const float before = largest[row];
        float top = before;
#pragma unroll
        for (int n = 0; n < kT / 8; ++n) top = larger(top, larger(s[m][n][2 * r], s[m][n][2 * r + 1]));
        top = larger(top, __shfl_xor_sync(kWarp, top, 1));
        top = larger(top, __shfl_xor_sync(kWarp, top, 2));
        const float shift = finite_shift(top);
        const float row_exponent = p.normalize ? scale * inverse_norm(x_squares[row]) : scale;
        carry[r] = power_of_two((before - shift) * row_exponent);
        risen |= top != before;
        if (lane % 4 == 0) largest[row] = top;  // the shuffles were after all four had read it
        sum[m][r] *= carry[r];
        moment[m][r] *= carry[r];
#pragma unroll
        for (int n = 0; n < kT / 8; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& value = s[m][n][2 * r + c];
            // Subtracted first: the difference keeps its digits where logits are large.
            const float weight = power_of_two((value - shift) * row_exponent);
            sum[m][r] += weight;
            if (weight > 0) moment[m][r] += weight * value;
            value = weight;
          }
        }
      }
      if (__any_sync(kWarp, risen)) {  // seldom, after the first tiles
#pragma unroll
        for (int n = 0; n < kD / 8; ++n) {
#pragma unroll
          for (int c = 0; c < 4; ++c) out[m][n][c] *= carry[c / 2];
        }
      }
    }
    if constexpr (kMoves) {
      if (moved) {
        __syncthreads();  // the whole block is done with S
        scale_rows<kT, kD, kThreads>(y_own, row_scale);
        __syncthreads();
      }
    }

    // out += P y
    const uint32_t y_lane = shared_address(y_own + down_first<kPieces>(lane));
#pragma unroll
    for (int k = 0; k < kT / 16; ++k) {
      uint32_t a[kM][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int n = 2 * k + half;
        const float by0 = weight_scale[8 * n + lane % 4 * 2], by1 = weight_scale[8 * n + lane % 4 * 2 + 1];
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          a[m][2 * half] = pack<T>(s[m][n][0] * by0, s[m][n][1] * by1);
          a[m][2 * half + 1] = pack<T>(s[m][n][2] * by0, s[m][n][3] * by1);
        }
      }
#pragma unroll
      for (int n = 0; n < kD / 16; ++n) {
        uint32_t b[4];
        load_tiles_transposed(b, moved_by<kPieces>(y_lane, 16 * k, n));
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          multiply_add<T>(out[m][2 * n], a[m], b[0], b[1]);
          multiply_add<T>(out[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int lanes = 1; lanes < 4; lanes *= 2) {
        sum[m][r] += __shfl_xor_sync(kWarp, sum[m][r], lanes);
        moment[m][r] += __shfl_xor_sync(kWarp, moment[m][r], lanes);
      }
      const int64_t row = place.row + local_row(m, r);
      if (row >= p.x.rows) continue;
      if (lane % 4 == 0) {
        const float by = p.normalize ? inverse_norm(x_squares[local_row(m, r)]) : 1.0f;
        float* const stats = p.partial_stats + p.stats_at(place.split, place.chunk, row);
        stats[0] = largest[local_row(m, r)] * by;
        stats[p.stats_plane()] = sum[m][r];
        stats[2 * p.stats_plane()] = moment[m][r] * by;
      }
#pragma unroll
      for (int n = 0; n < kD / 8; ++n) {
        const int64_t column = static_cast<int64_t>(place.chunk) * kD + 8 * n + lane % 4 * 2;
        if (column >= p.width) continue;
        auto* const to = reinterpret_cast<float2*>(p.partial_out + p.out_at(place.split, row, column));
        *to = make_float2(out[m][n][2 * r], out[m][n][2 * r + 1]);
      }
    }
  }
}

// ---- fp32 inputs: exact products, on the ordinary cores

struct Fp32 {
  static constexpr int kThreads = 256;
  static constexpr int kRows = 64, kT = 64;  // a thread owns 4 x 4 of their similarities
  static constexpr int kD = 128;             // and 4 x 8 of a chunk of the output
  static constexpr int kDepth = 32;          // columns of x and y, or keys, that are staged at once
  static constexpr int kStride = kDepth + 4, kPStride = kT + 4;  // rows of 16-byte pieces that miss each other's banks
};

// out[i][j] += a[i] . b[j] over four numbers each.
template <int kI, int kJ>
__device__ inline void add_dots(float (&out)[kI][kJ], const float4 (&a)[kI], const float4 (&b)[kJ]) {
#pragma unroll
  for (int i = 0; i < kI; ++i) {
#pragma unroll
    for (int j = 0; j < kJ; ++j) {
      out[i][j] += a[i].x * b[j].x;
      out[i][j] += a[i].y * b[j].y;
      out[i][j] += a[i].z * b[j].z;
      out[i][j] += a[i].w * b[j].w;
    }
  }
}

__device__ inline float at(const Matrix& matrix, int64_t row, int64_t column, int64_t columns) {
  if (row >= matrix.rows || column >= columns) return 0;
  return static_cast<const float*>(matrix.data)[row * matrix.row_stride + column * matrix.column_stride];
}

__device__ inline float sum_of_squares(const float* row) {
  float sum = 0;
#pragma unroll
  for (int e = 0; e < 8; ++e) sum += row[e] * row[e];
  return sum;
}

__global__ void __launch_bounds__(Fp32::kThreads, 2) one_pass_fp32(const __grid_constant__ Problem p) {
  constexpr int kRows = Fp32::kRows, kT = Fp32::kT, kD = Fp32::kD, kDepth = Fp32::kDepth, kThreads = Fp32::kThreads;
  constexpr int kStride = Fp32::kStride, kPStride = Fp32::kPStride;
  // x and y in slices of D while S is summed, then slices of y's keys for P y.
  alignas(16) __shared__ float staged[(kRows + kT) * kStride];
  alignas(16) __shared__ float weights[kRows * kPStride];
  __shared__ float x_inverse[kRows], y_inverse[kT];
  __shared__ int64_t y_ids[kT];
  static_assert(kDepth * kD <= (kRows + kT) * kStride);
  float *const x_slice = staged, *const y_slice = staged + kRows * kStride;

  const Place place = Place::of(p, blockIdx.x, kRows);
  const int thread = threadIdx.x;
  const int top_row = thread / 16 * 4, lane = thread % 16;  // rows top_row + 0..3, keys lane + 16 (0..3)
  const float scale = exponent_scale(p);
  float largest[4], sum[4], moment[4], out[4][8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    largest[i] = -kInfinity;
    sum[i] = moment[i] = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) out[i][j] = 0;
  }

  for (int64_t key_tile = place.key_tile; key_tile < place.key_tiles_end; ++key_tile) {
    const int64_t key = key_tile * kT;
    float s[4][4] = {};
    float x_sum = 0, y_sum = 0;  // of the squares of row and key thread / 4, of a quarter of each slice
    for (int64_t column = 0; column < p.columns; column += kDepth) {
      __syncthreads();  // the block is done with what was staged
      for (int i = thread; i < kRows * kDepth; i += kThreads) {
        x_slice[i / kDepth * kStride + i % kDepth] = at(p.x, place.row + i / kDepth, column + i % kDepth, p.columns);
      }
      for (int i = thread; i < kT * kDepth; i += kThreads) {
        y_slice[i / kDepth * kStride + i % kDepth] = at(p.y, key + i / kDepth, column + i % kDepth, p.columns);
      }
      __syncthreads();
      if (p.normalize) {
        x_sum += sum_of_squares(x_slice + thread / 4 * kStride + thread % 4 * 8);
        y_sum += sum_of_squares(y_slice + thread / 4 * kStride + thread % 4 * 8);
      }
#pragma unroll 1
      for (int d = 0; d < kDepth; d += 4) {
        float4 a[4], b[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[i] = *reinterpret_cast<const float4*>(x_slice + (top_row + i) * kStride + d);
          b[i] = *reinterpret_cast<const float4*>(y_slice + (lane + 16 * i) * kStride + d);
        }
        add_dots(s, a, b);
      }
    }

#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      x_sum += __shfl_xor_sync(kWarp, x_sum, lanes);
      y_sum += __shfl_xor_sync(kWarp, y_sum, lanes);
    }
    if (thread % 4 == 0) {
      x_inverse[thread / 4] = p.normalize ? inverse_norm(x_sum) : 1;
      y_inverse[thread / 4] = p.normalize ? inverse_norm(y_sum) : 1;
    }
    if (p.x_ids && thread < kT) y_ids[thread] = key + thread < p.y.rows ? p.y_ids[key + thread] : 0;
    __syncthreads();

    const bool masked = Mask::needed(p, place.row, kRows, key, kT);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = place.row + top_row + i;
#pragma unroll
      for (int j = 0; j < 4; ++j) s[i][j] *= x_inverse[top_row + i] * y_inverse[lane + 16 * j];
      if (masked) {
        const Mask mask = Mask::of(p, row, key, kT, p.x_ids && row < p.x.rows ? p.x_ids[row] : 0);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (mask.hides(lane + 16 * j, y_ids[lane + 16 * j])) s[i][j] = -kInfinity;
        }
      }
      float top = largest[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) top = larger(top, s[i][j]);
#pragma unroll
      for (int lanes = 1; lanes < 16; lanes *= 2) top = larger(top, __shfl_xor_sync(kWarp, top, lanes));
      const float shift = finite_shift(top), carry = power_of_two((largest[i] - shift) * scale);
      largest[i] = top;
      sum[i] *= carry;
      moment[i] *= carry;
#pragma unroll
      for (int j = 0; j < 8; ++j) out[i][j] *= carry;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float weight = power_of_two((s[i][j] - shift) * scale);
        sum[i] += weight;
        if (weight > 0) moment[i] += weight * s[i][j];
        weights[(top_row + i) * kPStride + lane + 16 * j] = weight * y_inverse[lane + 16 * j];
      }
    }

    const int64_t chunk_column = static_cast<int64_t>(place.chunk) * kD;
    for (int first = 0; first < kT; first += kDepth) {
      __syncthreads();  // the weights are there; the block is done with what was staged
      for (int i = thread; i < kDepth * kD; i += kThreads) {
        staged[i] = at(p.y, key + first + i / kD, chunk_column + i % kD, p.columns);
      }
      __syncthreads();
#pragma unroll 4
      for (int k = 0; k < kDepth; ++k) {
        const float4 low = *reinterpret_cast<const float4*>(staged + k * kD + lane * 4);
        const float4 high = *reinterpret_cast<const float4*>(staged + k * kD + 64 + lane * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float weight = weights[(top_row + i) * kPStride + first + k];
          out[i][0] += weight * low.x;
          out[i][1] += weight * low.y;
          out[i][2] += weight * low.z;
          out[i][3] += weight * low.w;
          out[i][4] += weight * high.x;
          out[i][5] += weight * high.y;
          out[i][6] += weight * high.z;
          out[i][7] += weight * high.w;
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int lanes = 1; lanes < 16; lanes *= 2) {
      sum[i] += __shfl_xor_sync(kWarp, sum[i], lanes);
      moment[i] += __shfl_xor_sync(kWarp, moment[i], lanes);
    }
    const int64_t row = place.row + top_row + i;
    if (row >= p.x.rows) continue;
    if (lane == 0) {
      float* const stats = p.partial_stats + p.stats_at(place.split, place.chunk, row);
      stats[0] = largest[i];
      stats[p.stats_plane()] = sum[i];
      stats[2 * p.stats_plane()] = moment[i];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t column = static_cast<int64_t>(place.chunk) * kD + half * 64 + lane * 4;
      if (column >= p.width) continue;
      *reinterpret_cast<float4*>(p.partial_out + p.out_at(place.split, row, column)) =
          make_float4(out[i][4 * half], out[i][4 * half + 1], out[i][4 * half + 2], out[i][4 * half + 3]);
    }
  }
}

// ---- merging the partials

constexpr int kMergeWarps = 8;
constexpr int kMergeColumns = 128;  // four a lane

// A block merges one row's kMergeColumns columns: warp w the splits w, w + 8, ..., then the first warp adds the warps.
__global__ void __launch_bounds__(32 * kMergeWarps) merge(const __grid_constant__ Problem p, int chunk_columns, float* stats,
                                                          float* out) {
  __shared__ float4 parts[kMergeWarps][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t blocks_a_row = (p.columns + kMergeColumns - 1) / kMergeColumns;
  const int64_t row = blockIdx.x / blocks_a_row, first = blockIdx.x % blocks_a_row * kMergeColumns;
  const int64_t column = first + 4 * lane;
  const int chunk = static_cast<int>(first / chunk_columns);
  const float* const largest = p.partial_stats;
  const float *const sums = largest + p.stats_plane(), *const moments = sums + p.stats_plane();

  float top = -kInfinity;
  for (int split = lane; split < p.splits; split += 32) top = larger(top, largest[p.stats_at(split, chunk, row)]);
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) top = larger(top, __shfl_xor_sync(kWarp, top, lanes));
  const float shift = finite_shift(top), scale = exponent_scale(p);
  const auto weight_of = [&](int split) {
    return power_of_two((largest[p.stats_at(split, chunk, row)] - shift) * scale);
  };

  float4 part = make_float4(0, 0, 0, 0);
  if (column < p.width) {
#pragma unroll 4
    for (int split = warp; split < p.splits; split += kMergeWarps) {
      const float weight = weight_of(split);
      const float4 value = *reinterpret_cast<const float4*>(p.partial_out + p.out_at(split, row, column));
      part.x += weight * value.x;
      part.y += weight * value.y;
      part.z += weight * value.z;
      part.w += weight * value.w;
    }
  }
  parts[warp][lane] = part;
  __syncthreads();
  if (warp != 0) return;

  float sum = 0, moment = 0;
  for (int split = lane; split < p.splits; split += 32) {
    const float weight = weight_of(split);
    sum += weight * sums[p.stats_at(split, chunk, row)];
    moment += weight * moments[p.stats_at(split, chunk, row)];
  }
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    sum += __shfl_xor_sync(kWarp, sum, lanes);
    moment += __shfl_xor_sync(kWarp, moment, lanes);
  }
  const float inverse = sum == 0 ? 0 : 1 / sum;  // a row that sees nothing
  if (first == 0 && lane == 0) {
    const float log_sum = std::log(sum), t = *p.temperature;
    stats[row] = shift / t + log_sum;
    stats[p.x.rows + row] = top;
    stats[2 * p.x.rows + row] = log_sum;
    stats[3 * p.x.rows + row] = moment * inverse;
  }
  for (int w = 1; w < kMergeWarps; ++w) {
    const float4 other = parts[w][lane];
    part.x += other.x;
    part.y += other.y;
    part.z += other.z;
    part.w += other.w;
  }
  const float values[4] = {part.x * inverse, part.y * inverse, part.z * inverse, part.w * inverse};
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (column + e < p.columns) out[row * p.columns + column + e] = values[e];
  }
}

}  // namespace ssl_fast::info_nce
