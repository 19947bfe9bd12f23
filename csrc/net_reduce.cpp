// A reduction cell of the skip-only network in two launches: the paths from the inputs (eight FactorizedReduce, pooled
// bypass), then, behind their batch norm, the nodes and what reads them. Gradients go the same way back.
#include "ftso.h"
#include "tiled.h"

namespace ftso::FTSO_ISA {
namespace {

// The four pixels of output pixel `out`, as offsets of rows of z: (0,0), (0,1), (1,0), (1,1).
struct Window {
  int64_t at[4];
  Window(const Shape& s, int64_t out_row, int64_t column) {
    const int64_t corner = 2 * out_row * s.W + 2 * column;
    at[0] = corner, at[1] = corner + 1, at[2] = corner + s.W, at[3] = corner + s.W + 1;
  }
};

FTSO_INLINE Vec normalised(const Source& x, const float* z, int64_t c) {
  return fma(load(z + c), load(x.scale + c), load(x.shift + c));
}

// relu of the processed channels at (0,0), then at (1,1): a row of 2q activations. Rows are written in order, so what
// a vector writes too far is overwritten (the last row has slack behind it).
FTSO_INLINE void processed_row(const ReducePaths& r, const Source& x, const Window& w, float* a) {
  for (int side = 0; side < 2; ++side) {
    const float* z = x.z + w.at[3 * side] * x.ld;
    for (int64_t c = 0; c < r.q; c += kLanes) store(a + side * r.q + c, max(normalised(x, z, c), zero()));
  }
}

// Reads the paths' values at one pixel, and mixes the four nodes into x.
template <int V>
struct Nodes {
  const ReduceStep& r;
  const EdgeWeights b;
  const Permutation<V> permutation;
  const int n;
  State<V> scale[4][2], shift[4][2];  // of the processed channels
  Mask processed[V ? V : kMaxVectors];
  explicit Nodes(const ReduceStep& step)
      : r(step), b(step.cell.weights), permutation(step.cell.shuffle), n(static_cast<int>(step.cell.shuffle.vectors)) {
    for (int v = 0; v * kLanes < r.q; ++v) {
      processed[v] = positive(load(r.processed + v * kLanes));
      for (int j = 0; j < 4; ++j)
        for (int input = 0; input < 2; ++input) {
          scale[j][input].at[v] = load(r.scale + column(j, input, v));
          shift[j][input].at[v] = load(r.shift + column(j, input, v));
        }
    }
  }
  int64_t column(int node, int input, int v) const { return input * r.F + node * r.q + v * kLanes; }

  // Of an input's edges to the four nodes: normalised f in the processed channels, the pooled bypass elsewhere.
  FTSO_ALWAYS_INLINE void read(int64_t pixel, int input, State<V> (*paths)[2]) const {
    const float *pooled = r.pooled[input] + pixel * r.C, *f = r.f + pixel * 2 * r.F;
    FTSO_EACH(v) {
      const Vec bypass = load(pooled + v * kLanes);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) paths[j][input].at[v] = bypass;
      if (v * kLanes < r.q) {  // the other lanes of f are other columns
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const Vec value = fma(load(f + column(j, input, v)), scale[j][input].at[v], shift[j][input].at[v]);
          paths[j][input].at[v] = select(processed[v], value, bypass);
        }
      }
    }
  }

  void mix(int64_t pixel, State<V> (*paths)[2], State<V>* x) const {
    read(pixel, 0, paths), read(pixel, 1, paths);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int e = kFirstEdge[j + 2];
      State<V> u;
      FTSO_EACH(v) { u.at[v] = fma(b.at[e + 1], paths[j][1].at[v], mul(b.at[e], paths[j][0].at[v])); }
#pragma GCC unroll 4
      for (int i = 0; i < j; ++i) FTSO_EACH(v) u.at[v] = fma(b.at[e + 2 + i], x[i].at[v], u.at[v]);
      permutation.forward(u, x[j]);
    }
  }
};

