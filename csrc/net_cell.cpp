// A normal cell of the skip-only network, from the raw products behind its inputs to the raw products before the next
// batch norms (kernels/skip_net.py has the equations). Nodes live in registers, their concatenation in one tile.
#include "ftso.h"
#include "tiled.h"

namespace ftso::FTSO_ISA {
namespace {

template <int V>
void mix_tile(const CellStep& c, int64_t first, int64_t P, bool relu, float* a) {
  const int n = static_cast<int>(c.shuffle.vectors);
  const EdgeWeights b(c.weights);
  const Permutation<V> permutation(c.shuffle);
  const float *z0 = c.x0.z + first * c.x0.ld, *z1 = c.x1.z + first * c.x1.ld;
  const Vec floor = set1(relu ? 0.f : -__FLT_MAX__);
  for (int64_t p = 0; p < P; ++p) {
    State<V> x[6];
    load_state(c.x0, z0 + p * c.x0.ld, n, x[0]);
    load_state(c.x1, z1 + p * c.x1.ld, n, x[1]);
    mix(b, permutation, n, x);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      FTSO_EACH(v) store(a + p * c.K + (j * (V ? V : n) + v) * kLanes, max(floor, x[j + 2].at[v]));
  }
}

template <int V>
void mix_beside_tiles(const CellStep& c, int64_t chunk, float* scratch) {
  const EdgeWeights b(c.weights);
  const Permutation<V> permutation(c.shuffle);
  every_pixel_forward<V>(c, chunk, scratch, [&](int64_t pixel, State<V>* x) {
    const float *z0 = c.x0.z + pixel * c.x0.ld, *z1 = c.x1.z + pixel * c.x1.ld;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      prefetch(z0 + kAhead * c.x0.ld + v * kLanes), prefetch(z1 + kAhead * c.x1.ld + v * kLanes);
    load_state(c.x0, z0, V, x[0]), load_state(c.x1, z1, V, x[1]);
    mix(b, permutation, V, x);
  });
}

// One pixel of a cell backward, from the gradient of its output. Writes the inputs' gradients where asked, adds the
// edges' dots to `acc`, and leaves the activations in `a` where the weight gradient wants them.
template <int V, bool G0, bool G1, bool DOTS>
struct Unmix {
  const CellStep& c;
  const EdgeWeights b;
  const Permutation<V> permutation;
  const int n;
  const bool relu, past0, past1;
  const InputSums s0, s1;
  Unmix(const CellStep& step, InputSums sums0, InputSums sums1)
      : c(step),
        b(c.weights),
        permutation(c.shuffle),
        n(static_cast<int>(c.shuffle.vectors)),
        relu(!c.d_pooled),
        past0(streams(c.shape.B * c.shape.H * c.shape.W, c.x0.ldg)),
        past1(streams(c.shape.B * c.shape.H * c.shape.W, c.x1.ldg)),
        s0(sums0),
        s1(sums1) {}
  FTSO_ALWAYS_INLINE void pixel(int64_t p, const float* da, float* a, Vec* acc) const {
    State<V> x[6], d[6];
    const float *z0 = c.x0.z + p * c.x0.ld, *z1 = c.x1.z + p * c.x1.ld;
    FTSO_EACH(v) prefetch(z0 + kAhead * c.x0.ld + v * kLanes), prefetch(z1 + kAhead * c.x1.ld + v * kLanes);
    load_state(c.x0, z0, n, x[0]);
    load_state(c.x1, z1, n, x[1]);
    mix(b, permutation, n, x);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) FTSO_EACH(v) {
        const int64_t at = (j * (V ? V : n) + v) * kLanes;
        const Vec grad = load(da + at);
        d[j + 2].at[v] = relu ? where_positive(x[j + 2].at[v], grad) : grad;
        if (a) store(a + at, rectified(x[j + 2].at[v]));
      }
#pragma GCC unroll 4
    for (int j = 5; j >= 2; --j) {
      const int e = kFirstEdge[j];
      State<V> u;
      permutation.backward(d[j], u);
#pragma GCC unroll 6
      for (int i = 0; i < j; ++i) FTSO_EACH(v) {
          if (DOTS) acc[e + i] = fma(u.at[v], x[i].at[v], acc[e + i]);
          if (i >= 2 || (i == 0 && G0) || (i == 1 && G1))
            d[i].at[v] = i < 2 && j == 5 ? mul(b.at[e + i], u.at[v]) : fma(b.at[e + i], u.at[v], d[i].at[v]);
        }
    }
    if (G0) put_gradient<V>(c.x0, p, past0, n, d[0], x[0], s0);
    if (G1) put_gradient<V>(c.x1, p, past1, n, d[1], x[1], s1);
  }
};

// The same for a run. da: rows of 4 states, or one row for all pixels (ldd 0, the mean over the image).
template <int V, bool G0, bool G1, bool DOTS>
void unmix_tile(const CellStep& c, int64_t first, int64_t P, const float* da, int64_t ldd, float* a, double* dots,
                InputSums s0, InputSums s1) {
  const Unmix<V, G0, G1, DOTS> unmix(c, s0, s1);
  Vec acc[14];
  for (Vec& sum : acc) sum = zero();
  for (int64_t p = 0; p < P; ++p) unmix.pixel(first + p, da + p * ldd, a ? a + p * c.K : nullptr, acc);
  for (int e = 0; DOTS && e < 14; ++e) dots[e] += sum(acc[e]);
}

// Whether a cell is undone beside the tile unit: where a state is one vector the cell's own multiply-adds take the
// time, and on a Sapphire Rapids they seemed to start at half the rate behind the unit's work: no gain was measured.
constexpr bool undone_beside_tiles(int64_t vectors, bool g0, bool g1) { return vectors > 1 && g0 && g1; }

// The whole of a chunk on the tile unit.
template <int V, bool G0, bool G1, bool DOTS>
void unmix_beside_tiles(const CellStep& c, int64_t chunk, float* memory, double* dots, InputSums s0, InputSums s1) {
  const Unmix<V, G0, G1, DOTS> unmix(c, s0, s1);
  Vec acc[14];
  for (Vec& sum : acc) sum = zero();
  every_pixel_backward(
      c, chunk, memory, [&](int64_t pixel, const float* da, float* a) { unmix.pixel(pixel, da, a, acc); },
      [&] {
        for (int e = 0; DOTS && e < 14; ++e) dots[e] += sum(acc[e]), acc[e] = zero();
        flush_sums(c, chunk, s0, s1);
      });
}

// body(V, G0, G1, DOTS as types) for what is asked for.
template <bool B>
struct Is {
  static constexpr bool value = B;
};
template <typename Body>
FTSO_INLINE void with_wanted(const CellStep& c, const double* dots, Body body) {
  with_vectors(c.shuffle.vectors, [&](auto V) {
    const bool g0 = c.x0.g, g1 = c.x1.g;  // without dots it is a weight step, which wants both
    if (!dots) return body(V, Is<true>{}, Is<true>{}, Is<false>{});
    if (g0) return g1 ? body(V, Is<true>{}, Is<true>{}, Is<true>{}) : body(V, Is<true>{}, Is<false>{}, Is<true>{});
    g1 ? body(V, Is<false>{}, Is<true>{}, Is<true>{}) : body(V, Is<false>{}, Is<false>{}, Is<true>{});
  });
}

}  // namespace

