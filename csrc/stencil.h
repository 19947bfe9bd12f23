// Windows of K x K pixels on a scratch image: the depthwise convolution, its gradients, and how planes get there.
// Vectors run along a row; rows are treated R at a time so that a loaded vector serves every row that it touches.
#pragma once
#include "gemm.h"
#include "planes.h"

namespace ftso::FTSO_ISA {
namespace {

constexpr int32_t kEven[2][16] = {{0, 2, 4, 6, 8, 10, 12, 14, -1, -1, -1, -1, -1, -1, -1, -1},
                                  {-1, -1, -1, -1, -1, -1, -1, -1, 0, 2, 4, 6, 8, 10, 12, 14}};
constexpr int32_t kOdd[2][16] = {{1, 3, 5, 7, 9, 11, 13, 15, -1, -1, -1, -1, -1, -1, -1, -1},
                                 {-1, -1, -1, -1, -1, -1, -1, -1, 1, 3, 5, 7, 9, 11, 13, 15}};
constexpr int32_t kLow[2][16] = {{0, -1, 1, -1, 2, -1, 3, -1, 4, -1, 5, -1, 6, -1, 7, -1},
                                 {-1, 0, -1, 1, -1, 2, -1, 3, -1, 4, -1, 5, -1, 6, -1, 7}};
constexpr int32_t kHigh[2][16] = {{8, -1, 9, -1, 10, -1, 11, -1, 12, -1, 13, -1, 14, -1, 15, -1},
                                  {-1, 8, -1, 9, -1, 10, -1, 11, -1, 12, -1, 13, -1, 14, -1, 15}};

// Visits (first column, columns left, vector) of the even and of the odd columns of a row of W.
template <typename Visit>
FTSO_INLINE void split_row(const float* x, int64_t W, Visit visit) {
  const LanePairs even = lane_pairs(kEven[0], kEven[1]), odd = lane_pairs(kOdd[0], kOdd[1]);
  for (int64_t c = 0; c < W; c += 2 * kLanes) {
    const Vec a = load_part(x + c, W - c);
    const Vec b = W - c > kLanes ? load_part(x + c + kLanes, W - c - kLanes) : zero();
    visit(c / 2, pick(even, a, b), pick(odd, a, b));
  }
}

// Lanes of two rows of 8 side by side whose neighbour `shift` columns away is in the same row.
constexpr uint32_t neighbours_of_pair(int shift) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i)
    if (i % 8 + shift >= 0 && i % 8 + shift < 8) bits |= 1u << i;
  return bits;
}

// Images of 8 x 8 two at a time: a vector is row r of both, the second image `image` floats behind the first, and zero
// where there is no second.
struct Pair {
  FTSO_ALWAYS_INLINE static Vec row(const float* plane, int64_t image, int64_t r, bool second) {
    return second ? load_halves(plane + 8 * r, plane + 8 * r + image) : load_half(plane + 8 * r);
  }
  FTSO_ALWAYS_INLINE static void put_row(float* plane, int64_t image, int64_t r, bool second, Vec v) {
    second ? store_halves(plane + 8 * r, plane + 8 * r + image, v) : store_half(plane + 8 * r, v);
  }
  FTSO_ALWAYS_INLINE static Vec there(bool second, Vec v) { return second ? v : keep(tail(8), v); }
};

// A plane of x as a scratch image: stride 1 whole, stride 2 its even and its odd columns. As a PAIR, the rows of two
// images 8 pixels wide lie side by side, and a tap does not look across.
template <int S, bool PAIR = false>
struct Image {
  float* at[2];
  int64_t ld, border;