template <int V>
void reduce_tile(const ReduceStep& r, int64_t first, int64_t P, bool relu, float* a) {
  const Nodes<V> nodes(r);
  const int n = nodes.n;
  const Vec floor = set1(relu ? 0.f : -__FLT_MAX__);
  for (int64_t p = 0; p < P; ++p) {
    State<V> paths[4][2], x[4];
    nodes.mix(first + p, paths, x);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      FTSO_EACH(v) store(a + p * r.cell.K + (j * (V ? V : n) + v) * kLanes, max(x[j].at[v], floor));
  }
}

// Over a run of pixels, for the processed channels: a row for each node's gradient u (before its edges' weights), then
// a row for u times each of the node's two path values. Rows are whole vectors apart, and lanes past q are not read.
struct NodeSums {
  float* rows;
  const int64_t q, ld;
  NodeSums(float* memory, const ReduceStep& r) : rows(memory), q(r.q), ld(room(r) / kNodeSums) {
    for (int64_t i = 0; i < room(r); ++i) rows[i] = 0;
  }
  static int64_t room(const ReduceStep& r) { return kNodeSums * ((r.q + kLanes - 1) / kLanes * kLanes); }
  float* of(int row, int v) const { return rows + row * ld + v * kLanes; }
  // Into the sums of the gradients for normalised f, and of those times f.
  void flush(const ReduceStep& r, double* sums) const {
    for (int j = 0; j < 4; ++j)
      for (int input = 0; input < 2; ++input) {
        const double w = r.cell.weights[kFirstEdge[j + 2] + input];
        double* at = sums + input * r.F + j * q;
        const float *s = of(j, 0), *square = of(4 + 2 * j + input, 0);
        for (int64_t c = 0; c < q; ++c) at[c] += w * s[c], at[2 * r.F + c] += w * square[c];
      }
    for (int64_t i = 0; i < kNodeSums * ld; ++i) rows[i] = 0;
  }
};

// One pixel backward, from the gradient of its output: the gradients for the paths, and the edges' dots onto `acc`.
template <int V, bool DOTS>
struct Unreduce {
  const ReduceStep& r;
  const Nodes<V> nodes;
  const NodeSums sums;
  const bool relu, past_caches;
  Unreduce(const ReduceStep& step, NodeSums node_sums)
      : r(step),
        nodes(step),
        sums(node_sums),
        relu(!r.cell.d_pooled),
        past_caches(streams(r.cell.shape.B * r.cell.shape.H * r.cell.shape.W, r.C)) {}
  FTSO_ALWAYS_INLINE void pixel(int64_t pixel, const float* da, float* a, Vec* acc) const {
    const int n = nodes.n;
    const EdgeWeights& b = nodes.b;
    State<V> paths[4][2], x[4], d[4], u[4], to_input[2];
    for (const float* pooled : r.pooled) FTSO_EACH(v) prefetch(pooled + (pixel + kAhead) * r.C + v * kLanes);
    for (int64_t c = 0; c < 2 * r.F; c += kLanes) prefetch(r.f + (pixel + kAhead) * 2 * r.F + c);
    nodes.mix(pixel, paths, x);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) FTSO_EACH(v) {
        const int64_t at = (j * (V ? V : n) + v) * kLanes;
        const Vec grad = load(da + at);
        d[j].at[v] = relu ? where_positive(x[j].at[v], grad) : grad;
        if (a) store(a + at, max(x[j].at[v], zero()));
      }
#pragma GCC unroll 4
    for (int j = 3; j >= 0; --j) {
      const int e = kFirstEdge[j + 2];
      nodes.permutation.backward(d[j], u[j]);
      FTSO_EACH(v) {
#pragma GCC unroll 2
        for (int input = 0; input < 2; ++input) {
          const Vec w = b.at[e + input], grad = u[j].at[v];
          if (DOTS) acc[e + input] = fma(grad, paths[j][input].at[v], acc[e + input]);
          to_input[input].at[v] = j == 3 ? mul(w, grad) : fma(w, grad, to_input[input].at[v]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < j; ++i) {
          if (DOTS) acc[e + 2 + i] = fma(u[j].at[v], x[i].at[v], acc[e + 2 + i]);
          d[i].at[v] = fma(b.at[e + 2 + i], u[j].at[v], d[i].at[v]);
        }
      }
    }
    for (int input = 0; input < 2; ++input)
      FTSO_EACH(v) put(r.d_pooled[input] + pixel * r.C + v * kLanes, past_caches, to_input[input].at[v]);
    for (int j = 0; j < 4; ++j)  // in order: what a vector writes too far is overwritten
      for (int v = 0; v * kLanes < r.q; ++v) {
        const Vec grad = u[j].at[v];
        store(r.d_nodes + pixel * r.ld_nodes + j * r.q + v * kLanes, grad);
        float* s = sums.of(j, v);
        add_to(s, grad);
        for (int input = 0; input < 2; ++input) {
          float* q = sums.of(4 + 2 * j + input, v);
          store(q, fma(grad, paths[j][input].at[v], load(q)));
        }
      }
  }
};

