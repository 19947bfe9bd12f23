// The small products of the hot loop: rows are pixels, vectors run along the columns, one operand is broadcast.
// Column counts are multiples of kLanes; row counts and the inner dimension are free.
#pragma once
#include "simd.h"

namespace ftso::FTSO_ISA {
namespace {

enum class Out { kStore, kAdd, kStats, kStreamStats, kRelu };

// What a product does besides storing: kStats adds its columns' sums and sums of squares, kRelu stores
// max(product * scale + shift, 0).
struct Finish {
  double *sums = nullptr, *squares = nullptr;
  const float *scale = nullptr, *shift = nullptr;
  Finish from(int64_t c) const { return {sums + c, squares + c, scale + c, shift + c}; }
};

// The left operand: row i begins at `at + i * ld` and consists of `pieces` pieces of K values, `apart` from each other.
// As pairs, two values rounded to bfloat16 take the place of one; the right operand then holds pairs of its rows, and
// products are still added up in float. Sizes count values either way.
struct Rows {
  const float* at;
  int64_t ld, pieces = 1, apart = 0;
  bool pairs = false;
  Rows with(int64_t offset, int64_t new_ld) const {
    return {at + (pairs ? offset / 2 : offset), new_ld, pieces, apart, pairs};
  }
};

// Memory that is wanted after a product: it is asked for row by row on the way, as a burst of requests would wait.
struct Ahead {
  struct Stream {
    const float* at;
    int64_t ld, n;  // floats from row to row, and wanted of each
  };
  Stream streams[4] = {};
  // Always inline: gcc deletes calls of a function that does nothing but prefetch.
  FTSO_ALWAYS_INLINE void ask(int64_t first, int64_t rows) const {
    for (const Stream& s : streams)
      for (int64_t i = first; s.n && i < first + rows; ++i)
        for (int64_t c = 0; c < s.n; c += kLanes) prefetch(s.at + i * s.ld + c);
  }
};

// acc += a[MR][pieces * K] w[pieces * K][NV vectors]
template <int MR, int NV, bool PAIRS>
FTSO_INLINE void multiply(Rows a, const float* w, int64_t ldw, int64_t K, Vec (&acc)[MR][NV]) {
  for (int64_t piece = 0; piece < a.pieces; ++piece, a.at += a.apart)
    for (int64_t k = 0; k < K; ++k, w += ldw) {
      Vec column[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) column[v] = load(w + v * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) {
        const Vec pixel = set1(a.at[i * a.ld + k]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v) {
          acc[i][v] = PAIRS ? fma_pairs(pixel, column[v], acc[i][v]) : fma(pixel, column[v], acc[i][v]);
        }
      }
    }
}

template <int MR, int NV, Out OUT, bool PAIRS>
FTSO_INLINE void product_block(Rows a, const float* w, int64_t ldw, int64_t K, float* out, int64_t ldo, Finish finish) {
  Vec acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = OUT == Out::kAdd ? load(out + i * ldo + v * kLanes) : zero();
  multiply<MR, NV, PAIRS>(a, w, ldw, K, acc);
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      float* at = out + i * ldo + v * kLanes;
      Vec value = acc[i][v];
      if (OUT == Out::kRelu)
        value = rectified(fma(value, load(finish.scale + v * kLanes), load(finish.shift + v * kLanes)));
      OUT == Out::kStreamStats ? stream(at, value) : store(at, value);
    }
  if (OUT == Out::kStats || OUT == Out::kStreamStats)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {  // a block's rows in float, blocks in double: constant regions would add up errors
      Vec s[2] = {zero(), zero()}, q[2] = {zero(), zero()};
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i) s[i % 2] = add(s[i % 2], acc[i][v]), q[i % 2] = fma(acc[i][v], acc[i][v], q[i % 2]);
      add_to(finish.sums + v * kLanes, add(s[0], s[1])), add_to(finish.squares + v * kLanes, add(q[0], q[1]));
    }
}