  // `memory`: S frames; returns what lies behind them. All of it becomes `fill`.
  static float* carve(Image& image, float* memory, int64_t H, int64_t W, int64_t border, float fill) {
    const Frame frame(H, S == 1 ? W : (W + 1) / 2, border);
    image.ld = frame.ld, image.border = border;
    for (int64_t i = 0; i < S * frame.floats(); ++i) memory[i] = fill;
    for (int s = 0; s < 2; ++s) image.at[s] = memory + (s % S) * frame.floats();
    return memory + S * frame.floats();
  }
  // Rows of whole vectors from row(r).
  template <typename Row>
  FTSO_ALWAYS_INLINE void put_rows(int64_t H, Row row) const {
    float* to = at[0] + border * ld + kMargin;
    const int64_t step = ld;
    for (int64_t r = 0; r < H; ++r) store(to + r * step, row(r));
  }
  // `change` maps a vector of pixels; `fill` stays around them. The plane `ahead` of x is asked for.
  template <typename Change>
  FTSO_ALWAYS_INLINE void put(const float* x, int64_t H, int64_t W, float fill, int64_t ahead, Change change) const {
    const int64_t step = ld;
    float* row[2] = {at[0] + border * ld + kMargin, at[1] + border * ld + kMargin};
    for (int64_t r = 0; r < H; ++r, x += W, row[0] += step, row[1] += step) {
      if constexpr (S == 1) {
        int64_t c = 0;
        for (; c + kLanes <= W; c += kLanes) prefetch(x + c + ahead), store(row[0] + c, change(load(x + c)));
        if (c < W)
          prefetch(x + c + ahead), store(row[0] + c, select(tail(W - c), change(load_part(x + c, W - c)), set1(fill)));
      } else {
        for (int64_t c = 0; c < W; c += kLanes) prefetch(x + c + ahead);
        split_row(x, W, [&](int64_t c, Vec even, Vec odd) {
          const int64_t left[2] = {(W + 1) / 2 - c, W / 2 - c};
          const Vec v[2] = {change(even), change(odd)};
          for (int s = 0; s < 2; ++s)
            store(row[s] + c, left[s] >= kLanes ? v[s]
                              : left[s] <= 0    ? set1(fill)
                                                : select(tail(left[s]), v[s], set1(fill)));
        });
      }
    }
  }
  // The pixels under tap column DX, `offset` behind output column 0 in the row of plane row 0.
  template <int K, int D, int DX>
  FTSO_ALWAYS_INLINE Vec tap(int64_t offset) const {
    constexpr int shift = DX * D - D * (K / 2);
    if constexpr (S == 1 && PAIR && shift != 0) {
      return load_turned<shift>(at[0] + kMargin + offset, mask_of(neighbours_of_pair(shift)));
    } else if constexpr (S == 1) {
      return load_shifted<shift>(at[0] + kMargin + offset);
    } else {
      constexpr int odd = shift & 1;
      return load_shifted<(shift - odd) / 2>(at[odd] + kMargin + offset);
    }
  }
};

#define FTSO_LAMBDA __attribute__((always_inline))

// Calls body(Index<0>{}) to body(Index<N - 1>{}): loops whose counter must be a constant, or arrays of vectors that it
// counts stay in memory.
template <int I>
struct Index {
  static constexpr int value = I;
};
template <int N, int I = 0, typename Body>
FTSO_INLINE void each(Body body) {
  if constexpr (I < N) body(Index<I>{}), each<N, I + 1>(body);
}
// Output rows r0..r0+R-1 of the window sums, all columns: put(row, column, vector).
template <int K, int S, int D, int R, bool PAIR, typename Put>
FTSO_INLINE void window_rows(const Image<S, PAIR>& image, const Vec (&w)[K * K], int64_t r0, int64_t Wo, Put put) {
  const int64_t first = S * r0 * image.ld;
  for (int64_t c = 0; c < Wo; c += kLanes) {
    Vec acc[R];
    each<R>([&](auto r) FTSO_LAMBDA { acc[r.value] = zero(); });
    each<S*(R - 1) + D*(K - 1) + 1>([&](auto row) FTSO_LAMBDA {
      each<K>([&](auto dx) FTSO_LAMBDA {
        const Vec v = image.template tap<K, D, dx.value>(first + row.value * image.ld + c);
        each<R>([&](auto r) FTSO_LAMBDA {
          constexpr int dy = row.value - S * r.value;
          if constexpr (dy >= 0 && dy % D == 0 && dy / D < K)
            acc[r.value] = fma(w[dy / D * K + dx.value], v, acc[r.value]);
        });
      });
    });
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) put(r0 + r, c, acc[r]);
  }
}

// sum over the window of weight * pixel, for every output pixel: put(row, column, vector).
template <int K, int S, int D, bool PAIR, typename Put>
FTSO_INLINE void windows(Image<S, PAIR> image, const float* weights, int64_t Ho, int64_t Wo, Put put) {
  Vec w[K * K];
#pragma GCC unroll 25
  for (int t = 0; t < K * K; ++t) w[t] = set1(weights[t]);
  int64_t r = 0;
  for (; r + kWindowRows <= Ho; r += kWindowRows) window_rows<K, S, D, kWindowRows>(image, w, r, Wo, put);
  for (; r < Ho; ++r) window_rows<K, S, D, 1>(image, w, r, Wo, put);
}

