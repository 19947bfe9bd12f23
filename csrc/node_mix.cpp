// The sum into a node: every operator's result on the processed channels, every edge's bypass on the others, written
// where the channel shuffle puts them; backward, all dots of the node's gradient with what was added up.
#include "ftso.h"
#include "stencil.h"

namespace ftso::FTSO_ISA {
namespace {

FTSO_INLINE float* plane(const Planes& p, int64_t b, int64_t c) { return p.at + b * p.image + c * p.channel; }

template <typename Visit>
FTSO_INLINE void every_image(int64_t B, int64_t chunk, Visit visit) {
  for (int64_t b = B * chunk / kChunks; b < B * (chunk + 1) / kChunks; ++b) visit(b);
}

// The maxima of 2x2 in a row of the result: visit(first column, vector).
template <typename Visit>
FTSO_INLINE void pooled_row(const float* x, int64_t W, Visit visit) {
  split_row(x, W, [&](int64_t c, Vec even, Vec odd) {
    Vec below[2] = {zero(), zero()};
    split_row(x + W + 2 * c, W - 2 * c < 2 * kLanes ? W - 2 * c : 2 * kLanes,
              [&](int64_t, Vec e, Vec o) { below[0] = e, below[1] = o; });
    visit(c, even, odd, below[0], below[1]);
  });
}

// Adds `n` weighted planes and a constant to each other, a few vectors at a time. More planes than the processor
// follows by itself: the ones behind them (the next channel's, as a rule) are asked for.
template <int NV>
FTSO_INLINE void add_up(const float* const* from, const float* weight, int n, float base, float* to, int64_t p,
                        int64_t left, int64_t ahead) {
  Vec acc[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) acc[v] = set1(base);
  for (int s = 0; s < n; ++s) {
    const Vec w = set1(weight[s]);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      prefetch(from[s] + p + v * kLanes + ahead);
      acc[v] = fma(w, load_part(from[s] + p + v * kLanes, NV > 1 ? kLanes : left), acc[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) store_part(to + p + v * kLanes, acc[v], NV > 1 ? kLanes : left);
}
FTSO_INLINE void add_up_plane(const float* const* from, const float* weight, int n, float base, float* to, int64_t Q) {
  int64_t p = 0;
  for (; p + 4 * kLanes <= Q; p += 4 * kLanes) add_up<4>(from, weight, n, base, to, p, 0, Q);
  for (; p < Q; p += kLanes) add_up<1>(from, weight, n, base, to, p, Q - p, Q);
}

constexpr int64_t kRun = 256;  // pixels that are added up in float before the sum goes on in double

// The sum of visit(first pixel, pixels left) over a plane.
template <typename Visit>
FTSO_INLINE double over_plane(int64_t Q, Visit visit) {
  double total = 0;
  for (int64_t first = 0; first < Q; first += kRun) {
    Vec acc[2] = {zero(), zero()};
    const int64_t end = Q - first < kRun ? Q : first + kRun;
    int64_t p = first;
    for (; p + 2 * kLanes <= end; p += 2 * kLanes)
      for (int v = 0; v < 2; ++v) acc[v] = visit(p + v * kLanes, kLanes, acc[v]);
    for (; p < end; p += kLanes) acc[0] = visit(p, end - p, acc[0]);
    total += sum(add(acc[0], acc[1]));
  }
  return total;
}

FTSO_INLINE double dot_of_planes(const float* g, const float* y, float center, int64_t Q) {
  const Vec shift = set1(-center);
  return over_plane(Q, [=](int64_t p, int64_t left, Vec acc) {
    prefetch(y + p + Q);
    return fma(load_part(g + p, left), add(load_part(y + p, left), shift), acc);
  });
}

FTSO_INLINE double sum_of_plane(const float* g, int64_t Q) {
  return over_plane(Q, [=](int64_t p, int64_t left, Vec acc) { return add(acc, load_part(g + p, left)); });
}

// gx = (gx +) weight * g; returns the dot of g and x where x is given.
FTSO_INLINE double pass_back(const float* g, const float* x, float weight, float* gx, bool add_to_it, int64_t Q) {
  return over_plane(Q, [=](int64_t p, int64_t left, Vec acc) {
    const Vec d = load_part(g + p, left);
    prefetch(g + p + Q);
    if (x) prefetch(x + p + Q);
    if (gx) prefetch(gx + p + Q);
    if (gx) store_part(gx + p, fma(d, set1(weight), add_to_it ? load_part(gx + p, left) : zero()), left);
    return x ? fma(d, load_part(x + p, left), acc) : acc;
  });
}

// The same through the maximum of 2x2, whose first place in the order of rows gets the gradient.
FTSO_INLINE double pass_back_pooled(const float* g, const MixEdge& e, const float* x, float* gx, int64_t Wo) {
  const LanePairs low = lane_pairs(kLow[0], kLow[1]), high = lane_pairs(kHigh[0], kHigh[1]);
  const Vec weight = set1(e.weight);
  Vec dots = zero();
  const auto put = [&](float* to, int64_t left, Vec v) {
    store_part(to, e.add ? add(v, load_part(to, left)) : v, left);
  };
  for (int64_t r = 0; r < e.H / 2; ++r, g += Wo)
    pooled_row(x + 2 * r * e.W, e.W, [&](int64_t c, Vec v0, Vec v1, Vec v2, Vec v3) {
      const Vec d = load_part(g + c, Wo - c), most = max(max(v0, v1), max(v2, v3));
      dots = fma(d, most, dots);
      if (!gx) return;
      Vec left = mul(d, weight), given[4];
      const Vec from[4] = {v0, v1, v2, v3};
      for (int i = 0; i < 4; ++i) {
        given[i] = where_equal(from[i], most, left, zero());
        left = where_equal(from[i], most, zero(), left);
      }
      for (int row = 0; row < 2; ++row) {
        float* to = gx + (2 * r + row) * e.W + 2 * c;
        const int64_t n = e.W - 2 * c;
        put(to, n, pick(low, given[2 * row], given[2 * row + 1]));
        if (n > kLanes) put(to + kLanes, n - kLanes, pick(high, given[2 * row], given[2 * row + 1]));
      }
    });
  return sum(dots);
}

FTSO_INLINE void clear_plane(float* to, int64_t n) {
  for (int64_t p = 0; p < n; ++p) to[p] = 0;
}

}  // namespace

// scratch: a pointer and a weight for every source and edge, and for every edge a pooled plane.
const char* mix_fwd(const MixStep& s, int64_t chunk, float* scratch) {
  const int64_t Q = s.H * s.W, n = s.n_sources > s.n_edges ? s.n_sources : s.n_edges;
  const float** from = reinterpret_cast<const float**>(scratch);
  float *weight = scratch + 2 * rounded_up(n, kLanes), *pooled = weight + rounded_up(n, kLanes);
  every_image(s.B, chunk, [&](int64_t b) {
    for (int64_t c = 0; c < s.C; ++c) {
      float base = 0;
      for (int i = 0; i < s.n_sources; ++i) {
        const MixSource& m = s.sources[i];
        from[i] = plane(m.y, b, c);
        weight[i] = m.coefficient[c];
        float shift = m.shift ? m.shift[c] : 0;
        if (m.image_weights) weight[i] *= m.image_weights[b], shift *= m.image_weights[b];
        base += shift;
      }
      add_up_plane(from, weight, s.n_sources, base, plane(s.node, b, c * s.k), Q);
      for (int64_t group = 1; group < s.k; ++group) {
        for (int i = 0; i < s.n_edges; ++i) {
          const MixEdge& e = s.edges[i];
          const float* x = plane(e.x, b, (group - 1) * s.C + c);
          weight[i] = e.weight, from[i] = x;
          if (e.S == 1) continue;
          float* to = pooled + i * rounded_up(Q, kLanes);
          for (int64_t r = 0; r < s.H; ++r)
            pooled_row(x + 2 * r * e.W, e.W, [&](int64_t col, Vec v0, Vec v1, Vec v2, Vec v3) {
              store_part(to + r * s.W + col, max(max(v0, v1), max(v2, v3)), s.W - col);
            });
          from[i] = to;
        }
        add_up_plane(from, weight, s.n_edges, 0, plane(s.node, b, c * s.k + group), Q);
      }
    }
  });
  return compiled_isa;
}

const char* mix_bwd(const MixStep& s, int64_t chunk, float*) {
  const int64_t Q = s.H * s.W;
  for (int64_t c = 0; c < s.C; ++c) s.sums[chunk * s.C + c] = 0;
  for (int i = 0; i < s.n_sources; ++i)
    for (int64_t c = 0; c < s.C; ++c) {
      s.sources[i].dots[chunk * s.C + c] = 0;
      if (s.sources[i].sums) s.sources[i].sums[chunk * s.C + c] = 0;
    }
  for (int i = 0; i < s.n_edges; ++i) s.edges[i].dots[chunk] = 0;
  every_image(s.B, chunk, [&](int64_t b) {
    for (int i = 0; i < s.n_edges; ++i)
      if (const MixEdge& e = s.edges[i]; e.clear)
        for (int64_t c = 0; c < e.C; ++c) clear_plane(plane(e.gx, b, c), e.H * e.W);
    for (int64_t c = 0; c < s.C; ++c) {
      const float* g = plane(s.node, b, c * s.k);
      const double sum = sum_of_plane(g, Q);
      s.sums[chunk * s.C + c] += sum;
      for (int i = 0; i < s.n_sources; ++i) {
        const MixSource& m = s.sources[i];
        const double weight = m.image_weights ? m.image_weights[b] : 1;
        if (m.sums) m.sums[chunk * s.C + c] += weight * sum;
        if (weight != 0)
          m.dots[chunk * s.C + c] += weight * dot_of_planes(g, plane(m.y, b, c), m.center ? m.center[c] : 0, Q);
      }
      for (int i = 0; i < s.n_edges; ++i) {
        const MixEdge& e = s.edges[i];
        const bool wanted = e.gx.at;
        if (wanted && e.skip != 0) pass_back(g, nullptr, e.skip, plane(e.gx, b, c), e.add, Q);
        for (int64_t group = 1; group < s.k; ++group) {
          const float *gg = plane(s.node, b, c * s.k + group), *x = plane(e.x, b, (group - 1) * s.C + c);
          float* gx = wanted ? plane(e.gx, b, group * s.C + c) : nullptr;
          e.dots[chunk] += e.S == 1 ? pass_back(gg, x, e.weight, gx, e.add, Q) : pass_back_pooled(gg, e, x, gx, s.W);
        }
      }
    }
  });
  return compiled_isa;
}

}  // namespace ftso::FTSO_ISA
