// What the launches of a mixed node hand to each other. NCHW: a plane is the H*W contiguous pixels of one channel of
// one image; images and channels may lie any distance apart. Every step works on one chunk of the images at a time.
#pragma once
#include "chain.h"

namespace ftso {

struct Planes {
  float* at;
  int64_t image, channel;  // floats from one to the next
};

// x = plane * scale[c] + shift[c], ReLU, depthwise K x K (K = 1: none, stride picks pixels), product with `pointwise`
// [N][C]: y, raw. Forward sums y and its squares: a chunk's row is 2*ld_sums doubles, the squares in its second half.
// Backward, dy = al * (g + be * (y - center) + ga): centers are means rounded to float, so that little cancels, and
// what rounding does to al stays outside, as sums of dy do cancel. `pointwise_t` has al in it, d_pointwise is without.
struct BlockStep {
  int64_t B, C, N, H, W, Ho, Wo;
  int K, S, D;  // depthwise size, stride, dilation
  Planes x;
  const float *scale, *shift;            // null: x as it is
  const float* depthwise;                // [C][K*K]
  const float *pointwise, *pointwise_t;  // [N][C], [C][N]
  Planes y;
  const float* bias;  // [N], added to y; null: none
  Planes plus;        // added to y as well; null: nothing
  double* sums;       // null: not wanted
  int64_t ld_sums;
  Planes g;
  const float* image_weights;  // [B], what g is multiplied with; null: nothing
  const float *be, *ga, *center;
  // the gradient for x, before `scale`: added to gx or written; null: not wanted. gx_sums: of it, and of it times
  // x - center_x, 2*C doubles a chunk; null: not wanted.
  Planes gx;
  bool add;
  const float* center_x;
  double* gx_sums;
  float *d_depthwise, *d_pointwise;  // C*K*K and N*C floats a chunk; null: not wanted
};

// Maximum and mean over 3x3, each where wanted: raw, with 2*C doubles of sums and squares a chunk.
struct PoolStep {
  int64_t B, C, H, W, Ho, Wo;
  int S;
  Planes x;
  const float* inverse;  // [Ho*Wo]: 1 / pixels that are there
  struct Kind {
    Planes y;  // null: not wanted
    double* sums;
    const float *al, *be, *ga, *center;  // dy as a block's
  } max, mean;
  Planes g, gx;  // the gradient is added to gx
};

// What a node adds up on its processed channels: (y * coefficient[c] + shift[c]) * image_weights[b].
struct MixSource {
  Planes y;
  const float *coefficient, *shift;  // [C]; shift null: 0
  const float* image_weights;        // [B]; null: 1
  const float* center;               // [C], backward: dots are with y - center; null: with y
  double *sums, *dots;               // C a chunk: of image_weights * g (null: `MixStep::sums` are they), and its dots
};

// What an edge adds on the channels that bypass its operators, and its gradient.
struct MixEdge {
  Planes x;      // the first bypassed channel; at stride 2 the maximum of 2x2
  int64_t C;     // its state's processed channels
  int64_t H, W;  // of x
  int S;
  float weight;
  Planes gx;     // backward: first processed channel; null: not wanted
  bool add;      // else written
  bool clear;    // the gradient's processed channels are set to zero
  float skip;    // of the identity among its operators, 0 where there is none
  double* dots;  // one a chunk
};

// node[c * k] = sum of sources, node[c * k + g] = sum of edges' channel (g - 1) * C + c, g = 1..k-1.
struct MixStep {
  int64_t B, C, k, H, W;  // C: processed channels
  int n_sources, n_edges;
  const MixSource* sources;
  const MixEdge* edges;
  Planes node;   // backward: its gradient
  double* sums;  // of the gradient on the processed channels: C a chunk
};

// Kernels include this: always inline, so that the linker keeps no copy of one instruction set for everybody.
#define FTSO_SHARED inline __attribute__((always_inline))

FTSO_SHARED constexpr int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Scratch images: zeros (or another fill) around; rows of x begin at kMargin, and the next row's margin ends them.
constexpr int64_t kMargin = kLanes;
struct Frame {
  int64_t rows, ld;
  FTSO_SHARED Frame(int64_t H, int64_t W, int64_t border) : rows(H + 2 * border), ld(rounded_up(W, kLanes) + kMargin) {}
  FTSO_SHARED int64_t floats() const { return rows * ld + kMargin; }
};

// Images that a block treats together, and the columns of their products: planes padded to whole vectors.
struct Group {
  int64_t images, plane, ld;
  // Images of 8 x 8 lie side by side in pairs, so that a row fills a vector.
  FTSO_SHARED static constexpr bool pairs(int64_t HW) { return HW == 64; }
  FTSO_SHARED Group(int64_t B, int64_t C, int64_t HW) : plane(rounded_up(HW, kLanes)) {
    const int64_t chunk = (B + kChunks - 1) / kChunks, widest = 64000 / (C * plane);
    images = 1024 / plane < widest ? 1024 / plane : widest;
    images = images < 1 ? 1 : images > chunk ? chunk : images;
    images = (chunk + (chunk + images - 1) / images - 1) / ((chunk + images - 1) / images);  // groups of one size
    if (pairs(HW)) images = images > 1 ? rounded_up(images, 2) : 1;
    ld = (pairs(HW) ? rounded_up(images, 2) : images) * plane + kLanes;  // no multiple of the page size
  }
};

FTSO_SHARED int64_t border_of(int K, int D) { return D * (K / 2); }

FTSO_SHARED int64_t block_scratch(const BlockStep& s) {
  const int64_t border = border_of(s.K, s.D);
  const Group g(s.B, s.C > s.N ? s.C : s.N, s.Ho * s.Wo);
  const int64_t frames =
      s.S * Frame(s.H, s.S == 1 ? s.W : (s.W + 1) / 2, border).floats() + Frame(s.Ho, s.Wo, border).floats();
  const int64_t vectors = g.images * g.plane / kLanes;
  return frames + (2 * s.C + s.N) * g.ld + (2 * kLanes + 1) * rounded_up(s.N, kLanes) +
         8 * rounded_up(vectors, kLanes) + s.K * s.K * kLanes + 64;
}

// Two blocks of inference one after the other, what lies between them in scratch.
FTSO_SHARED int64_t chain_scratch(const BlockStep& first, const BlockStep& second) {
  const int64_t images = Group(first.B, first.C > first.N ? first.C : first.N, first.Ho * first.Wo).images;
  const int64_t between = rounded_up(images * first.N * first.Ho * first.Wo, kLanes) + kLanes;
  return rounded_up(block_scratch(first), kLanes) + rounded_up(block_scratch(second), kLanes) + between;
}

FTSO_SHARED int64_t mix_scratch(const MixStep& s) {
  const int64_t n = s.n_sources > s.n_edges ? s.n_sources : s.n_edges;
  return 3 * rounded_up(n, kLanes) + s.n_edges * rounded_up(s.H * s.W, kLanes);
}

FTSO_SHARED int64_t pool_scratch(const PoolStep& s) {
  return 2 * s.S * Frame(s.H, s.S == 1 ? s.W : (s.W + 1) / 2, 1).floats() + 3 * Frame(s.Ho, s.Wo, 1).floats() + 64;
}

}  // namespace ftso
