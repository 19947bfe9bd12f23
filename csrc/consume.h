// What reads a tile of activations: products with batch statistics forward; their gradients backward.
#pragma once
#include "chain.h"
#include "gemm.h"

namespace ftso::FTSO_ISA {
namespace {

// Gradient sums are taken in float over this many pixels, then added up in double: in constant regions of an image the
// rounding errors of a long float sum would all point the same way.
constexpr int64_t kRun = 32;
FTSO_INLINE void flush(double* sums, int64_t N, int64_t ld, float* s, float* q) {
  for (int64_t c = 0; c < N; ++c) sums[c] += s[c], sums[ld + c] += q[c], s[c] = 0, q[c] = 0;
}

constexpr int64_t kAhead = 128;  // pixels that a prefetch looks ahead: about a tile

// Above this many bytes a tensor does not fit the caches: its stores bypass them.
constexpr int64_t kStreamBytes = int64_t{4} << 20;
FTSO_INLINE bool streams(int64_t pixels, int64_t N) { return pixels * N * 4 >= kStreamBytes; }

// Rows of pixels that travel together, about 128 pixels: whole windows of 2x2, and of what FactorizedReduce makes of
// them if images have as many.
FTSO_INLINE int64_t tile_rows(const Shape& s) {
  const int64_t rows = 128 / s.W / 4 * 4, least = s.H % 4 ? 2 : 4;
  return rows < least ? least : rows > s.H ? s.H : rows;
}

FTSO_INLINE void put(float* at, bool past_caches, Vec value) { past_caches ? stream(at, value) : store(at, value); }

// A product with statistics, stored past the caches or into them.
FTSO_INLINE void product_with_statistics(bool past_caches, Rows a, int64_t P, const float* w, int64_t ldw, int64_t K,
                                         int64_t N, float* z, int64_t ldz, Finish finish, const Ahead& ahead = {}) {
  if (past_caches)
    product<Out::kStreamStats>(a, P, w, ldw, K, N, z, ldz, finish, ahead);
  else
    product<Out::kStats>(a, P, w, ldw, K, N, z, ldz, finish, ahead);
}

// `a` [P][ld] as the left operand of a product: as it is, or rounded to pairs in `room`.
FTSO_INLINE Rows left_operand(bool pairs, const float* a, int64_t P, int64_t ld, float* room) {
  for (int64_t i = 0; pairs && i < P * ld; i += kLanes) store_pairs(room + i / 2, load(a + i));
  return {pairs ? room : a, ld, 1, 0, pairs};
}

// Forward, the windows' columns from c on, one vector of `rows` pixels from `pixel` on at `from`. above [W/2][C] keeps
// the maxima of even rows until the next.
FTSO_INLINE void put_windows(const Product& p, int64_t W, int64_t pixel, int64_t rows, const float* from, int64_t ld,
                             int64_t c, bool past_caches, float* above) {
  const int64_t C = p.windows.C, q = p.windows.q;
  int64_t row = pixel / W, column = pixel % W;
  for (int64_t i = 0; i < rows; i += 2, from += 2 * ld) {
    const Vec even = load(from), odd = load(from + ld), highest = max(even, odd);
    const int64_t window = row / 2 * (W / 2) + column / 2;
    float* kept = above + column / 2 * C + c;
    if (row % 2)
      put(p.windows.highest + window * C + c, past_caches, max(load(kept), highest));
    else
      store(kept, highest);
    if (c < q) store_part(p.windows.processed + (2 * window + row % 2) * q + c, row % 2 ? odd : even, q - c);
    if ((column += 2) == W) column = 0, ++row;
  }
}

// The same for P pixels whose products lie in the caches.
FTSO_INLINE void put_windows(const Product& p, const Shape& s, int64_t first, int64_t P, float* above) {
  const int64_t C = p.windows.C;
  const bool past_caches = streams(s.B * s.H * s.W / 4, C);
  for (int64_t c = 0; c < C; c += kLanes)
    put_windows(p, s.W, first, P, p.planes[1].z + first * C + c, C, c, past_caches, above);
}

// z of a tile, with its statistics. above: for windows.
FTSO_INLINE void consume(const Product& p, const Shape& s, int64_t chunk, int64_t first, int64_t P, Rows a, int64_t K,
                         float* above, Ahead ahead = {}) {
  double* sums = p.sums + chunk * 2 * p.N;
  for (const Plane& plane : p.planes) {
    const int64_t c = plane.c, n = plane.n;
    if (!n) continue;
    const bool past_caches = streams(s.B * s.H * s.W, p.N) && !(c + n == p.N && p.windows.C);
    product_with_statistics(past_caches, a, P, p.w + c, p.N, K, n, plane.z + first * n, n, {sums + c, sums + p.N + c},
                            ahead);
    ahead = {};
  }
  put_windows(p, s, first, P, above);
}

// The rows r, r + 1 of a tile for FactorizedReduce: activations of pixels (even, even) and (odd, odd), z row.
template <typename Visit>
FTSO_INLINE void strided_rows(const Shape& s, int64_t first, int64_t P, int64_t K, Visit visit) {
  for (int64_t r = 0; r + 1 < P / s.W; r += 2) {
    const int64_t row = (first / s.W + r) / 2;  // images have an even number of rows
    visit(r * s.W * K, ((r + 1) * s.W + 1) * K, row * (s.W / 2));
  }
}

FTSO_INLINE Shape halved(const Shape& s) { return {s.B, s.H / 2, s.W / 2}; }

FTSO_INLINE void consume(const Strided& f, const Shape& s, int64_t chunk, int64_t first, int64_t P, Rows a, int64_t K,
                         float* above) {
  const int64_t N = f.p.N, Q = s.W / 2, ldw = f.width;
  double *sum = f.p.sums + chunk * 2 * N, *square = sum + N;
  const bool past_caches = streams(s.B * s.H * s.W / 4, N) && !f.p.windows.C;
  strided_rows(s, first, P, K, [=](int64_t even, int64_t odd, int64_t pixel) {
    float* z = f.p.planes[1].z + pixel * N;
    if (f.offset) {
      product_with_statistics(past_caches, a.with(even, 2 * K), Q, f.p.w, ldw, K, f.width, z, N, {sum, square});
      product_with_statistics(past_caches, a.with(odd, 2 * K), Q, f.w2, ldw, K, f.width, z + f.offset, N,
                              {sum + f.offset, square + f.offset});
    } else {
      product<Out::kStore>(a.with(even, 2 * K), Q, f.p.w, ldw, K, f.width, z, N);
      product<Out::kAdd>(a.with(odd, 2 * K), Q, f.w2, ldw, K, f.width, z, N);
      for (int64_t i = 0; i < Q; ++i)
        for (int64_t c = 0; c < N; c += kLanes) {
          const Vec v = load(z + i * N + c);
          add_to(sum + c, v), add_to(square + c, mul(v, v));
        }
    }
  });
  put_windows(f.p, halved(s), first / 4, P / 4, above);
}

// dz of the windows' columns at the four pixels of the window whose corner is `pixel`; dz: the corner's row. A
// maximum's gradient goes to the first pixel that has it.
FTSO_INLINE void window_behind_norm(const Product& p, int64_t W, int64_t pixel, float* dz) {
  const Windows& windows = p.windows;
  const int64_t at[4] = {0, 1, W, W + 1}, window = pixel / W / 2 * (W / 2) + pixel % W / 2;
  const float* z = p.planes[1].z + pixel * windows.C;
  for (int64_t c = 0; c < windows.C; c += kLanes) {
    const int64_t column = p.planes[1].c + c;
    const Vec al = load(p.al + column), be = load(p.be + column), ga = load(p.ga + column);
    Vec value[4], left = load(windows.d_highest + window * windows.C + c);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) value[i] = load(z + at[i] * windows.C + c);
    const Vec highest = max(max(value[0], value[1]), max(value[2], value[3]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      Vec g = where_equal(value[i], highest, left, zero());
      left = where_equal(value[i], highest, zero(), left);
      if ((i == 0 || i == 3) && c < windows.q)
        g = add(g, keep(tail(windows.q - c), load(windows.d_processed + (2 * window + i / 3) * windows.q + c)));
      store(dz + at[i] * p.N + column, fma(al, g, fma(be, value[i], ga)));
    }
  }
}

// dz = al * g + be * z + ga of whole rows of an image.
FTSO_INLINE void behind_norm(const Product& p, const Shape& s, int64_t first, int64_t P, float* dz) {
  for (const Plane& plane : p.planes) {
    if (!plane.g) continue;
    const int64_t n = plane.n;
    panels(n, [=, &p](auto width, int64_t c) {
      constexpr int NV = decltype(width)::value;
      const int64_t column = plane.c + c;
      const float *g = plane.g + first * n + c, *z = plane.z + first * n + c;
      Vec al[NV], be[NV], ga[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const int64_t at = column + v * kLanes;
        al[v] = load(p.al + at), be[v] = load(p.be + at), ga[v] = load(p.ga + at);
      }
      for (int64_t i = 0; i < P; ++i, g += n, z += n)
#pragma GCC unroll 4
        for (int v = 0; v < NV; ++v)
          store(dz + i * p.N + column + v * kLanes,
                fma(al[v], load(g + v * kLanes), fma(be[v], load(z + v * kLanes), ga[v])));
    });
  }
  for (int64_t row = 0; p.windows.C && row < P; row += 2 * s.W)
    for (int64_t i = row; i < row + s.W; i += 2) window_behind_norm(p, s.W, first + i, dz + i * p.N);
}

// What a product's gradient reads of the tile that begins at pixel `next`.
FTSO_INLINE Ahead gradients_ahead(const Product& p, int64_t next) {
  Ahead ahead;
  Ahead::Stream* stream = ahead.streams;
  for (const Plane& plane : p.planes) {
    const int64_t at = next * plane.n;
    if (plane.n) *stream++ = {plane.z + at, plane.n, plane.n};
    if (plane.n && plane.g) *stream++ = {plane.g + at, plane.n, plane.n};
  }
  return ahead;
}

// da[P][K] from the gradients of everything that read the tile; dz keeps them for the weight gradients. room: for dz as
// pairs.
FTSO_INLINE void gather_gradient(const Product& p, const Shape& s, int64_t first, int64_t P, int64_t K, float* dz,
                                 float* room, float* da) {
  behind_norm(p, s, first, P, dz);
  const Rows d = left_operand(p.pairs_backward, dz, P, p.N, room);
  product<Out::kStore>(d, P, p.wt, K, p.N, K, da, K, {}, gradients_ahead(p, first + P));
}

FTSO_INLINE void gather_gradient(const Strided& f, const Shape& s, int64_t first, int64_t P, int64_t K, float* dz,
                                 float* room, float* da) {
  const int64_t N = f.p.N, Q = s.W / 2;
  behind_norm(f.p, halved(s), first / 4, P / 4, dz);
  const Rows d = left_operand(f.p.pairs_backward, dz, P / 4, N, room);
  strided_rows(s, first, P, K, [=](int64_t even, int64_t odd, int64_t pixel) {
    const int64_t at = (pixel - first / 4) * N;
    product<Out::kAdd>(d.with(at, N), Q, f.p.wt, K, f.width, K, da + even, 2 * K, {},
                       gradients_ahead(f.p, pixel + P / 4));
    product<Out::kAdd>(d.with(at + f.offset, N), Q, f.wt2, K, f.width, K, da + odd, 2 * K);
  });
}

FTSO_INLINE void weight_gradient(const Product& p, int64_t chunk, int64_t P, const float* a, int64_t K,
                                 const float* dz) {
  outer_product(a, K, K, dz, p.N, p.N, P, p.dw + chunk * K * p.N, p.N);
}

FTSO_INLINE void weight_gradient(const Strided& f, const Shape& s, int64_t chunk, int64_t first, int64_t P,
                                 const float* a, int64_t K, const float* dz) {
  const int64_t N = f.p.N, Q = s.W / 2, at = chunk * K * f.width;
  strided_rows(s, first, P, K, [=](int64_t even, int64_t odd, int64_t pixel) {
    const float* d = dz + (pixel - first / 4) * N;
    outer_product(a + even, 2 * K, K, d, N, f.width, Q, f.p.dw + at, f.width);
    outer_product(a + odd, 2 * K, K, d + f.offset, N, f.width, Q, f.dw2 + at, f.width);
  });
}

FTSO_INLINE float* cleared(float* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = 0;
  return p;
}

FTSO_INLINE void clear_weight_gradients(const CellStep& c, int64_t chunk) {
  const int64_t n = c.K * c.product.N, strided = c.K * c.strided.width;
  if (c.product.N) cleared(c.product.dw + chunk * n, n);
  if (c.strided.p.N)
    cleared(c.strided.p.dw + chunk * strided, strided), cleared(c.strided.dw2 + chunk * strided, strided);
}

// Sums of one input's gradient, and of gradient times value, over a run.
struct InputSums {
  float *s, *q;
};
FTSO_INLINE void flush_sums(const CellStep& c, int64_t chunk, InputSums s0, InputSums s1) {
  const int64_t C = c.K / 4;
  const auto of_input = [=](const Source& x, InputSums sums) {
    if (x.g) flush(x.sums + chunk * 2 * x.columns, C, x.columns, sums.s, sums.q);
  };
  of_input(c.x0, s0), of_input(c.x1, s1);
}

// Everything that reads a cell's output: products, or the mean over image b. room: for the tile as pairs, and behind it
// for windows.
FTSO_INLINE void read_by(const CellStep& c, int64_t chunk, int64_t b, int64_t first, int64_t P, const float* a,
                         float* room, const Ahead& ahead) {
  const Rows tile = left_operand(c.product.pairs_forward, a, P, c.K, room);
  float* above = room + P * c.K;
  if (c.product.N) consume(c.product, c.shape, chunk, first, P, tile, c.K, above, ahead);
  if (c.strided.p.N) consume(c.strided, c.shape, chunk, first, P, tile, c.K, above);
  if (!c.pooled) return;
  ahead.ask(0, P);
  const int64_t HW = c.shape.H * c.shape.W;
  float* mean = c.pooled + b * c.K;
  for (int64_t k = 0; k < c.K; k += kLanes) {
    Vec total = first == b * HW ? zero() : load(mean + k);
    for (int64_t p = 0; p < P; ++p) total = add(total, load(a + p * c.K + k));
    store(mean + k, first + P == (b + 1) * HW ? mul(total, set1(1.f / HW)) : total);
  }
}

// The gradient of a tile of output: rows, or one row in `da` where only the mean reads it.
FTSO_INLINE void gradient_of_readers(const CellStep& c, int64_t b, int64_t first, int64_t P, float* dz, float* dzs,
                                     float* room, float* da) {
  const Vec share = set1(1.f / (c.shape.H * c.shape.W));
  for (int64_t k = 0; c.d_pooled && k < c.K; k += kLanes) store(da + k, mul(load(c.d_pooled + b * c.K + k), share));
  if (c.product.N) gather_gradient(c.product, c.shape, first, P, c.K, dz, room, da);
  if (c.strided.p.N) gather_gradient(c.strided, c.shape, first, P, c.K, dzs, room, da);
}

FTSO_INLINE void weight_gradients(const CellStep& c, int64_t chunk, int64_t first, int64_t P, const float* a,
                                  const float* dz, const float* dzs) {
  if (c.product.N) weight_gradient(c.product, chunk, P, a, c.K, dz);
  if (c.strided.p.N) weight_gradient(c.strided, c.shape, chunk, first, P, a, c.K, dzs);
}

// visit(image, first pixel, pixels) for the tiles of a chunk, in order.
template <typename Visit>
FTSO_INLINE void every_tile(const Shape& s, int64_t chunk, Visit visit) {
  const int64_t rows = tile_rows(s);
  for (int64_t b = first_image(s.B, chunk); b < first_image(s.B, chunk + 1); ++b)
    for (int64_t r = 0; r < s.H; r += rows) visit(b, (b * s.H + r) * s.W, (s.H - r < rows ? s.H - r : rows) * s.W);
}

// visit(first pixel, pixels) for the runs of a tile of P pixels.
template <typename Visit>
FTSO_INLINE void every_run(int64_t P, Visit visit) {
  for (int64_t p = 0; p < P; p += kRun) visit(p, P - p < kRun ? P - p : kRun);
}

// The tiles of a chunk backward: the gradients of what read a tile, undo(first pixel, pixels, da, ldd, a) for its runs,
// then the weights' gradients. da: gradient of the output, a row a pixel or (ldd 0, the mean over the image) one for
// all; a: where undo leaves the activations, null where no weight gradient wants them.
template <typename Undo>
FTSO_INLINE void every_run_backward(const CellStep& c, int64_t chunk, float* memory, Undo undo) {
  const int64_t T = tile_rows(c.shape) * c.shape.W, ldd = c.d_pooled ? 0 : c.K;
  float *da = memory, *a = da + T * c.K, *dz = a + T * c.K, *dzs = dz + T * c.product.N,
        *room = dzs + T * c.strided.p.N;
  const bool weights = c.product.dw;
  if (weights) clear_weight_gradients(c, chunk);
  every_tile(c.shape, chunk, [&](int64_t b, int64_t first, int64_t P) {
    gradient_of_readers(c, b, first, P, dz, dzs, room, da);
    every_run(P, [&](int64_t p, int64_t n) { undo(first + p, n, da + p * ldd, ldd, weights ? a + p * c.K : nullptr); });
    if (weights) weight_gradients(c, chunk, first, P, a, dz, dzs);
  });
}

}  // namespace
}  // namespace ftso::FTSO_ISA
