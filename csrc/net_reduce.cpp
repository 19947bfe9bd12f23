// A reduction cell of the skip-only network in two launches: the paths from the inputs (eight FactorizedReduce), then,
// behind their batch norm, the nodes and what reads them. The channels that bypass the paths come as the maximum of
// windows, which the inputs' producers have written. Gradients go the same way back.
#include "ftso.h"
#include "tiled.h"

namespace ftso::FTSO_ISA {
namespace {

// relu of what the paths read of P windows from `first` on: rows of 2q activations, written in order, so that what a
// vector writes too far is overwritten (the last row has slack behind it).
FTSO_INLINE void activate(const ReducePaths& r, const Source& x, int64_t first, int64_t P, float* a) {
  const float* z = x.z + first * x.ld;
  const auto put = [=](int64_t at, Vec scale, Vec shift) { store(a + at, rectified(fma(load(z + at), scale, shift))); };
  if (2 * r.q == kLanes) {  // both pixels of a window are one vector
    float scale[kLanes], shift[kLanes];
    for (int64_t c = 0; c < kLanes; ++c) scale[c] = x.scale[c % r.q], shift[c] = x.shift[c % r.q];
    const Vec s = load(scale), t = load(shift);
    for (int64_t i = 0; i < P; ++i) put(i * kLanes, s, t);
    return;
  }
  for (int64_t i = 0; i < 2 * P; ++i)
    for (int64_t c = 0; c < r.q; c += kLanes) put(i * r.q + c, load(x.scale + c), load(x.shift + c));
}

// What `activate` will read from window `next` on.
FTSO_INLINE Ahead::Stream processed_ahead(const ReducePaths& r, const Source& x, int64_t next) {
  return {x.z + next * x.ld, 2 * r.q, 2 * r.q};
}

// Reads the paths' values at one pixel, and mixes the four nodes into x.
template <int V>
struct Nodes {
  const ReduceStep& r;
  const EdgeWeights b;
  const Permutation<V> permutation;
  const int n;
  State<V> scale[4][2], shift[4][2];  // of the processed channels
  Tail processed[V ? V : kMaxVectors];
  explicit Nodes(const ReduceStep& step)
      : r(step), b(step.cell.weights), permutation(step.cell.shuffle), n(static_cast<int>(step.cell.shuffle.vectors)) {
    for (int v = 0; v * kLanes < r.q; ++v) {
      processed[v] = tail(r.q - v * kLanes);
      for (int j = 0; j < 4; ++j)
        for (int input = 0; input < 2; ++input) {
          scale[j][input].at[v] = load(r.scale + column(j, input, v));
          shift[j][input].at[v] = load(r.shift + column(j, input, v));
        }
    }
  }
  int64_t column(int node, int input, int v) const { return input * r.F + node * r.q + v * kLanes; }