template <int NV, Out OUT, bool PAIRS>
void product_panel(Rows a, int64_t P, const float* w, int64_t ldw, int64_t K, float* out, int64_t ldo, Finish finish,
                   const Ahead& ahead) {
  constexpr int MR = rows_of(NV);
  if (PAIRS) K /= 2, a.ld /= 2, a.apart /= 2;
  const auto from = [=](int64_t row) { return Rows{a.at + row * a.ld, a.ld, a.pieces, a.apart}; };
  int64_t p = 0;
  for (; p + MR <= P; p += MR) {
    ahead.ask(p, MR);
    product_block<MR, NV, OUT, PAIRS>(from(p), w, ldw, K, out + p * ldo, ldo, finish);
  }
  for (; p + 2 <= P; p += 2) product_block<2, NV, OUT, PAIRS>(from(p), w, ldw, K, out + p * ldo, ldo, finish);
  for (; p < P; ++p) product_block<1, NV, OUT, PAIRS>(from(p), w, ldw, K, out + p * ldo, ldo, finish);
}

// Calls body(Width<NV>{}, first column) for panels of NV vectors that cover N columns.
template <int NV>
struct Width {
  static constexpr int value = NV;
};
template <typename Body>
FTSO_INLINE void panels(int64_t N, Body body) {
  const int64_t vectors = N / kLanes;
  for (int64_t v = 0; v < vectors;) {
    const int64_t left = vectors - v;
    if constexpr (kPanel == 4) {
      if (left % 4 == 0) {
        body(Width<4>{}, v * kLanes), v += 4;
        continue;
      }
      if (left >= 3) {
        body(Width<3>{}, v * kLanes), v += 3;
        continue;
      }
      if (left == 2) {
        body(Width<2>{}, v * kLanes), v += 2;
        continue;
      }
    }
    body(Width<1>{}, v * kLanes), v += 1;
  }
}

// out[P][N] (=, += for kAdd) a[P][pieces * K] w[pieces * K][N]
template <Out OUT>
FTSO_INLINE void product(Rows a, int64_t P, const float* w, int64_t ldw, int64_t K, int64_t N, float* out, int64_t ldo,
                         Finish finish = {}, const Ahead& ahead = {}) {
  panels(N, [=](auto width, int64_t c) {
    constexpr int NV = decltype(width)::value;
    const Ahead wanted = c ? Ahead{} : ahead;
    if (a.pairs)
      product_panel<NV, OUT, true>(a, P, w + c, ldw, K, out + c, ldo, finish.from(c), wanted);
    else
      product_panel<NV, OUT, false>(a, P, w + c, ldw, K, out + c, ldo, finish.from(c), wanted);
  });
}

template <int KR, int NV>
FTSO_INLINE void outer_block(const float* a, int64_t lda, const float* d, int64_t ldd, int64_t P, float* out,
                             int64_t ldo) {
  Vec acc[KR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < KR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = load(out + i * ldo + v * kLanes);
  for (int64_t p = 0; p < P; ++p) {
    Vec row[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) row[v] = load(d + p * ldd + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < KR; ++i) {
      const Vec s = set1(a[p * lda + i]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] = fma(s, row[v], acc[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < KR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) store(out + i * ldo + v * kLanes, acc[i][v]);
}

template <int NV>
void outer_panel(const float* a, int64_t lda, int64_t K, const float* d, int64_t ldd, int64_t P, float* out,
                 int64_t ldo) {
  constexpr int KR = kPanel == 4 ? (NV == 1 ? 16 : NV == 2 ? 8 : NV == 3 ? 8 : 4) : kPanel == 1 ? 4 : 2;
  int64_t k = 0;
  if (K % KR == 1 && KR == 8) {  // a lone last row would wait for itself: it goes with the block before
    for (; k + 2 * KR < K; k += KR) outer_block<KR, NV>(a + k, lda, d, ldd, P, out + k * ldo, ldo);
    outer_block<9, NV>(a + k, lda, d, ldd, P, out + k * ldo, ldo);
    return;
  }
  for (; k + KR <= K; k += KR) outer_block<KR, NV>(a + k, lda, d, ldd, P, out + k * ldo, ldo);
  for (; k + 4 <= K; k += 4) outer_block<4, NV>(a + k, lda, d, ldd, P, out + k * ldo, ldo);
  for (; k < K; ++k) outer_block<1, NV>(a + k, lda, d, ldd, P, out + k * ldo, ldo);
}

// out[K][N] += a[P][K]' d[P][N]: the weight gradient
FTSO_INLINE void outer_product(const float* a, int64_t lda, int64_t K, const float* d, int64_t ldd, int64_t N,
                               int64_t P, float* out, int64_t ldo) {
  panels(N,
         [=](auto width, int64_t c) { outer_panel<decltype(width)::value>(a, lda, K, d + c, ldd, P, out + c, ldo); });
}

}  // namespace
}  // namespace ftso::FTSO_ISA
