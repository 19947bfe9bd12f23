// The skip cell (kernels/skip_cell.py has the equations), one text for every instruction set.
//
// At one channel c the four node sums need the states at c only, and they land at shuffle(c). So a walk along a
// cycle of the shuffle carries x2, x3, x4 from channel to channel, and the gradients walk the same cycle the other
// way. Only inputs and outputs travel through memory; a tile of pixels goes round a cycle at a time.
#include "ftso.h"
#include "simd.h"

namespace ftso::FTSO_ISA {
namespace {

// x2, x3, x4 at a channel follow from the inputs of the three channels before it; short cycles go round.
constexpr int32_t kLead = 3;

struct Rows {  // three rows of one tile: x2, x3, x4, or their gradients
  float* at[3];
  explicit Rows(float* memory) : at{memory, memory + kTile, memory + 2 * kTile} {}
  Rows(float* first, int64_t stride) : at{first, first + stride, first + 2 * stride} {}
  void clear() {
    for (float* r : at)
      for (int64_t t = 0; t < kTile; ++t) r[t] = 0;
  }
};

// A cycle of the shuffle within one image and one tile of n pixels; rows of channel m start at offset(m).
struct Walk {
  const int32_t* cycle;
  int32_t length;
  int64_t HW, n;
  int64_t offset(int32_t m) const { return cycle[(m % length + length) % length] * HW; }
};

// Channel to next channel. y5 is null on the way to a cycle's first channel, where it has no reader.
void step_fwd(const float* w, int64_t n, const float* x0, const float* x1, const Rows& x, const Rows& y, float* y5) {
  const float *x2 = x.at[0], *x3 = x.at[1], *x4 = x.at[2];
  float *y2 = y.at[0], *y3 = y.at[1], *y4 = y.at[2];
#pragma omp simd
  for (int64_t t = 0; t < n; ++t) {
    y2[t] = w[0] * x0[t] + w[1] * x1[t];
    y3[t] = w[2] * x0[t] + w[3] * x1[t] + w[4] * x2[t];
    y4[t] = w[5] * x0[t] + w[6] * x1[t] + w[7] * x2[t] + w[8] * x3[t];
  }
  if (!y5) return;
#pragma omp simd
  for (int64_t t = 0; t < n; ++t) y5[t] = w[9] * x0[t] + w[10] * x1[t] + w[11] * x2[t] + w[12] * x3[t] + w[13] * x4[t];
}

// Leaves x2, x3, x4 of the walk's first channel in `a`; `b` is overwritten.
void enter_fwd(const float* w, const Walk& walk, const float* x0, const float* x1, Rows& a, Rows& b) {
  a.clear();
  for (int32_t m = -kLead; m < 0; ++m) {
    step_fwd(w, walk.n, x0 + walk.offset(m), x1 + walk.offset(m), a, b, nullptr);
    Rows swap = a;
    a = b, b = swap;
  }
}

// Next channel to channel: total gradients d2..d5 there and output gradients g here give the totals e2..e4 here.
void step_bwd(const float* w, int64_t n, const Rows& d, const float* d5, const float* g, int64_t plane, const Rows& e) {
  const float *d3 = d.at[1], *d4 = d.at[2], *g2 = g, *g3 = g + plane, *g4 = g + 2 * plane;
  float *e2 = e.at[0], *e3 = e.at[1], *e4 = e.at[2];
#pragma omp simd
  for (int64_t t = 0; t < n; ++t) {
    e2[t] = g2[t] + w[4] * d3[t] + w[7] * d4[t] + w[11] * d5[t];
    e3[t] = g3[t] + w[8] * d4[t] + w[12] * d5[t];
    e4[t] = g4[t] + w[13] * d5[t];
  }
}

void input_gradient(int64_t n, float w2, float w3, float w4, float w5, const Rows& d, const float* d5, float* out) {
  const float *d2 = d.at[0], *d3 = d.at[1], *d4 = d.at[2];
#pragma omp simd
  for (int64_t t = 0; t < n; ++t) out[t] = w2 * d2[t] + w3 * d3[t] + w4 * d4[t] + w5 * d5[t];
}

// sums[e] += <gradient of edge e's node at the next channel, edge e's input here>, all 14 in one pass.
void edge_dots(int64_t n, const float* x0, const float* x1, const Rows& x, const Rows& d, const float* d5,
               double* sums) {
  const float *x2 = x.at[0], *x3 = x.at[1], *x4 = x.at[2], *d2 = d.at[0], *d3 = d.at[1], *d4 = d.at[2];
  float s0 = 0, s1 = 0, s2 = 0, s3 = 0, s4 = 0, s5 = 0, s6 = 0, s7 = 0, s8 = 0, s9 = 0, sa = 0, sb = 0, sc = 0, sd = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, sa, sb, sc, sd)
  for (int64_t t = 0; t < n; ++t) {
    s0 += d2[t] * x0[t], s1 += d2[t] * x1[t];
    s2 += d3[t] * x0[t], s3 += d3[t] * x1[t], s4 += d3[t] * x2[t];
    s5 += d4[t] * x0[t], s6 += d4[t] * x1[t], s7 += d4[t] * x2[t], s8 += d4[t] * x3[t];
    s9 += d5[t] * x0[t], sa += d5[t] * x1[t], sb += d5[t] * x2[t], sc += d5[t] * x3[t], sd += d5[t] * x4[t];
  }
  const float tile[kEdges] = {s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, sa, sb, sc, sd};
  for (int e = 0; e < kEdges; ++e) sums[e] += tile[e];
}

void walk_fwd(const float* w, const Walk& walk, int64_t plane, const float* x0, const float* x1, float* out) {
  float memory[2 * 3 * kTile];
  Rows x(memory), spare(memory + 3 * kTile);
  enter_fwd(w, walk, x0, x1, x, spare);
  for (int32_t m = 0; m < walk.length; ++m) {
    const int64_t here = walk.offset(m);
    const Rows y(out + walk.offset(m + 1), plane);
    step_fwd(w, walk.n, x0 + here, x1 + here, x, y, y.at[2] + plane);
    x = y;
  }
}

void walk_bwd(const float* w, const Walk& walk, int64_t plane, const float* g, const float* x0, const float* x1,
              float* grad_x0, float* grad_x1, double* dots, float* scratch) {
  const int64_t n = walk.n;
  float* rows = scratch + 2 * 3 * kTile;
  Rows a(scratch), b(scratch + 3 * kTile);
  if (dots) {  // recompute x2, x3, x4 of every channel of the cycle: cheaper than keeping them
    enter_fwd(w, walk, x0, x1, a, b);
    Rows x(rows);
    for (int i = 0; i < 3; ++i)
      for (int64_t t = 0; t < n; ++t) x.at[i][t] = a.at[i][t];
    for (int32_t m = 0; m + 1 < walk.length; ++m) {
      const Rows y(rows + (m + 1) * 3 * kTile);
      step_fwd(w, n, x0 + walk.offset(m), x1 + walk.offset(m), x, y, nullptr);
      x = y;
    }
  }
  a.clear();
  for (int32_t m = walk.length + kLead - 1; m >= 0; --m) {
    const int64_t here = walk.offset(m);
    const float* d5 = g + 3 * plane + walk.offset(m + 1);
    if (m < walk.length) {
      if (grad_x0) input_gradient(n, w[0], w[2], w[5], w[9], a, d5, grad_x0 + here);
      if (grad_x1) input_gradient(n, w[1], w[3], w[6], w[10], a, d5, grad_x1 + here);
      if (dots) edge_dots(n, x0 + here, x1 + here, Rows(rows + m * 3 * kTile), a, d5, dots);
    }
    step_bwd(w, n, a, d5, g + here, plane, b);
    Rows swap = a;
    a = b, b = swap;
  }
}

template <typename Visit>
void every_walk(const SkipCell& cell, Visit visit) {
  const int32_t* cycle = cell.channels;
  for (int32_t i = 0; i < cell.n_cycles; cycle += cell.lengths[i++])
    for (int64_t p = 0; p < cell.HW; p += kTile)
      visit(Walk{cycle, cell.lengths[i], cell.HW, cell.HW - p < kTile ? cell.HW - p : kTile}, p);
}

}  // namespace