  // Of an input's edges to the four nodes: normalised f in the processed channels, the windows' maximum elsewhere.
  FTSO_ALWAYS_INLINE void read(const Source& input_source, int64_t pixel, int input, State<V> (*paths)[2]) const {
    const float* f = r.f + pixel * 2 * r.F;
    State<V> highest;
    load_state(input_source, input_source.z + pixel * input_source.ld, n, highest);
    FTSO_EACH(v) {
      const Vec bypass = highest.at[v];
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

  void ask_ahead(int64_t pixel) const {
    const Source *x0 = &r.cell.x0, *x1 = &r.cell.x1;
    FTSO_EACH(v)
    prefetch(x0->z + (pixel + kAhead) * x0->ld + v * kLanes), prefetch(x1->z + (pixel + kAhead) * x1->ld + v * kLanes);
    for (int64_t c = 0; c < 2 * r.F; c += kLanes) prefetch(r.f + (pixel + kAhead) * 2 * r.F + c);
  }
  void mix(int64_t pixel, State<V> (*paths)[2], State<V>* x) const {
    read(r.cell.x0, pixel, 0, paths), read(r.cell.x1, pixel, 1, paths);
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
      FTSO_EACH(v) store(a + p * r.cell.K + (j * (V ? V : n) + v) * kLanes, max(floor, x[j].at[v]));
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

// All sums of a run.
struct ReduceSums {
  NodeSums nodes;
  InputSums x0, x1;
  ReduceSums(float* memory, const ReduceStep& r) : nodes(memory, r) {
    float* inputs = cleared(memory + NodeSums::room(r), r.cell.K);
    const int64_t C = r.cell.K / 4;
    x0 = {inputs, inputs + C}, x1 = {inputs + 2 * C, inputs + 3 * C};
  }
  static int64_t room(const ReduceStep& r) { return NodeSums::room(r) + r.cell.K; }
  void flush(const ReduceStep& r, int64_t chunk) const {
    nodes.flush(r, r.f_sums + chunk * 4 * r.F);
    flush_sums(r.cell, chunk, x0, x1);
  }
};

// One pixel backward, from the gradient of its output: the gradients for the paths, and the edges' dots onto `acc`.
template <int V, bool DOTS>
struct Unreduce {
  const ReduceStep& r;
  const Nodes<V> nodes;
  const ReduceSums sums;
  const bool relu, past_caches;
  Unreduce(const ReduceStep& step, ReduceSums run_sums)
      : r(step),
        nodes(step),
        sums(run_sums),
        relu(!r.cell.d_pooled),
        past_caches(streams(r.cell.shape.B * r.cell.shape.H * r.cell.shape.W, r.cell.K / 4)) {}
  FTSO_ALWAYS_INLINE void pixel(int64_t pixel, const float* da, float* a, Vec* acc) const {
    const int n = nodes.n;
    const EdgeWeights& b = nodes.b;
    State<V> paths[4][2], x[4], d[4], u[4], to_input[2];
    nodes.ask_ahead(pixel);
    nodes.mix(pixel, paths, x);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) FTSO_EACH(v) {
        const int64_t at = (j * (V ? V : n) + v) * kLanes;
        const Vec grad = load(da + at);
        d[j].at[v] = relu ? where_positive(x[j].at[v], grad) : grad;
        if (a) store(a + at, rectified(x[j].at[v]));
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
      for (int v = 0; v * kLanes < r.q; ++v)
        to_input[input].at[v] = select(nodes.processed[v], zero(), to_input[input].at[v]);
    if (r.cell.x0.g) put_gradient<V>(r.cell.x0, pixel, past_caches, n, to_input[0], paths[3][0], sums.x0);
    if (r.cell.x1.g) put_gradient<V>(r.cell.x1, pixel, past_caches, n, to_input[1], paths[3][1], sums.x1);
    for (int j = 0; j < 4; ++j)  // in order: what a vector writes too far is overwritten
      for (int v = 0; v * kLanes < r.q; ++v) {
        const Vec grad = u[j].at[v];
        const int64_t column = j * r.q + v * kLanes;
        store_part(r.d_nodes + pixel * r.F + column, grad, r.F - column);
        float* s = sums.nodes.of(j, v);
        add_to(s, grad);
        for (int input = 0; input < 2; ++input) {
          float* q = sums.nodes.of(4 + 2 * j + input, v);
          store(q, fma(grad, paths[j][input].at[v], load(q)));
        }
      }
  }
};

// Only the smallest networks have reduction cells whose states are one vector.
constexpr bool tiled_nodes(int64_t vectors) { return tiled_vectors(vectors) && vectors > 1; }

template <int V, bool DOTS>
void unreduce_tile(const ReduceStep& r, int64_t first, int64_t P, const float* da, int64_t ldd, float* a, double* dots,
                   ReduceSums sums) {
  const Unreduce<V, DOTS> unreduce(r, sums);
  Vec acc[14];
  for (Vec& s : acc) s = zero();
  for (int64_t p = 0; p < P; ++p) unreduce.pixel(first + p, da + p * ldd, a ? a + p * r.cell.K : nullptr, acc);
  for (int e = 0; DOTS && e < 14; ++e) dots[e] += sum(acc[e]);
}

// The whole of a chunk on the tile unit.
template <int V, bool DOTS>
void unreduce_beside_tiles(const ReduceStep& r, int64_t chunk, float* memory, double* dots, ReduceSums sums) {
  const Unreduce<V, DOTS> unreduce(r, sums);
  Vec acc[14];
  for (Vec& s : acc) s = zero();
  every_pixel_backward(
      r.cell, chunk, memory, [&](int64_t p, const float* da, float* a) { unreduce.pixel(p, da, a, acc); },
      [&] {
        for (int e = 0; DOTS && e < 14; ++e) dots[e] += sum(acc[e]), acc[e] = zero();
        sums.flush(r, chunk);
      });
}

template <int V>
void reduce_beside_tiles(const ReduceStep& r, int64_t chunk, float* scratch) {
  const Nodes<V> nodes(r);
  every_pixel_forward<V>(r.cell, chunk, scratch, [&](int64_t pixel, State<V>* x) {
    State<V> paths[4][2];
    nodes.ask_ahead(pixel);
    nodes.mix(pixel, paths, x + 2);
  });
}

// The gradient for the processed channels of P windows behind their relu, with its sums. a: what `activate` made of
// them.
FTSO_INLINE void put_processed(const ReducePaths& r, const Source& x, int64_t first, int64_t P, const float* a,
                               const float* da, float* sums, int64_t chunk) {
  const int64_t n = 2 * r.q;
  const bool past_caches = n % kLanes == 0 && streams(r.shape.B * r.shape.H * r.shape.W, n);
  double* to = x.sums + chunk * 2 * x.columns;
  every_run(P, [&](int64_t run, int64_t size) {
    for (int64_t c = 0; c < n; c += kLanes) {
      const int64_t there = n - c;
      Vec s = zero(), q = zero();
      for (int64_t i = run; i < run + size; ++i) {
        const Vec value = load_part(a + i * n + c, there), d = where_positive(value, load(da + i * r.X + c));
        float* at = x.g + (first + i) * n + c;
        past_caches ? stream(at, d) : store_part(at, d, there);
        s = add(s, d), q = fma(d, value, q);
      }
      store(sums + c, s), store(sums + r.X + c, q);
    }
    for (int64_t c = 0; c < n; ++c) to[c % r.q] += sums[c], to[x.columns + c % r.q] += sums[r.X + c];
  });
}

}  // namespace

const char* reduce_paths_fwd(const ReducePaths& r, int64_t chunk, float* scratch) {
  const bool past_caches = streams(r.shape.B * r.shape.H * r.shape.W, 2 * r.F);
  float* a = scratch;
  double* sums = r.sums + chunk * 4 * r.F;
  every_tile(r.shape, chunk, [&](int64_t, int64_t first, int64_t P) {
    for (int input = 0; input < 2; ++input) {
      activate(r, r.x[input], first, P, a);
      product_with_statistics(
          past_caches, {a, 2 * r.q}, P, r.w[input], r.F, 2 * r.q, r.F, r.f + first * 2 * r.F + input * r.F, 2 * r.F,
          {sums + input * r.F, sums + 2 * r.F + input * r.F}, {{processed_ahead(r, r.x[input], first + P)}});
    }
  });
  return compiled_isa;
}

const char* reduce_fwd(const ReduceStep& r, int64_t chunk, float* scratch) {
  const CellStep& c = r.cell;
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
    read_by(c, chunk, b, first, P, a, a + P * c.K,
            {{next(c.x0.z, c.x0.ld), next(c.x1.z, c.x1.ld), next(r.f, 2 * r.F)}});
  });
  return compiled_isa;
}

const char* reduce_bwd(const ReduceStep& r, int64_t chunk, float* scratch) {
  const CellStep& c = r.cell;
  const ReduceSums sums(scratch, r);
  double* dots = c.dots ? c.dots + chunk * kDots : nullptr;
  float* memory = scratch + ReduceSums::room(r);
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
    sums.flush(r, chunk);
  });
  return compiled_isa;
}

const char* reduce_paths_bwd(const ReducePaths& r, int64_t chunk, float* scratch) {
  const int64_t T = tile_rows(r.shape) * r.shape.W;
  float *sums = scratch, *a = sums + 2 * r.X, *df = a + T * 2 * r.q + kLanes, *da = df + T * r.F;
  float* als = da + T * r.X;  // al times the weight of the node's edge, of both inputs
  for (int input = 0; input < 2; ++input) {
    for (int64_t c = 0; c < r.F; ++c)
      als[input * r.F + c] = c < 4 * r.q ? r.al[input * r.F + c] * r.weights[kFirstEdge[c / r.q + 2] + input] : 0;
    if (r.dw[input]) cleared(r.dw[input] + chunk * 2 * r.q * r.F, 2 * r.q * r.F);
  }
  every_tile(r.shape, chunk, [&](int64_t, int64_t first, int64_t P) {
    for (int input = 0; input < 2; ++input) {
      const Source& x = r.x[input];
      if (!x.g && !r.dw[input]) continue;
      for (int64_t c = 0; c < r.F; c += kLanes) {
        const int64_t column = input * r.F + c;
        const Vec al = load(als + column), be = load(r.be + column), ga = load(r.ga + column);
        const float *f = r.f + first * 2 * r.F + column, *nodes = r.d_nodes + first * r.F + c;
        for (int64_t i = 0; i < P; ++i, nodes += r.F, f += 2 * r.F)
          store(df + i * r.F + c, fma(al, load(nodes), fma(be, load(f), ga)));
      }
      activate(r, x, first, P, a);
      if (x.g) {
        const int64_t next = first + P;
        const Ahead ahead{{{r.f + next * 2 * r.F + input * r.F, 2 * r.F, r.F},
                           {r.d_nodes + next * r.F, r.F, input ? 0 : r.F},
                           processed_ahead(r, x, next)}};
        product<Out::kStore>({df, r.F}, P, r.wt[input], r.X, r.F, r.X, da, r.X, {}, ahead);
        put_processed(r, x, first, P, a, da, sums, chunk);
      }
      if (r.dw[input]) outer_product(a, 2 * r.q, 2 * r.q, df, r.F, r.F, P, r.dw[input] + chunk * 2 * r.q * r.F, r.F);
    }
  });
  return compiled_isa;
}

}  // namespace ftso::FTSO_ISA
