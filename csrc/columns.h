// A block's products: rows are channels, columns are the pixels of a group of images. Nothing here knows the window of
// the convolution, so all blocks share one compiled copy: one for images side by side in pairs, one for single images.
#pragma once
#include "stencil.h"

namespace ftso::FTSO_ISA {
namespace {

#define FTSO_APART __attribute__((noinline))

// The images that a block treats at a time: n from b on.
struct Images {
  int64_t b, n;
};

// How far from channel c of image b the plane lies that is wanted next: the same channel of the group's next image
// (`unit` on), then the next channel of its first.
FTSO_INLINE int64_t ahead_of(const Planes& p, int64_t b, Images group, int64_t unit) {
  return b + unit < group.b + group.n ? unit * p.image : p.channel - (b - group.b) * p.image;
}

// Where the vectors of a group's columns lie within the planes of an image: offset from the group's first image, and
// how many pixels are left there.
struct Columns {
  int64_t *offset, *left;
  static float* carve(Columns& columns, float* memory, const Group& g, int64_t HW, int64_t image, bool pair) {
    const int64_t n = (g.images + (pair ? g.images % 2 : 0)) * g.plane / kLanes;
    columns.offset = reinterpret_cast<int64_t*>(memory);
    columns.left = columns.offset + n;
    if (pair)  // row v % 8 of the pair v / 8
      for (int64_t v = 0; v < n; ++v) columns.offset[v] = v / 8 * 2 * image + v % 8 * 8, columns.left[v] = v / 8 * 2;
    for (int64_t i = 0, v = 0; !pair && i < g.images; ++i)
      for (int64_t within = 0; within < g.plane; within += kLanes, ++v)
        columns.offset[v] = i * image + within, columns.left[v] = HW - within;
    return memory + rounded_up(4 * n, kLanes);
  }
};

// put(row, column, acc[MR][NV]) for a[P][K] w[K][N], N whole vectors.
template <int NV, int MR, typename Put>
FTSO_INLINE void product_rows(const float* a, int64_t K, const float* w, int64_t ldw, int64_t row, int64_t column,
                              Put put) {
  Vec acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[i][v] = zero();
  multiply<MR, NV, false>(Rows{a + row * K, K}, w + column, ldw, K, acc);
  put(row, column, acc);
}
template <typename Put>
FTSO_INLINE void product_of_planes(const float* a, int64_t P, int64_t K, const float* w, int64_t ldw, int64_t N,
                                   Put put) {
  panels(N, [=](auto width, int64_t c) {
    constexpr int NV = decltype(width)::value, MR = rows_of(NV);
    int64_t p = 0;
    for (; p + MR <= P; p += MR) product_rows<NV, MR>(a, K, w, ldw, p, c, put);
    if constexpr (MR > 4)
      for (; p + 4 <= P; p += 4) product_rows<NV, 4>(a, K, w, ldw, p, c, put);
    for (; p + 2 <= P; p += 2) product_rows<NV, 2>(a, K, w, ldw, p, c, put);
    for (; p < P; ++p) product_rows<NV, 1>(a, K, w, ldw, p, c, put);
  });
}

// out = a[P][K] w[K][N], rows of out and w `ld` apart.
FTSO_APART void product_to_rows(const float* a, int64_t P, int64_t K, const float* w, int64_t N, float* out,
                                int64_t ld) {
  product_of_planes(a, P, K, w, ld, N, [=](int64_t row, int64_t col, auto& acc) {
    constexpr int MR = sizeof acc / sizeof acc[0], NV = sizeof acc[0] / sizeof(Vec);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) store(out + (row + i) * ld + col + v * kLanes, acc[i][v]);
  });
}

// out[m][k] += <a row m, b row k>: the weights' gradient. Blocks at the rim repeat their last row.
FTSO_APART void dots_of_planes(const float* a, int64_t M, const float* b, int64_t K, int64_t ld, int64_t n,
                               float* out) {
  constexpr int R = 4, C = kDotColumns;
  for (int64_t m = 0; m < M; m += R)
    for (int64_t k = 0; k < K; k += C) {
      const float *left[R], *right[C];
      for (int64_t i = 0; i < R; ++i) left[i] = a + (m + i < M ? m + i : M - 1) * ld;
      for (int64_t j = 0; j < C; ++j) right[j] = b + (k + j < K ? k + j : K - 1) * ld;
      Register acc[R * C];
#pragma GCC unroll 16
      for (int i = 0; i < R * C; ++i) acc[i] = Register();
      for (int64_t p = 0; p < n; p += kRegister) {
        Register row[C];
#pragma GCC unroll 4
        for (int j = 0; j < C; ++j) row[j] = load_register(right[j] + p);
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) {
          const Register l = load_register(left[i] + p);
#pragma GCC unroll 4
          for (int j = 0; j < C; ++j) acc[C * i + j] = fma(l, row[j], acc[C * i + j]);
        }
      }
      float found[R * C];
      store_sums(found, acc);
      for (int64_t i = 0; i < R && m + i < M; ++i)
        for (int64_t j = 0; j < C && k + j < K; ++j) out[(m + i) * K + k + j] += found[C * i + j];
    }
}