// Only the smallest networks have reduction cells whose states are one vector.
constexpr bool tiled_nodes(int64_t vectors) { return tiled_vectors(vectors) && vectors > 1; }

template <int V, bool DOTS>
void unreduce_tile(const ReduceStep& r, int64_t first, int64_t P, const float* da, int64_t ldd, float* a, double* dots,
                   NodeSums sums) {
  const Unreduce<V, DOTS> unreduce(r, sums);
  Vec acc[14];
  for (Vec& s : acc) s = zero();
  for (int64_t p = 0; p < P; ++p) unreduce.pixel(first + p, da + p * ldd, a ? a + p * r.cell.K : nullptr, acc);
  for (int e = 0; DOTS && e < 14; ++e) dots[e] += sum(acc[e]);
}

// The whole of a chunk on the tile unit.
template <int V, bool DOTS>
void unreduce_beside_tiles(const ReduceStep& r, int64_t chunk, float* memory, double* dots, NodeSums sums) {
  const Unreduce<V, DOTS> unreduce(r, sums);
  Vec acc[14];
  for (Vec& s : acc) s = zero();
  every_pixel_backward(
      r.cell, chunk, memory, [&](int64_t p, const float* da, float* a) { unreduce.pixel(p, da, a, acc); },
      [&] {
        for (int e = 0; DOTS && e < 14; ++e) dots[e] += sum(acc[e]), acc[e] = zero();
        sums.flush(r, r.f_sums + chunk * 4 * r.F);
      });
}

template <int V>
void reduce_beside_tiles(const ReduceStep& r, int64_t chunk, float* scratch) {
  const Nodes<V> nodes(r);
  every_pixel_forward<V>(r.cell, chunk, scratch, [&](int64_t pixel, State<V>* x) {
    State<V> paths[4][2];
    for (const float* pooled : r.pooled)
      for (int64_t c = 0; c < r.C; c += kLanes) prefetch(pooled + (pixel + kAhead) * r.C + c);
    for (int64_t c = 0; c < 2 * r.F; c += kLanes) prefetch(r.f + (pixel + kAhead) * 2 * r.F + c);
    nodes.mix(pixel, paths, x + 2);
  });
}

// The gradient of one input at the four pixels of a window: through the maximum for the bypassed channels (the first
// of equal values takes it), through relu at (0,0) and (1,1) for the processed ones.
FTSO_INLINE void spread_gradient(const ReducePaths& r, const Source& x, const Window& w, const float* d_pooled,
                                 const float* d_processed, bool past_caches, float* s, float* q) {
  for (int64_t c = 0; c < r.C; c += kLanes) {
    const Vec bypass = load(r.bypass + c);
    Vec z[4], left = mul(load(d_pooled + c), bypass), total = zero(), squares = zero();
    for (int i = 0; i < 4; ++i)
      z[i] = load(x.z + w.at[i] * x.ld + c), prefetch(x.z + (w.at[i] + 2 * r.shape.W) * x.ld + c);
    const Vec highest = max(max(z[0], z[1]), max(z[2], z[3]));
    const Vec processed = load(r.processed + c);
    for (int i = 0; i < 4; ++i) {
      Vec g = where_equal(z[i], highest, left, zero());
      left = where_equal(z[i], highest, zero(), left);
      const Vec value = fma(z[i], load(x.scale + c), load(x.shift + c));
      if ((i == 0 || i == 3) && c < r.q)
        g = add(where_positive(processed, where_positive(value, load(d_processed + (i ? r.q : 0) + c))), g);
      put(x.g + w.at[i] * x.ld + c, past_caches, g);
      total = add(total, g), squares = fma(g, value, squares);
    }
    add_to(s + c, total), add_to(q + c, squares);
  }
}