// Taps of N columns from FIRST on: acc[row * N + column] += pixel * d over R output rows from r0 on; d: compact rows of
// Wo.
template <int K, int S, int D, int R, int FIRST, int N, bool PAIR>
FTSO_INLINE void window_dots(const Image<S, PAIR>& image, const float* d, int64_t r0, int64_t Wo, Vec (&acc)[K * N]) {
  const int64_t first = S * r0 * image.ld;
  for (int64_t c = 0; c < Wo; c += kLanes) {
    Vec g[R];
    each<R>([&](auto r) FTSO_LAMBDA { g[r.value] = load_part(d + (r0 + r.value) * Wo + c, Wo - c); });
    each<S*(R - 1) + D*(K - 1) + 1>([&](auto row) FTSO_LAMBDA {
      each<N>([&](auto dx) FTSO_LAMBDA {
        const Vec v = image.template tap<K, D, FIRST + dx.value>(first + row.value * image.ld + c);
        each<R>([&](auto r) FTSO_LAMBDA {
          constexpr int dy = row.value - S * r.value;
          if constexpr (dy >= 0 && dy % D == 0 && dy / D < K) {
            Vec& a = acc[dy / D * N + dx.value];
            a = fma(g[r.value], v, a);
          }
        });
      });
    });
  }
}

// The weights' gradient of one plane added to the vectors at `sums`, one a tap.
template <int K, int S, int D, bool PAIR>
FTSO_INLINE void windows_gradient(Image<S, PAIR> image, const float* d, int64_t Ho, int64_t Wo, float* sums) {
  constexpr int R = kWindowRows > 1 ? 2 : 1, N = kPanel == 4 ? K : 1;  // as many columns as registers hold
  each<K / N>([&](auto pass) FTSO_LAMBDA {
    constexpr int first = pass.value * N;
    Vec acc[K * N];  // unrolled, or the compiler leaves them in memory
    each<K * N>([&](auto t) FTSO_LAMBDA { acc[t.value] = zero(); });
    int64_t r = 0;
    for (; r + R <= Ho; r += R) window_dots<K, S, D, R, first, N>(image, d, r, Wo, acc);
    for (; r < Ho; ++r) window_dots<K, S, D, 1, first, N>(image, d, r, Wo, acc);
    each<K * N>([&](auto t)
                    FTSO_LAMBDA { add_to(sums + (t.value / N * K + first + t.value % N) * kLanes, acc[t.value]); });
  });
}

// Stride 2, the pixels' gradient: row i of it, whose parity is PI, from the image of d; put(row, column, vector).
template <int K, int D, int PI, typename Put>
FTSO_INLINE void spread_row(const Image<1>& d, const Vec (&w)[K * K], int64_t i, int64_t W, Put put) {
  constexpr int P = D * (K / 2);
  const LanePairs low = lane_pairs(kLow[0], kLow[1]), high = lane_pairs(kHigh[0], kHigh[1]);
  const float* origin = d.at[0] + (i / 2 + d.border) * d.ld + kMargin;
  for (int64_t c = 0; c < W; c += 2 * kLanes) {
    Vec acc[2] = {zero(), zero()};
    each<K>([&](auto dy) FTSO_LAMBDA {
      each<K>([&](auto dx) FTSO_LAMBDA {
        constexpr int y = PI + P - dy.value * D, x = P - dx.value * D, odd = x & 1;
        if constexpr (y % 2 == 0)
          acc[odd] =
              fma(w[dy.value * K + dx.value], load_shifted<(x + odd) / 2>(origin + y / 2 * d.ld + c / 2), acc[odd]);
      });
    });
    put(i, c, pick(low, acc[0], acc[1]));
    if (W - c > kLanes) put(i, c + kLanes, pick(high, acc[0], acc[1]));
  }
}

template <int K, int D, typename Put>
FTSO_INLINE void spread(Image<1> d, const float* weights, int64_t H, int64_t W, Put put) {
  Vec w[K * K];
#pragma GCC unroll 25
  for (int t = 0; t < K * K; ++t) w[t] = set1(weights[t]);
  for (int64_t i = 0; i < H; ++i) i % 2 ? spread_row<K, D, 1>(d, w, i, W, put) : spread_row<K, D, 0>(d, w, i, W, put);
}

}  // namespace
}  // namespace ftso::FTSO_ISA