const char* skip_cell_fwd(const SkipCell& cell, int64_t begin, int64_t end, const float* x0, const float* x1,
                          const float* weights, float* out) {
  const int64_t plane = cell.C * cell.HW;
  for (int64_t b = begin; b < end; ++b)
    every_walk(cell, [=](const Walk& walk, int64_t p) {
      const int64_t in = b * plane + p;
      walk_fwd(weights, walk, plane, x0 + in, x1 + in, out + b * kNodes * plane + p);
    });
  return compiled_isa;
}

const char* skip_cell_bwd(const SkipCell& cell, int64_t begin, int64_t end, const float* grad_out, const float* x0,
                          const float* x1, const float* weights, float* grad_x0, float* grad_x1, double* dots,
                          float* scratch) {
  const int64_t plane = cell.C * cell.HW;
  for (int64_t b = begin; b < end; ++b) {
    double* sums = dots ? dots + b * kEdges : nullptr;
    for (int e = 0; sums && e < kEdges; ++e) sums[e] = 0;
    every_walk(cell, [=](const Walk& walk, int64_t p) {
      const int64_t in = b * plane + p;
      walk_bwd(weights, walk, plane, grad_out + b * kNodes * plane + p, x0 + in, x1 + in,
               grad_x0 ? grad_x0 + in : nullptr, grad_x1 ? grad_x1 + in : nullptr, sums, scratch);
    });
  }
  return compiled_isa;
}

}  // namespace ftso::FTSO_ISA