FTSO_INLINE float mean_of(const float* y, int64_t n) {
  float total = 0;
  for (int64_t i = 0; i < n; ++i) total += y[i];
  return total / static_cast<float>(n);
}

// Where a group's outputs go: pixels of y, and the vectors of their sums.
template <bool PAIR>
struct Outputs {
  const BlockStep& s;
  Columns columns, columns_of_plus;
  float* row_sums;  // [2][N] vectors
  float* pivots;    // [N]: the sums are of y - pivot, or a channel that hardly varies loses digits
  bool no_pivots;

  // y = pointwise times `depthwise`, rows of `ld` of which n_columns hold the group's pixels.
  FTSO_APART void put(const float* depthwise, int64_t ld, int64_t n_columns, Images group) const {
    // A store may change whatever a pointer leads to, as far as the compiler knows: copies stay in registers.
    const Planes y{s.y.at + group.b * s.y.image, s.y.image, s.y.channel};
    const Planes plus{s.plus.at ? s.plus.at + group.b * s.plus.image : nullptr, s.plus.image, s.plus.channel};
    const Columns to = columns, from = columns_of_plus;
    const float* biases = s.bias;
    const bool sums = s.sums;
    product_of_planes(s.pointwise, s.N, s.C, depthwise, ld, n_columns, [=](int64_t row, int64_t col, auto& acc) {
      constexpr int MR = sizeof acc / sizeof acc[0], NV = sizeof acc[0] / sizeof(Vec);
      if (biases) add_bias<MR, NV>(biases + row, acc);
      if (plus.at) add_plus<MR, NV>(plus, from, group.n, row, col, acc);
      put_block<MR, NV>(y, to, group.n, row, col, acc);
      if (sums) put_sums<MR, NV>(y, group.n, row, col, acc);
    });
  }
  template <int MR, int NV>
  FTSO_ALWAYS_INLINE static void add_bias(const float* biases, Vec (&acc)[MR][NV]) {
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const Vec bias = set1(biases[i]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[i][v] = add(acc[i][v], bias);
    }
  }
  template <int MR, int NV>
  FTSO_ALWAYS_INLINE static void add_plus(Planes plus, Columns at, int64_t images, int64_t row, int64_t col,
                                          Vec (&acc)[MR][NV]) {
    const float* base = plus.at + row * plus.channel;
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const float* from = base + at.offset[col / kLanes + v];
      const int64_t left = at.left[col / kLanes + v];
#pragma GCC unroll 16
      for (int i = 0; i < MR; ++i, from += plus.channel)
        acc[i][v] = add(acc[i][v], PAIR ? Pair::row(from, plus.image, 0, left + 1 < images) : load_part(from, left));
    }
  }
  template <int MR, int NV>
  FTSO_ALWAYS_INLINE static void put_block(Planes y, Columns at, int64_t images, int64_t row, int64_t col,
                                           const Vec (&acc)[MR][NV]) {
    float* base = y.at + row * y.channel;
    int64_t offset[NV], left[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) offset[v] = at.offset[col / kLanes + v], left[v] = at.left[col / kLanes + v];
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i, base += y.channel)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        float* to = base + offset[v];
        PAIR ? Pair::put_row(to, y.image, 0, left[v] + 1 < images, acc[i][v]) : store_part(to, acc[i][v], left[v]);
      }
  }
  template <int MR, int NV>
  FTSO_ALWAYS_INLINE void put_sums(Planes y, int64_t images, int64_t row, int64_t col, const Vec (&acc)[MR][NV]) const {
    const int64_t first = col / kLanes;
    int64_t left[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) left[v] = columns.left[first + v];
    constexpr int64_t kStored = NV * kLanes / (PAIR ? 2 : 1);
    const int64_t Q = s.Ho * s.Wo;
    for (int i = 0; i < MR && first == 0 && no_pivots; ++i)
      pivots[row + i] = mean_of(y.at + (row + i) * y.channel, Q < kStored ? Q : kStored);
    add_up<MR, NV>(images, row, left, acc);
  }
  template <int MR, int NV>
  FTSO_ALWAYS_INLINE void add_up(int64_t n, int64_t row, const int64_t (&left)[NV], const Vec (&y)[MR][NV]) const {
    float *totals = row_sums + row * kLanes, *square_totals = totals + s.N * kLanes;
    const float* subtract = pivots + row;
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const Vec pivot = set1(-subtract[i]);
      Vec total = zero(), squares = zero();
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        Vec d = add(y[i][v], pivot);
        if constexpr (PAIR)
          d = Pair::there(left[v] + 1 < n, d);
        else if (left[v] < kLanes)
          d = keep(tail(left[v]), d);
        total = add(total, d), squares = fma(d, d, squares);
      }
      add_to(totals + i * kLanes, total), add_to(square_totals + i * kLanes, squares);
    }
  }
  void clear() const {
    for (int64_t i = 0; i < 2 * s.N * kLanes; i += kLanes) store(row_sums + i, zero());
  }
  // Adds what a group of n images has summed to the chunk's sums.
  void flush(int64_t n, double* sums, double* squares) const {
    for (int64_t m = 0; m < s.N; ++m) {
      const double pivot = pivots[m], pixels = n * s.Ho * s.Wo, d = sum(load(row_sums + m * kLanes));
      sums[m] += d + pixels * pivot;
      squares[m] += sum(load(row_sums + (s.N + m) * kLanes)) + pivot * (2 * d + pixels * pivot);
    }
  }
};