template <typename Visit>
FTSO_INLINE void every_output_row(const Shape& s, int64_t chunk, Visit visit) {
  for (int64_t b = s.B * chunk / kChunks; b < s.B * (chunk + 1) / kChunks; ++b)
    for (int64_t row = b * s.H / 2; row < (b + 1) * s.H / 2; ++row) visit(row);
}

}  // namespace

const char* reduce_paths_fwd(const ReducePaths& r, int64_t chunk, float* scratch) {
  const int64_t Q = r.shape.W / 2, out_pixels = r.shape.B * r.shape.H * Q / 2;
  const bool past_caches = streams(out_pixels, r.C);
  float* a = scratch;
  double* sums = r.sums + chunk * 4 * r.F;
  every_output_row(r.shape, chunk, [&](int64_t row) {
    for (int input = 0; input < 2; ++input) {
      const Source& x = r.x[input];
      for (int64_t i = 0; i < Q; ++i) {
        const Window w(r.shape, row, i);
        processed_row(r, x, w, a + i * 2 * r.q);
        float* pooled = r.pooled[input] + (row * Q + i) * r.C;
        for (int64_t c = 0; c < r.C; c += kLanes) {
          const float* z = x.z + c;
          for (int k = 0; k < 4; ++k) prefetch(z + (w.at[k] + 2 * r.shape.W) * x.ld);
          const Vec highest = max(max(load(z + w.at[0] * x.ld), load(z + w.at[1] * x.ld)),
                                  max(load(z + w.at[2] * x.ld), load(z + w.at[3] * x.ld)));
          put(pooled + c, past_caches, mul(fma(highest, load(x.scale + c), load(x.shift + c)), load(r.bypass + c)));
        }
      }
      product_with_statistics(streams(out_pixels, 2 * r.F), {a, 2 * r.q}, Q, r.w[input], r.F, 2 * r.q, r.F,
                              r.f + row * Q * 2 * r.F + input * r.F, 2 * r.F,
                              {sums + input * r.F, sums + 2 * r.F + input * r.F});
    }
  });
  return compiled_isa;
}

const char* reduce_fwd(const ReduceStep& r, int64_t chunk, float* scratch) {
  const CellStep& c = r.cell;
  const int64_t pixels = c.shape.B * c.shape.H * c.shape.W;
  if (tiled(c, c.product.w_tiles, c.strided.w2_tiles) && tiled_nodes(c.shuffle.vectors)) {
    with_vectors(c.shuffle.vectors, [&](auto V) {
      if constexpr (tiled_nodes(decltype(V)::value)) reduce_beside_tiles<decltype(V)::value>(r, chunk, scratch);
    });
    return compiled_isa;
  }
  float* a = scratch;
  every_tile(c.shape, chunk, [&](int64_t b, int64_t first, int64_t P) {
    with_vectors(c.shuffle.vectors, [&](auto V) { reduce_tile<decltype(V)::value>(r, first, P, !c.pooled, a); });
    const auto next = [=](const float* x, int64_t ld) { return Ahead::Stream{x + (first + P) * ld, ld, ld}; };
    read_by(c, pixels, chunk, b, first, P, a, a + P * c.K,
            {{next(r.pooled[0], r.C), next(r.pooled[1], r.C), next(r.f, 2 * r.F)}});
  });
  return compiled_isa;
}

