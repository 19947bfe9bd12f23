// What reads a cell's output, on the tile unit (tiles.h): products of groups of pixels while the cell makes the next
// ones' left operand in registers, or takes back the gradients of the last.
#pragma once
#include "consume.h"
#include "mix.h"
#include "tiles.h"

namespace ftso::FTSO_ISA {
namespace {

// Whether the unit does a cell's products: their weights are there, and states are of a size that networks have. Each
// size takes its time to compile.
constexpr bool tiled_vectors(int64_t vectors) { return kTiles && (vectors == 1 || vectors == 2 || vectors == 4); }
FTSO_INLINE bool tiled(const CellStep& c, const float* weights, const float* strided_weights) {
  return c.product.N && weights && (!c.strided.p.N || strided_weights) && tiled_vectors(c.shuffle.vectors);
}

// Row `left` of a left operand: value(c), a vector, for the columns c < K.
template <typename Value>
FTSO_INLINE void store_row(float* left, int64_t K, Value value) {
  for (int64_t c = 0; c < K; c += kInner, left += 3 * kTileWords) {
    const Vec low = value(c);
    store_thirds(left, low, c + kLanes < K ? value(c + kLanes) : zero());
  }
}

// A raw product on its way out, with its statistics and windows.
struct Raw {
  const Product& p;
  const int64_t W;
  double* const sums;
  float* const above;  // [W/2][windows' columns]
  const bool past_caches, windows_past_caches;
  Raw(const Product& product, const Shape& s, int64_t chunk, float* memory)
      : p(product),
        W(s.W),
        sums(p.sums + chunk * 2 * p.N),
        above(memory),
        past_caches(streams(s.B * s.H * W, p.N)),
        windows_past_caches(streams(s.B * s.H * W / 4, p.windows.C)) {}
  // Of 16 rows of a group the columns of one vector: their sums in float, then added up in double.
  static int64_t items(int64_t rows, int64_t columns) { return (rows + 15) / 16 * (columns / kLanes); }
  // out: rows of `columns`, the product's from `first_column` on.
  FTSO_ALWAYS_INLINE void put(const Group& group, int64_t item, const float* out, int64_t columns,
                              int64_t first_column = 0) const {
    const int64_t vectors = columns / kLanes, row = item / vectors * 16, within = item % vectors * kLanes;
    const int64_t rows = group.rows - row < 16 ? group.rows - row : 16, c = first_column + within;
    const float* from = out + row * columns + within;
    const Plane& plane = p.plane(c);
    float* to = plane.z + (group.first + row) * plane.n + c - plane.c;
    Vec s[2] = {zero(), zero()}, q[2] = {zero(), zero()};
    const auto take = [&](int64_t i, int half) {
      const Vec value = load(from + i * columns);
      FTSO_ISA::put(to + i * plane.n, past_caches, value);
      s[half] = add(s[half], value), q[half] = fma(value, value, q[half]);
    };
    for (int64_t i = 0; i + 1 < rows; i += 2) take(i, 0), take(i + 1, 1);
    if (rows % 2) take(rows - 1, 0);
    add_to(sums + c, add(s[0], s[1])), add_to(sums + p.N + c, add(q[0], q[1]));
    if (p.windows.C && c >= p.planes[1].c)
      put_windows(p, W, group.first + row, rows, from, columns, c - p.planes[1].c, windows_past_caches, above);
  }
};

// The pixels of a tile that FactorizedReduce takes, side 0 the (even, even), side 1 the (odd, odd): the t-th of them.
FTSO_INLINE int64_t strided_pixel(const Shape& s, int side, int64_t t) {
  const int64_t Q = s.W / 2;
  return (t / Q * 2 + side) * s.W + t % Q * 2 + side;
}

// Where a tile's pixel stands among those of its side, or -1 where FactorizedReduce does not take it.
struct StridedPlace {
  int side;
  int64_t t;
  StridedPlace(const Shape& s, int64_t pixel) : side(static_cast<int>(pixel / s.W % 2)), t(-1) {
    const int64_t row = pixel / s.W, column = pixel % s.W;
    if (column % 2 == side) t = row / 2 * (s.W / 2) + column / 2;
  }
};

// A FactorizedReduce on the activations of a tile: two left operands, which the cell fills on its way, and the results.
struct StridedTiles {
  const CellStep& c;
  const int64_t apart, left_floats;  // from 16 rows of a left operand to the next 16
  float *left[2], *out;              // out: [side][pixels, rounded up][columns]
  static int64_t rows_of_side(const Shape& s) { return (tile_rows(s) * s.W / 4 + kGroup - 1) / kGroup * kGroup; }
  // inner: of the product; columns: of its result.
  StridedTiles(const CellStep& step, int64_t inner, float* memory)
      : c(step), apart(thirds_floats(inner, 16)), left_floats(thirds_floats(inner, rows_of_side(c.shape))) {
    left[0] = memory, left[1] = memory + left_floats, out = memory + 2 * left_floats;
  }
  float* row(int side, int64_t t) const { return left[side] + t / 16 * apart + t % 16 * kLanes; }
  // out = left w for both sides of P pixels.
  FTSO_ALWAYS_INLINE void multiply(const float* const (&w)[2], int64_t P, int64_t inner, int64_t columns) const {
    const int64_t blocks = inner_blocks(inner);
    for (int side = 0; side < 2; ++side)
      for (int64_t t = 0; t < P / 4; t += kGroup)
        multiply_columns(left[side] + t / 16 * apart, kGroup, w[side], blocks, columns, false, result(side, t, columns),
                         [] {});
  }
  float* result(int side, int64_t t, int64_t columns) const {
    return out + (side * rows_of_side(c.shape) + t) * columns;
  }
};

// The products of a chunk forward, from nodes(pixel, x): x[2..5], behind which comes relu.
template <int V, typename MakeNodes>
FTSO_INLINE void every_pixel_forward(const CellStep& c, int64_t chunk, float* scratch, MakeNodes nodes) {
  const TileUnit unit;
  const Strided& f = c.strided;
  const int64_t K = c.K, N = c.product.N;
  float *above = scratch, *above_strided = above + c.shape.W * N, *room = above_strided + c.shape.W * f.p.N;
  const Raw to(c.product, c.shape, chunk, above), strided_to(f.p, halved(c.shape), chunk, above_strided);
  TileStream stream(c.product.w_tiles, K, N, room);
  const StridedTiles strided(c, K, room + tile_stream_floats(K, N));
  const auto items = [=](int64_t rows) { return Raw::items(rows, N); };
  const auto put = [&](const Group& group, int64_t item, const float* out) { to.put(group, item, out, N); };
  every_tile(c.shape, chunk, [&](int64_t, int64_t first, int64_t P) {
    for (int64_t i = 0; i < P; i += stream.group_rows)
      stream.step(
          {first + i, P - i < stream.group_rows ? P - i : stream.group_rows},
          [&](int64_t row, float* left) {
            State<V> x[6];
            nodes(first + i + row, x);
            const auto value = [&](int v) { return rectified(x[2 + v / V].at[v % V]); };
#pragma GCC unroll 8
            for (int v = 0; v < 2 * V; ++v) store_thirds(left + v * 3 * kTileWords, value(2 * v), value(2 * v + 1));
            if (!f.p.N) return;
            const StridedPlace place(c.shape, i + row);
            if (place.t < 0) return;
            float* copy = strided.row(place.side, place.t);
            for (int tile = 0; tile < 3 * 2 * V; ++tile)
              store(copy + tile * kTileWords, load(left + tile * kTileWords));
          },
          items, put);
    if (!f.p.N) return;
    strided.multiply({f.p.w_tiles, f.w2_tiles}, P, K, f.width);
    for (int side = 0; side < 2; ++side)
      for (int64_t item = 0; item < Raw::items(P / 4, f.width); ++item)
        strided_to.put({first / 4, P / 4}, item, strided.result(side, 0, f.width), f.width, side * f.offset);
  });
  stream.drain(items, put);
}

// The weights' gradients of a tile.
FTSO_INLINE void weight_gradients_of_tiles(const CellStep& c, int64_t chunk, int64_t P, const float* a, const float* dz,
                                           const float* dzs, float* room) {
  const int64_t K = c.K, N = c.product.N;
  outer_product_of_tiles([=](int64_t p) { return a + p * K; }, K, [=](int64_t p) { return dz + p * N; }, N, P,
                         c.product.dw + chunk * K * N, room);
  const Strided& f = c.strided;
  if (f.p.N)
    for (int side = 0; side < 2; ++side)
      outer_product_of_tiles([=](int64_t t) { return a + strided_pixel(c.shape, side, t) * K; }, K,
                             [=](int64_t t) { return dzs + t * f.p.N + side * f.offset; }, f.width, P / 4,
                             (side ? f.dw2 : f.p.dw) + chunk * K * f.width, room);
}

// A chunk backward: undo(pixel, da, a) as in every_run_backward, but pixel by pixel, and finish() behind a run of them.
template <typename Undo, typename FinishRun>
FTSO_INLINE void every_pixel_backward(const CellStep& c, int64_t chunk, float* memory, Undo undo, FinishRun finish) {
  const Product& p = c.product;
  const int64_t K = c.K, N = p.N, T = inner_blocks(tile_rows(c.shape) * c.shape.W) * kInner;
  float *a = memory, *dz = a + T * K, *dzs = dz + T * N, *room = dzs + T * c.strided.p.N;
  const bool weights = p.dw;
  const Strided& f = c.strided;
  if (weights) clear_weight_gradients(c, chunk);
  const TileUnit unit;
  TileStream stream(p.wt_tiles, N, K, room);
  const StridedTiles strided(c, f.width, room + tile_stream_floats(N, K));
  int64_t tile = 0;
  const auto items = [](int64_t rows) { return rows; };
  const auto put = [&](const Group& group, int64_t row, float* out) {
    float* da = out + row * K;
    if (f.p.N) {
      const StridedPlace place(c.shape, group.first - tile + row);
      const float* more = strided.result(place.side, place.t, K);
      for (int64_t k = 0; place.t >= 0 && k < K; k += kLanes) add_to(da + k, load(more + k));
    }
    undo(group.first + row, da, weights ? a + (group.first - tile + row) * K : nullptr);
    if (row + 1 == group.rows) finish();
  };
  every_tile(c.shape, chunk, [&](int64_t, int64_t first, int64_t P) {
    tile = first;
    if (f.p.N) {
      behind_norm(f.p, halved(c.shape), first / 4, P / 4, dzs);
      for (int side = 0; side < 2; ++side)
        for (int64_t t = 0; t < P / 4; ++t)
          store_row(strided.row(side, t), f.width,
                    [=](int64_t k) { return load(dzs + t * f.p.N + side * f.offset + k); });
      strided.multiply({f.p.wt_tiles, f.wt2_tiles}, P, f.width, K);
    }
    every_run(P, [&](int64_t r, int64_t n) {
      stream.step(
          {first + r, n},
          [&](int64_t row, float* left) {
            const int64_t t = r + row, pixel = first + t;
            float *behind = dz + t * N, *kept = weights ? behind : nullptr;
            if (p.windows.C && t % 2 == 0 && t / c.shape.W % 2 == 0) window_behind_norm(p, c.shape.W, pixel, behind);
            store_row(left, N, [=, &p](int64_t k) {
              const Plane& plane = p.plane(k);
              const int64_t n = plane.n, at = pixel * n + k - plane.c;
              prefetch(plane.z + at + kAhead * n);
              if (!plane.g) return load(behind + k);
              prefetch(plane.g + at + kAhead * n);
              const Vec v =
                  fma(load(p.al + k), load(plane.g + at), fma(load(p.be + k), load(plane.z + at), load(p.ga + k)));
              if (kept) store(kept + k, v);
              return v;
            });
          },
          items, put);
    });
    if (weights || f.p.N) stream.drain(items, put);  // of what the next tile overwrites
    if (weights) weight_gradients_of_tiles(c, chunk, P, a, dz, dzs, room);
  });
  stream.drain(items, put);
}

}  // namespace
}  // namespace ftso::FTSO_ISA
