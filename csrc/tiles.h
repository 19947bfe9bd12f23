// Products of floats on the processor's tile unit (AMX), which multiplies bfloat16 and adds up in float. A float is the
// sum of three bfloat16, exactly; of the nine products of two such sums the six that matter at float's precision are
// taken. Left operands are split by cutting digits off, weights by rounding to nearest: what is left out then has no
// common sign, and is below 2^-24 of a product.
//
// Operands are tiles of 16 rows of 16 words: [16 rows or columns][block of kInner of the inner dimension][third]. A
// word holds the values i and i + 16 of its block, so that two vectors fill a row without a shuffle; zeros fill up the
// last block.
#pragma once
#include "gemm.h"

namespace ftso::FTSO_ISA {
namespace {

#if defined(__AMX_BF16__)

// While it lives the thread has eight tiles of 16 rows of 16 words. Afterwards it has the ones that it had before.
class TileUnit {
  alignas(64) uint8_t before_[64];

 public:
  TileUnit() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } wanted;
    __asm__ volatile("sttilecfg %0\n\tldtilecfg %1" : "=m"(before_) : "m"(wanted));
  }
  ~TileUnit() { __asm__ volatile("ldtilecfg %0" : : "m"(before_)); }
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;
};

// The thirds of x and y as a row of words in three tiles.
FTSO_INLINE void store_thirds(float* p, Vec x, Vec y) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const auto words = [](__m512 low, __m512 high) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(_mm512_castps_si512(low), 16),
                                   _mm512_castps_si512(high));
  };
  const auto rest = [=](__m512 value) {
    return _mm512_sub_ps(value, _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(value), upper)));
  };
  _mm512_store_si512(p, words(x.v, y.v));
  const __m512 xr = rest(x.v), yr = rest(y.v);
  _mm512_store_si512(p + kTileWords, words(xr, yr));
  _mm512_store_si512(p + 2 * kTileWords, words(rest(xr), rest(yr)));
}

// Tile T, rows `ld` floats apart. gcc knows nothing of the registers; operands say what is read and written in memory.
template <int T>
FTSO_INLINE void load_tile(const float* at, int64_t ld) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                   :
                   : "r"(at), "r"(ld * 4), "i"(T), "m"(*reinterpret_cast<const float (*)[]>(at)));
}
template <int T>
FTSO_INLINE void store_tile(float* at, int64_t ld) {
  __asm__ volatile("tilestored %%tmm%c3, (%1,%2,1)"
                   : "=m"(*reinterpret_cast<float (*)[]>(at))
                   : "r"(at), "r"(ld * 4), "i"(T));
}
template <int T>
FTSO_INLINE void clear_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int TO, int LEFT, int RIGHT>
FTSO_INLINE void multiply_tile() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(TO), "i"(LEFT), "i"(RIGHT));
}

// body(Width<I>{}) for I below N.
template <int N, typename Body>
FTSO_INLINE void unrolled(Body body) {
  if constexpr (N > 0) unrolled<N - 1>(body), body(Width<N - 1>{});
}

// Of the six products: the thirds, and whether they differ from the product before.
constexpr int kLeftThird[6] = {0, 0, 1, 1, 2, 0}, kRightThird[6] = {2, 1, 1, 0, 0, 0};
constexpr int kNewLeft = 0b110101, kNewRight = 0b001011;