const char* reduce_bwd(const ReduceStep& r, int64_t chunk, float* scratch) {
  const CellStep& c = r.cell;
  const NodeSums sums(scratch, r);
  double* dots = c.dots ? c.dots + chunk * kDots : nullptr;
  float* memory = scratch + NodeSums::room(r);
  if (tiled(c, c.product.wt_tiles, c.strided.wt2_tiles) && tiled_nodes(c.shuffle.vectors)) {
    with_vectors(c.shuffle.vectors, [&](auto V) {
      constexpr int vectors = decltype(V)::value;
      if constexpr (tiled_nodes(vectors))
        (dots ? unreduce_beside_tiles<vectors, true> : unreduce_beside_tiles<vectors, false>)(r, chunk, memory, dots,
                                                                                              sums);
    });
    return compiled_isa;
  }
  every_run_backward(c, chunk, memory, [&](int64_t first, int64_t n, const float* da, int64_t ldd, float* a) {
    with_vectors(c.shuffle.vectors, [&](auto V) {
      constexpr int vectors = decltype(V)::value;
      (dots ? unreduce_tile<vectors, true> : unreduce_tile<vectors, false>)(r, first, n, da, ldd, a, dots, sums);
    });
    sums.flush(r, r.f_sums + chunk * 4 * r.F);
  });
  return compiled_isa;
}

const char* reduce_paths_bwd(const ReducePaths& r, int64_t chunk, float* scratch) {
  const int64_t Q = r.shape.W / 2, pixels = r.shape.B * r.shape.H * r.shape.W;
  float *sums = scratch, *a = sums + 2 * r.C, *df = a + Q * 2 * r.q + kLanes, *da = df + Q * r.F + kLanes;
  for (int64_t i = 0; i < 2 * r.C; ++i) sums[i] = 0;
  for (int input = 0; input < 2; ++input) {
    const Source& x = r.x[input];
    if (!x.g && !r.dw[input]) continue;
    float* dw = r.dw[input] ? cleared(r.dw[input] + chunk * 2 * r.q * r.F, 2 * r.q * r.F) : nullptr;
    const bool past_caches = streams(pixels, x.ld);
    float* al = scratch + 2 * r.C + Q * (2 * r.q + r.F + r.X) + 3 * kLanes;  // al times the weight of the node's edge
    for (int64_t c = 0; c < r.F; ++c)
      al[c] = c < 4 * r.q ? r.al[input * r.F + c] * r.weights[kFirstEdge[c / r.q + 2] + input] : 0;
    every_output_row(r.shape, chunk, [&](int64_t row) {
      for (int64_t i = 0; i < Q; ++i) {
        const int64_t pixel = row * Q + i;
        for (int64_t c = 0; c < r.F; c += kLanes) {
          const int64_t column = input * r.F + c;
          prefetch(r.f + (pixel + Q) * 2 * r.F + column), prefetch(r.d_nodes + (pixel + Q) * r.ld_nodes + c);
          const Vec f = load(r.f + pixel * 2 * r.F + column), node = load(r.d_nodes + pixel * r.ld_nodes + c);
          store(df + i * r.F + c, fma(load(al + c), node, fma(load(r.be + column), f, load(r.ga + column))));
        }
      }
      product<Out::kStore>({df, r.F}, Q, r.wt[input], r.X, r.F, r.X, da, r.X);
      for (int64_t i = 0; i < Q; ++i) {
        const Window w(r.shape, row, i);
        if (dw) processed_row(r, x, w, a + i * 2 * r.q);
        if (x.g)
          spread_gradient(r, x, w, r.d_pooled[input] + (row * Q + i) * r.C, da + i * r.X, past_caches, sums,
                          sums + r.C);
      }
      if (dw) outer_product(a, 2 * r.q, 2 * r.q, df, r.F, r.F, Q, dw, r.F);
      if (x.g) flush(x.sums + chunk * 2 * x.ld, r.C, x.ld, sums, sums + r.C);
    });
  }
  return compiled_isa;
}

}  // namespace ftso::FTSO_ISA
