// The nodes of a cell at one pixel, in registers: V vectors of channels a state, the shuffle a permutation of lanes.
// V = 0 is any number of vectors, through memory: the same text for widths that registers do not hold.
#pragma once
#include "chain.h"
#include "consume.h"

namespace ftso::FTSO_ISA {
namespace {

constexpr int kMaxVectors = 64;  // 1,024 channels a state

// A state at a pixel, and loops over its vectors.
template <int V>
struct State {
  Vec at[V ? V : kMaxVectors];
};
#define FTSO_EACH(v) _Pragma("GCC unroll 4") for (int v = 0; v < (V ? V : n); ++v)

template <int V>
struct Permutation {
  static constexpr int kPairs = V / 2;  // of sources; an odd last one is picked alone
  struct Table {
    LanePairs pairs[V * kPairs + 1];
    Lanes last[V];
    explicit Table(const int32_t* lane) {
      for (int o = 0; o < V; ++o, lane += V * kLanes) {
        for (int s = 0; s < kPairs; ++s)
          pairs[o * kPairs + s] = lane_pairs(lane + 2 * s * kLanes, lane + (2 * s + 1) * kLanes);
        last[o] = lanes(lane + (V - 1) * kLanes);
      }
    }
  };
  Table fwd, bwd;
  explicit Permutation(const Shuffle& s) : fwd(s.fwd), bwd(s.bwd) {}
  FTSO_INLINE void apply(const Table& table, const State<V>& from, State<V>& to) {
#pragma GCC unroll 4
    for (int o = 0; o < V; ++o) {
      if constexpr (kPairs > 0) to.at[o] = pick(table.pairs[o * kPairs], from.at[0], from.at[1]);
      if constexpr (kPairs > 1) to.at[o] = pick(to.at[o], table.pairs[o * kPairs + 1], from.at[2], from.at[3]);
      if constexpr (V % 2) to.at[o] = pick(V > 1 ? to.at[o] : zero(), table.last[o], from.at[V - 1]);
    }
  }
  void forward(const State<V>& u, State<V>& x) const { apply(fwd, u, x); }
  void backward(const State<V>& x, State<V>& u) const { apply(bwd, x, u); }
};

template <>
struct Permutation<0> {
  const int32_t* to;
  int64_t C;
  int n;
  explicit Permutation(const Shuffle& s) : to(s.to), C(s.C), n(static_cast<int>(s.vectors)) {}
  template <typename Move>
  void through_memory(const State<0>& from, State<0>& into, Move move) const {
    float a[kMaxVectors * kLanes], b[kMaxVectors * kLanes];
    for (int v = 0; v < n; ++v) store(a + v * kLanes, from.at[v]), store(b + v * kLanes, zero());
    for (int64_t c = 0; c < C; ++c) move(a, b, c);
    for (int v = 0; v < n; ++v) into.at[v] = load(b + v * kLanes);
  }
  void forward(const State<0>& u, State<0>& x) const {
    through_memory(u, x, [this](const float* a, float* b, int64_t c) { b[to[c]] = a[c]; });
  }
  void backward(const State<0>& x, State<0>& u) const {
    through_memory(x, u, [this](const float* a, float* b, int64_t c) { b[c] = a[to[c]]; });
  }
};

constexpr int kFirstEdge[6] = {0, 0, 0, 2, 5, 9};  // of node j

struct EdgeWeights {
  Vec at[14];
  explicit EdgeWeights(const float* weights) {
    for (int e = 0; e < 14; ++e) at[e] = set1(weights[e]);
  }
};

// x = z * scale + shift at one pixel.
template <int V>
FTSO_INLINE void load_state(const Source& s, const float* z, int n, State<V>& x) {
  FTSO_EACH(v) x.at[v] = fma(load(z + v * kLanes), load(s.scale + v * kLanes), load(s.shift + v * kLanes));
}

// The gradient for an input at one pixel, with its sums.
template <int V>
FTSO_INLINE void put_gradient(const Source& x, int64_t pixel, bool past_caches, int n, const State<V>& d,
                              const State<V>& value, InputSums sums) {
  float* g = x.g + pixel * x.ldg;
  FTSO_EACH(v) {
    put(g + v * kLanes, past_caches, d.at[v]);
    add_to(sums.s + v * kLanes, d.at[v]);
    store(sums.q + v * kLanes, fma(d.at[v], value.at[v], load(sums.q + v * kLanes)));
  }
}

// x[2..5] of a normal cell from x[0], x[1].
template <int V>
FTSO_INLINE void mix(const EdgeWeights& b, const Permutation<V>& permutation, int n, State<V>* x) {
#pragma GCC unroll 4
  for (int j = 2; j < 6; ++j) {
    State<V> u;
    FTSO_EACH(v) u.at[v] = mul(b.at[kFirstEdge[j]], x[0].at[v]);
#pragma GCC unroll 6
    for (int i = 1; i < j; ++i) FTSO_EACH(v) u.at[v] = fma(b.at[kFirstEdge[j] + i], x[i].at[v], u.at[v]);
    permutation.forward(u, x[j]);
  }
}

// body(Width<V>{}) for the number of vectors that a state has.
template <typename Body>
FTSO_INLINE void with_vectors(int64_t vectors, Body body) {
  if constexpr (kStateVectors == 4) {
    if (vectors == 1) return body(Width<1>{});
    if (vectors == 2) return body(Width<2>{});
    if (vectors == 3) return body(Width<3>{});
    if (vectors == 4) return body(Width<4>{});
  }
  body(Width<0>{});
}

}  // namespace
}  // namespace ftso::FTSO_ISA