const char* cell_fwd(const CellStep& c, int64_t chunk, float* scratch) {
  if (tiled(c, c.product.w_tiles, c.strided.w2_tiles)) {
    with_vectors(c.shuffle.vectors, [&](auto V) {
      if constexpr (tiled_vectors(decltype(V)::value)) mix_beside_tiles<decltype(V)::value>(c, chunk, scratch);
    });
    return compiled_isa;
  }
  float* a = scratch;
  every_tile(c.shape, chunk, [&](int64_t b, int64_t first, int64_t P) {
    with_vectors(c.shuffle.vectors, [&](auto V) { mix_tile<decltype(V)::value>(c, first, P, !c.pooled, a); });
    const auto next = [=](const Source& x) { return Ahead::Stream{x.z + (first + P) * x.ld, x.ld, c.K / 4}; };
    read_by(c, chunk, b, first, P, a, a + P * c.K, {{next(c.x0), next(c.x1)}});
  });
  return compiled_isa;
}

const char* cell_bwd(const CellStep& c, int64_t chunk, float* scratch) {
  const int64_t C = c.K / 4;
  float* sums = cleared(scratch, 4 * C);
  const InputSums s0{sums, sums + C}, s1{sums + 2 * C, sums + 3 * C};
  double* dots = c.dots ? c.dots + chunk * kDots : nullptr;
  if (tiled(c, c.product.wt_tiles, c.strided.wt2_tiles) && undone_beside_tiles(c.shuffle.vectors, c.x0.g, c.x1.g)) {
    with_wanted(c, dots, [&](auto V, auto G0, auto G1, auto DOTS) {
      if constexpr (tiled_vectors(decltype(V)::value) &&
                    undone_beside_tiles(decltype(V)::value, decltype(G0)::value, decltype(G1)::value))
        unmix_beside_tiles<decltype(V)::value, decltype(G0)::value, decltype(G1)::value, decltype(DOTS)::value>(
            c, chunk, sums + 4 * C, dots, s0, s1);
    });
    return compiled_isa;
  }
  every_run_backward(c, chunk, sums + 4 * C, [&](int64_t first, int64_t n, const float* da, int64_t ldd, float* a) {
    with_wanted(c, dots, [&](auto V, auto G0, auto G1, auto DOTS) {
      unmix_tile<decltype(V)::value, decltype(G0)::value, decltype(G1)::value, decltype(DOTS)::value>(
          c, first, n, da, ldd, a, dots, s0, s1);
    });
    flush_sums(c, chunk, s0, s1);
  });
  return compiled_isa;
}

}  // namespace ftso::FTSO_ISA