// out[16 * ROWS][16 * COLUMNS] (=, += for add) a[ROWS] w[COLUMNS], tiles of `blocks` blocks. meanwhile() between the
// products: the unit takes 16 cycles for a tile, and the processor is free.
template <int ROWS, int COLUMNS, typename Meanwhile>
FTSO_INLINE void multiply_tiles(const float* a, const float* w, int64_t blocks, bool add, float* out, int64_t ldo,
                                const Meanwhile& meanwhile) {
  constexpr int kLeft = ROWS * COLUMNS, kRight = kLeft + ROWS;
  const int64_t apart = blocks * 3 * kTileWords;
  const auto every = [&](auto body) {
    unrolled<ROWS>([&](auto r) {
      unrolled<COLUMNS>([&](auto c) {
        constexpr int R = decltype(r)::value, C = decltype(c)::value;
        body(Width<R>{}, Width<C>{}, Width<R * COLUMNS + C>{}, out + R * 16 * ldo + C * kLanes);
      });
    });
  };
  every([&](auto, auto, auto sum, const float* at) {
    add ? load_tile<decltype(sum)::value>(at, ldo) : clear_tile<decltype(sum)::value>();
  });
  for (int64_t k = 0; k < blocks; ++k, a += 3 * kTileWords, w += 3 * kTileWords)
#pragma GCC unroll 1
    for (int i = 0; i < 6; ++i) {
      if (kNewLeft >> i & 1)
        unrolled<ROWS>([&](auto r) {
          load_tile<kLeft + decltype(r)::value>(a + r.value * apart + kLeftThird[i] * kTileWords, kLanes);
        });
      if (kNewRight >> i & 1)
        unrolled<COLUMNS>([&](auto c) {
          load_tile<kRight + decltype(c)::value>(w + c.value * apart + kRightThird[i] * kTileWords, kLanes);
        });
      every([](auto r, auto c, auto sum, float*) {
        multiply_tile<decltype(sum)::value, kLeft + decltype(r)::value, kRight + decltype(c)::value>();
      });
      meanwhile();
    }
  every([&](auto, auto, auto sum, float* at) { store_tile<decltype(sum)::value>(at, ldo); });
}