// The gradient for y without its al, channel c of image b: one plane, or a pair's.
template <bool PAIR>
FTSO_APART void put_dy(const BlockStep& s, Images group, int64_t b, int64_t c, float* out) {
  const float *g = s.g.at + b * s.g.image + c * s.g.channel, *y = s.y.at + b * s.y.image + c * s.y.channel;
  const Vec be = set1(s.be[c]), ga = set1(s.ga[c]), center = set1(-s.center[c]);
  const Vec weight = set1(s.image_weights ? s.image_weights[b] : 1);
  constexpr int64_t kUnit = PAIR ? 2 : 1;
  const int64_t next_g = ahead_of(s.g, b, group, kUnit), next_y = ahead_of(s.y, b, group, kUnit);
  if constexpr (PAIR) {
    const bool second = b + 1 < group.b + group.n;
    const int64_t other_g = second ? s.g.image : 0, other_y = second ? s.y.image : 0;
    float both[kLanes];
    store(both, weight);
    for (int64_t i = 8; second && s.image_weights && i < kLanes; ++i) both[i] = s.image_weights[b + 1];
    const Vec weights = load(both);
    for (int64_t r = 0; r < 8; ++r) {
      prefetch(g + 8 * r + next_g), prefetch(y + 8 * r + next_y);
      prefetch(g + other_g + 8 * r + next_g), prefetch(y + other_y + 8 * r + next_y);
      const Vec hat = add(Pair::row(y, other_y, r, second), center);
      store(out + 16 * r, Pair::there(second, fma(Pair::row(g, other_g, r, second), weights, fma(hat, be, ga))));
    }
    return;
  }
  const int64_t n = s.Ho * s.Wo;
  int64_t p = 0;
  for (; p + kLanes <= n; p += kLanes) {
    prefetch(g + p + next_g), prefetch(y + p + next_y);
    store(out + p, fma(load(g + p), weight, fma(add(load(y + p), center), be, ga)));
  }
  if (p < n) {
    const Tail t = tail(n - p);
    store(out + p, keep(t, fma(load(g + p, t), weight, fma(add(load(y + p, t), center), be, ga))));
  }
}

}  // namespace
}  // namespace ftso::FTSO_ISA
