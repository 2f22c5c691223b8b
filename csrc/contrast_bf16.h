// The products of contrastive losses in bf16, sums in fp32 (an engine of contrast_kernel.h). Needs 16 lanes and
// SSL_FAST_TILES, a class with the members of AMXTiles: a block of kHeight x 32 sums. No include guard: see simd.h.
//
// Instructions multiply pairs of bf16, AMX's 16 rows of 16 of them at once; a pair holds two depths, which two is free
// as long as both operands agree. The products with W pair depth k with k + 16, so that W and W^T are packed from whole
// vectors.
//   left      rows of z in bf16                                        depth runs along dims
//   right     (dims / 2, kStride) pairs of dims, one column a row of z
//   product   (rows / 2, ld) pairs of rows k, k + 16 of each 32        depth runs along rows

using Tiles = SSL_FAST_TILES;
constexpr int kStep = 32;  // depth of one multiplication, and width of the block of sums
constexpr int64_t kWeightStride = odd_lines(kBlock, 32);  // of W in bf16

static_assert(kCols == kStep && kBlock % kStep == 0 && kBlock % Tiles::kHeight == 0 && Tiles::kHeight % kRows == 0);

// a in bf16 in the low half of each lane, b in the high half, to nearest even.
#if defined(SSL_FAST_HAS_BF16)
SSL_FAST_INLINE VInt pack_pairs(V a, V b) {
  typedef int16_t VHalves __attribute__((vector_size(64)));
  constexpr VHalves kInterleaved = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                    8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (VInt)_mm512_permutexvar_epi16((__m512i)kInterleaved, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
}
#else
SSL_FAST_INLINE VInt round_to_upper_half(V v) {
  const VInt bits = reinterpret_cast<VInt>(v);
  return bits + 0x7fff + ((bits >> 16) & 1);
}
SSL_FAST_INLINE VInt pack_pairs(V a, V b) {
  return ((round_to_upper_half(a) >> 16) & 0xffff) | (round_to_upper_half(b) & static_cast<int32_t>(0xffff0000));
}
#endif

// A 16 x 16 transpose as four perfect shuffles.
SSL_FAST_INLINE void transpose_lanes(VInt (&rows)[kLanes]) {
  for (int stage = 0; stage < 4; ++stage) {
    VInt shuffled[kLanes];
    SSL_FAST_UNROLL
    for (int k = 0; k < kLanes / 2; ++k) {
      const VInt a = rows[k], b = rows[k + kLanes / 2];
      shuffled[2 * k] = SSL_FAST_SHUFFLE(VInt, a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      shuffled[2 * k + 1] = SSL_FAST_SHUFFLE(VInt, a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    SSL_FAST_UNROLL
    for (int k = 0; k < kLanes; ++k) rows[k] = shuffled[k];
  }
}

SSL_FAST_INLINE void store_pairs(uint16_t* p, VInt pairs) { std::memcpy(p, &pairs, sizeof(pairs)); }

// The bf16 copies of W that the products read, behind W itself in the work space.
SSL_FAST_INLINE uint16_t* packed_weights(const Tile& t) {
  return reinterpret_cast<uint16_t*>(t.work + kBlock * kStride);
}
SSL_FAST_INLINE uint16_t* packed_weights_transposed(const Tile& t) { return packed_weights(t) + kBlock * kWeightStride; }
inline int64_t backward_work(int64_t) { return kBlock * kStride + kBlock * kWeightStride; }

SSL_FAST_INLINE void panel_done(const ForwardTile&, int) {}
SSL_FAST_INLINE void panel_done(const AttendTile&, int) {}  // whose logits need a maximum before they are weights

// Columns j .. j + 32 of W to bf16, as rows of W.
SSL_FAST_INLINE void panel_done(const Tile& t, int j) {
  for (int i = 0; i < round_up(t.rows, kStep); ++i) {
    const float* w = t.work + i * kStride + j;
    store_pairs(packed_weights(t) + i * kWeightStride + j, pack_pairs(load(w), load(w + kLanes)));
  }
}

// The same, and as rows of W^T.
SSL_FAST_INLINE void panel_done(const BackwardTile& t, int j) {
  panel_done(static_cast<const Tile&>(t), j);
  if (t.dz_j == nullptr) return;
  for (int i = 0; i < round_up(t.rows, kStep); i += kStep) {
    const float* w = t.work + i * kStride + j;
    for (int c = 0; c < kStep; c += kLanes) {
      VInt columns[kLanes];
      SSL_FAST_UNROLL
      for (int r = 0; r < kLanes; ++r)
        columns[r] = pack_pairs(load(w + r * kStride + c), load(w + (r + kLanes) * kStride + c));
      transpose_lanes(columns);
      SSL_FAST_UNROLL
      for (int r = 0; r < kLanes; ++r)
        store_pairs(packed_weights_transposed(t) + (j + c + r) * kWeightStride + i, columns[r]);
    }
  }
}

template <class Tile, class Finish, class Sums = Tiles>
SSL_FAST_INLINE void for_each_register_tile(const Tile& t, const Finish& finish) {
  const auto* left = static_cast<const uint16_t*>(t.left_i);
  const auto* right = static_cast<const uint32_t*>(t.right_j);
  const int64_t ld = bf16_stride(t.depth);
  const int padded_rows = round_up(round_up(t.rows, kStep), Sums::kHeight);  // what panel_done reads, or more
  Sums tiles;
  for (int j = 0; j < t.cols; j += kCols) {
    for (int i = 0; i < padded_rows; i += Sums::kHeight) {
      tiles.zero();
      for (int64_t k = 0; k < t.depth; k += kStep)
        tiles.multiply(left + i * ld + k, ld, right + k / 2 * kStride + j, kStride);
      if constexpr (Sums::kInRegisters)
        finish(tiles.sums, i, j);
      else
        tiles.store(t.work + i * kStride + j, kStride);
    }
    for (int i = 0; !Sums::kInRegisters && i < padded_rows; i += kRows) {
      V s[kRows][kVectors];
      for_each_vector([&](int r, int v) SSL_FAST_LAMBDA {
        s[r][v] = load(t.work + (i + r) * kStride + j + v * kLanes);
      });
      finish(s, i, j);
    }
    panel_done(t, j);
  }
}

// out (rows, dims) = or += W (rows, depth) z (depth, dims).
inline void product(const uint16_t* w, const uint32_t* z, int rows, int depth, int64_t dims, float* out, int64_t ld_out,
                    bool add) {
  const int64_t ld = pairs_stride(dims);
  Tiles tiles;
  for (int64_t d = 0; d < dims; d += kStep)
    for (int i = 0; i < rows; i += Tiles::kHeight) {
      float* sums = out + i * ld_out + d;
      add ? tiles.load(sums, ld_out) : tiles.zero();
      for (int k = 0; k < depth; k += kStep)
        tiles.multiply(w + i * kWeightStride + k, kWeightStride, z + k / 2 * ld + d, ld);
      tiles.store(sums, ld_out);
    }
}

inline void multiply_weights(const BackwardTile& t) {
  product(packed_weights(t), static_cast<const uint32_t*>(t.product_j), t.rows, t.cols, t.depth, t.dz_i, t.ld_dz,
          t.add_i);
  if (t.dz_j != nullptr)
    product(packed_weights_transposed(t), static_cast<const uint32_t*>(t.product_i), t.cols, t.rows, t.depth, t.dz_j,
            t.ld_dz, t.add_j);
}

inline void multiply_weights(const AttendTile& t) {
  for (int j = 0; j < t.cols; j += kStep) panel_done(static_cast<const Tile&>(t), j);
  product(packed_weights(t), static_cast<const uint32_t*>(t.product_j), t.rows, t.cols, t.depth, t.out, t.ld_out,
          !t.first);
}