FTSO_INLINE void transpose(Vec (&rows)[16]) {
  __m512 pairs[16], fours[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {  // i % 4: columns 0 and 1, or 2 and 3, of each quarter
    const int from = i / 4 * 4 + i % 4 / 2;
    const __m512d low = _mm512_castps_pd(pairs[from]), high = _mm512_castps_pd(pairs[from + 2]);
    fours[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
    fours[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 even[2] = {_mm512_shuffle_f32x4(fours[j], fours[4 + j], 0x88),
                            _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0x88)};
    const __m512 odd[2] = {_mm512_shuffle_f32x4(fours[j], fours[4 + j], 0xdd),
                           _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0xdd)};
    rows[j].v = _mm512_shuffle_f32x4(even[0], even[1], 0x88);
    rows[4 + j].v = _mm512_shuffle_f32x4(odd[0], odd[1], 0x88);
    rows[8 + j].v = _mm512_shuffle_f32x4(even[0], even[1], 0xdd);
    rows[12 + j].v = _mm512_shuffle_f32x4(odd[0], odd[1], 0xdd);
  }
}

#else
FTSO_INLINE void transpose(Vec (&)[16]) {}
struct TileUnit {
  TileUnit() {}  // says that the variable is used
};
FTSO_INLINE void store_thirds(float*, Vec, Vec) {}
template <int, int, typename Meanwhile>
FTSO_INLINE void multiply_tiles(const float*, const float*, int64_t, bool, float*, int64_t, const Meanwhile&) {}
#endif

// out[rows][N] (=, += for add) a w, 32 rows, or 16 where whole_columns(N). Squares of 32 by 32 results read the fewest
// tiles; three columns of tiles are taken at once.
FTSO_INLINE bool whole_columns(int64_t N) { return N == 3 * kLanes; }
template <typename Meanwhile>
FTSO_INLINE void multiply_columns(const float* a, int64_t rows, const float* w, int64_t blocks, int64_t N, bool add,
                                  float* out, const Meanwhile& meanwhile) {
  const int64_t apart = blocks * 3 * kTileWords / kLanes;
  if (whole_columns(N)) {
    for (int64_t row = 0; row < rows; row += 16)
      multiply_tiles<1, 3>(a + row * apart, w, blocks, add, out + row * N, N, meanwhile);
    return;
  }
  int64_t n = 0;
  for (; n + 32 <= N; n += 32) multiply_tiles<2, 2>(a, w + n * apart, blocks, add, out + n, N, meanwhile);
  if (n < N) multiply_tiles<2, 1>(a, w + n * apart, blocks, add, out + n, N, meanwhile);
}

// Pixels that travel together.
struct Group {
  int64_t first = 0, rows = 0;
};

// Products [K][N] of groups of pixels, one after another: while the unit multiplies a group, the processor makes the
// next one's left operand and puts the results of the one before.
class TileStream {
  const float* w_;
  const int64_t blocks_, N_;
  float *left_[2], *out_[2];
  Group groups_[3];  // in turn: made, multiplied, put away
  int64_t turn_ = 0;

 public:
  const int64_t group_rows;
  TileStream(const float* w, int64_t K, int64_t N, float* memory)
      : w_(w), blocks_(inner_blocks(K)), N_(N), group_rows(whole_columns(N) ? kGroup / 2 : kGroup) {
    const int64_t left = thirds_floats(K, group_rows);
    left_[0] = memory, left_[1] = left_[0] + left, out_[0] = left_[1] + left, out_[1] = out_[0] + group_rows * N;
  }
  // make(i, left) for the rows of `next`: the words of block k at left + k * 3 * kTileWords. put(group, i, out) for the
  // `items` that its rows come to, of the group before the last, out[rows][N].
  template <typename Make, typename Items, typename Put>
  FTSO_ALWAYS_INLINE void step(Group next, Make make, Items items, Put put) {
    groups_[turn_ % 3] = next;  // long before it is read: a load behind its own stores would wait for all others
    const Group now = groups_[(turn_ + 2) % 3], done = groups_[(turn_ + 1) % 3];
    float *left = left_[turn_ % 2], *out = out_[1 - turn_ % 2];
    const int64_t n = done.rows ? items(done.rows) : 0, apart = blocks_ * 3 * kTileWords;
    const int64_t steps = now.rows ? 6 * blocks_ * (whole_columns(N_) ? 1 : (N_ + 16) / 32) : 1;
    int64_t step = 0, made = 0, finished = 0;
    const auto meanwhile = [&] {
      ++step;
      for (; made * steps < next.rows * step; ++made) make(made, left + made / 16 * apart + made % 16 * kLanes);
      for (; finished * steps < n * step; ++finished) put(done, finished, out);
    };
    if (now.rows)
      multiply_columns(left_[1 - turn_ % 2], group_rows, w_, blocks_, N_, false, out_[turn_ % 2], meanwhile);
    else
      meanwhile();
    ++turn_;
  }
  template <typename Items, typename Put>
  FTSO_ALWAYS_INLINE void drain(Items items, Put put) {
    for (int i = 0; i < 2; ++i) step({}, [](int64_t, float*) {}, items, put);
  }
};

// out[K][N] += a' d over the rows a(p)[K], d(p)[N] of P pixels, K a multiple of 32. room: outer_tiles_floats(P, K, N).
template <typename RowOfA, typename RowOfD>
FTSO_INLINE void outer_product_of_tiles(RowOfA a, int64_t K, RowOfD d, int64_t N, int64_t P, float* out, float* room) {
  const int64_t blocks = inner_blocks(P), apart = blocks * 3 * kTileWords, columns = K > N ? K : N;
  float* const zeros = room;  // the rows of pixels that are not there
  float *left = zeros + columns, *right = left + K / kLanes * apart;
  for (int64_t k = 0; k < columns; ++k) zeros[k] = 0;
  for (int64_t p = 0; p < P; p += kInner, left += 3 * kTileWords, right += 3 * kTileWords) {
    const float *a_rows[kInner], *d_rows[kInner];
    for (int64_t i = 0; i < kInner; ++i)
      a_rows[i] = p + i < P ? a(p + i) : zeros, d_rows[i] = p + i < P ? d(p + i) : zeros;
    for (int64_t k = 0; k < K; k += kLanes) {
      Vec first[16], second[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) first[i] = load(a_rows[i] + k);
      transpose(first);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) second[i] = load(a_rows[16 + i] + k);
      transpose(second);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) store_thirds(left + k / kLanes * apart + i * kLanes, first[i], second[i]);
    }
    for (int64_t n = 0; n < N; n += kLanes)
#pragma GCC unroll 4
      for (int64_t i = 0; i < 16; ++i)
        store_thirds(right + n / kLanes * apart + i * kLanes, load(d_rows[i] + n), load(d_rows[16 + i] + n));
  }
  left = zeros + columns, right = left + K / kLanes * apart;
  for (int64_t k = 0; k < K; k += 32)
    multiply_columns(left + k / kLanes * apart, 32, right, blocks, N, true, out + k * N, [] {});
}

}  // namespace
}  // namespace ftso::FTSO_ISA
