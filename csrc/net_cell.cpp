// A normal cell of the skip-only network, from the raw products behind its inputs to the raw products before the next
// batch norms (kernels/skip_net.py has the equations). Nodes live in registers, their concatenation in one tile.
#include "consume.h"
#include "ftso.h"
#include "mix.h"

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
      FTSO_EACH(v) store(a + p * c.K + (j * (V ? V : n) + v) * kLanes, max(x[j + 2].at[v], floor));
  }
}

// Sums of one input's gradient, and of gradient times value, over a tile.
struct InputSums {
  float *s, *q;
};

template <int V>
FTSO_INLINE void put_gradient(const Source& x, int64_t pixel, bool past_caches, int n, const State<V>& d,
                              const State<V>& value, InputSums sums) {
  float* g = x.g + pixel * x.ld;
  FTSO_EACH(v) {
    put(g + v * kLanes, past_caches, d.at[v]);
    add_to(sums.s + v * kLanes, d.at[v]);
    store(sums.q + v * kLanes, fma(d.at[v], value.at[v], load(sums.q + v * kLanes)));
  }
}

// da: rows of 4 states, or one row for all pixels (ldd 0, the mean over the image). Writes the inputs' gradients where
// asked, adds the edges' dots, and leaves the activations in `a` where the weight gradient wants them.
template <int V, bool G0, bool G1, bool DOTS>
void unmix_tile(const CellStep& c, int64_t first, int64_t P, bool relu, const float* da, int64_t ldd, float* a,
                double* dots, InputSums s0, InputSums s1) {
  const int n = static_cast<int>(c.shuffle.vectors);
  const EdgeWeights b(c.weights);
  const Permutation<V> permutation(c.shuffle);
  const int64_t pixels = c.shape.B * c.shape.H * c.shape.W;
  const float *z0 = c.x0.z + first * c.x0.ld, *z1 = c.x1.z + first * c.x1.ld;
  const bool past0 = streams(pixels, c.x0.ld), past1 = streams(pixels, c.x1.ld);
  Vec acc[14];
  for (Vec& sum : acc) sum = zero();
  for (int64_t p = 0; p < P; ++p) {
    State<V> x[6], d[6];
    FTSO_EACH(v) prefetch(z0 + (p + kAhead) * c.x0.ld + v * kLanes), prefetch(z1 + (p + kAhead) * c.x1.ld + v * kLanes);
    load_state(c.x0, z0 + p * c.x0.ld, n, x[0]);
    load_state(c.x1, z1 + p * c.x1.ld, n, x[1]);
    mix(b, permutation, n, x);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) FTSO_EACH(v) {
        const int64_t at = (j * (V ? V : n) + v) * kLanes;
        const Vec grad = load(da + p * ldd + at);
        d[j + 2].at[v] = relu ? where_positive(x[j + 2].at[v], grad) : grad;
        if (a) store(a + p * c.K + at, max(x[j + 2].at[v], zero()));
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
    if (G0) put_gradient<V>(c.x0, first + p, past0, n, d[0], x[0], s0);
    if (G1) put_gradient<V>(c.x1, first + p, past1, n, d[1], x[1], s1);
  }
  for (int e = 0; DOTS && e < 14; ++e) dots[e] += sum(acc[e]);
}

template <int V>
void unmix(const CellStep& c, int64_t first, int64_t P, bool relu, const float* da, int64_t ldd, float* a, double* dots,
           InputSums s0, InputSums s1) {
  const bool g0 = c.x0.g, g1 = c.x1.g;  // without dots it is a weight step, which wants both
  (!dots ? unmix_tile<V, true, true, false>
   : g0  ? g1 ? unmix_tile<V, true, true, true> : unmix_tile<V, true, false, true>
   : g1  ? unmix_tile<V, false, true, true>
         : unmix_tile<V, false, false, true>)(c, first, P, relu, da, ldd, a, dots, s0, s1);
}

}  // namespace

const char* cell_fwd(const CellStep& c, int64_t chunk, float* scratch) {
  float* a = scratch;
  const int64_t pixels = c.shape.B * c.shape.H * c.shape.W;
  every_tile(c.shape, chunk, [&](int64_t b, int64_t first, int64_t P) {
    with_vectors(c.shuffle.vectors, [&](auto V) { mix_tile<decltype(V)::value>(c, first, P, !c.pooled, a); });
    const auto next = [=](const Source& x) { return Ahead::Stream{x.z + (first + P) * x.ld, x.ld, c.K / 4}; };
    read_by(c, pixels, chunk, b, first, P, a, a + P * c.K, {{next(c.x0), next(c.x1)}});
  });
  return compiled_isa;
}

const char* cell_bwd(const CellStep& c, int64_t chunk, float* scratch) {
  const int64_t C = c.K / 4;
  float* sums = cleared(scratch, 4 * C);
  double* dots = c.dots ? c.dots + chunk * kDots : nullptr;
  every_run_backward(c, chunk, sums + 4 * C, [&](int64_t first, int64_t n, const float* da, int64_t ldd, float* a) {
    with_vectors(c.shuffle.vectors, [&](auto V) {
      unmix<decltype(V)::value>(c, first, n, !c.d_pooled, da, ldd, a, dots, {sums, sums + C},
                                {sums + 2 * C, sums + 3 * C});
    });
    if (c.x0.g) flush(c.x0.sums + chunk * 2 * c.x0.ld, C, c.x0.ld, sums, sums + C);
    if (c.x1.g) flush(c.x1.sums + chunk * 2 * c.x1.ld, C, c.x1.ld, sums + 2 * C, sums + 3 * C);
  });
  return compiled_isa;
}

}  // namespace ftso::FTSO_ISA
