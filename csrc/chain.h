// What the stages of the skip-only network hand to each other. Everything is channels-last and padded: a row is a
// pixel, channel counts are rounded up to kLanes, and padding is zero.
#pragma once
#include <stdint.h>

namespace ftso {

// Work is cut into this many ranges of images, whoever runs them: partial sums are added range by range.
constexpr int kChunks = 16;
// Of B images the first of a chunk of the skip-only network, or, of the one behind the last, B. Chunks get smaller, so
// that threads that take one after the other end together: with sixteen alike one waited for half of a chunk.
static inline int64_t first_image(int64_t B, int64_t chunk) {
  constexpr int kParts[kChunks + 1] = {0, 24, 48, 72, 96, 120, 144, 164, 182, 198, 212, 224, 234, 242, 248, 252, 256};
  return B * kParts[chunk] / 256;
}

constexpr int kDots = 16;  // room of a chunk for the 14 edges' dots: whole cache lines

constexpr int kLanes = 16;  // floats in a vector, on every instruction set

constexpr int kNodeSums = 12;  // rows that a reduction cell's backward pass sums over its processed channels

// A float's bits rounded to bfloat16, to nearest even.
static inline __attribute__((always_inline)) uint32_t bf16_bits(uint32_t bits) {
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Operands of the tile unit (tiles.h): floats of a tile, values of the inner dimension in a block of tiles.
constexpr int64_t kTileWords = 256, kInner = 32;
static constexpr int64_t inner_blocks(int64_t K) { return (K + kInner - 1) / kInner; }
static constexpr int64_t thirds_floats(int64_t K, int64_t N) { return 3 * kTileWords * inner_blocks(K) * (N / kLanes); }
// Scratch of a TileStream of a product [K][N]: two left operands and two results of a group of pixels.
constexpr int64_t kGroup = 32;
static inline int64_t tile_stream_floats(int64_t K, int64_t N) { return 2 * (thirds_floats(K, kGroup) + kGroup * N); }
// Scratch of a FactorizedReduce [K][N] on a tile of P pixels: both sides' left operands and results.
static inline int64_t strided_tiles_floats(int64_t P, int64_t K, int64_t N) {
  const int64_t rows = (P / 4 + kGroup - 1) / kGroup * kGroup;
  return 2 * (thirds_floats(K, rows) + rows * N);
}

// Scratch of a product of P pixels' transpose with them.
static inline int64_t outer_tiles_floats(int64_t P, int64_t K, int64_t N) { return K + N + thirds_floats(P, K + N); }

struct Shape {
  int64_t B, H, W;
};

// The channel shuffle of C channels in `vectors` vectors. fwd[o][s] (16 lanes each): lane i of output vector o is
// lane fwd of source vector s, or from another source where negative; bwd is the inverse. to[c] is shuffle(c).
struct Shuffle {
  int64_t vectors, C;
  const int32_t *fwd, *bwd, *to;
};

// C channels of a raw product, to be normalised on load: x = z * scale + shift. g: where the gradient for x goes, rows
// of `ldg`; null where nobody asked. sums: of it, and of gradient times x (a row of 2*columns doubles a chunk).
struct Source {
  const float* z;
  int64_t ld;
  const float *scale, *shift;
  float* g;
  int64_t ldg;
  double* sums;
  int64_t columns;
};

// What a reduction cell reads of a product, its last C columns, in windows of 2x2 pixels: `highest` [windows][C] is
// their raw maximum, `processed` [windows][2][q] are the first q channels raw at (0,0) and at (1,1). Backward the
// gradients for both come back in their places; none of the whole image is ever written.
struct Windows {
  int64_t C, q;  // C = 0: none
  float *highest, *processed;
  const float *d_highest, *d_processed;
};

// Columns of a raw product that are read together, and the gradient for them (null: it comes as windows): rows of n,
// columns from c on. A reader of a third of each row would fetch two thirds.
struct Plane {
  int64_t c, n;
  float* z;
  const float* g;
};

// Activations [pixels][K] times weights, raw: z [pixels][N] in planes, the first of which may be empty. Forward adds
// sums and squares (2*N doubles a chunk). Backward, dz = al * g + be * z + ga is the gradient behind the batch norm;
// dw: K*N floats a chunk, or null. pairs_*: that direction multiplies bfloat16 pairs (simd.h), and its weights hold
// pairs of their rows.
struct Product {
  int64_t N;
  const float *w, *wt;              // [K][N] and [N][K]
  const float *w_tiles, *wt_tiles;  // the same for the tile unit, where the kernels have one and floats are multiplied
  Plane planes[2];
  double* sums;
  const float *al, *be, *ga;
  float* dw;
  bool pairs_forward, pairs_backward;
  Windows windows;  // of the last plane
  const Plane& plane(int64_t column) const { return planes[column >= planes[1].c]; }
};

// FactorizedReduce on the same activations: pixels (even, even) times w fill columns [0, width), pixels (odd, odd)
// times w2 fill [offset, offset + width). offset is 0 where the halves are no whole vectors: then both add up.
struct Strided {
  Product p;
  const float *w2, *wt2, *w2_tiles, *wt2_tiles;
  float* dw2;
  int64_t width, offset;
};

// A normal cell with what reads its output: relu and products, or (the last cell) the mean over the image.
struct CellStep {
  Shape shape;
  int64_t K;  // 4 * padded channels
  Shuffle shuffle;
  const float* weights;  // 14
  Source x0, x1;
  Product product;  // N = 0: none
  Strided strided;  // p.N = 0: none
  float* pooled;    // [B][K]; null: not the last cell
  const float* d_pooled;
  double* dots;  // kDots a chunk; null: not wanted
};

// The eight FactorizedReduce of a reduction cell, four an input: activations relu(x) of the windows' processed channels
// times w[input] [2q][F] (columns node * q + channel, the two halves of the channels from the two pixels), raw:
// f [pixels][2 * F].
struct ReducePaths {
  Shape shape;                // of the output
  int64_t q, F, X;            // F, X: 4q and 2q rounded up to kLanes
  Source x[2];                // z, g: rows of 2q; scale, shift: of q
  const float *w[2], *wt[2];  // [2q][F], [F][X]
  float* f;
  double* sums;  // of f: 2 * 2F doubles a chunk
  // backward
  const float* d_nodes;                 // [pixels][F] in columns node * q + channel
  const float *weights, *al, *be, *ga;  // df = al * weight * d_nodes + be * f + ga
  float* dw[2];                         // 2q * F floats a chunk, or null
};

// The nodes of a reduction cell over what ReducePaths made and, in the other channels, the windows' maximum.
struct ReduceStep {
  CellStep cell;  // shape: of the output; x0, x1: the maximum (g is the windows' d_highest)
  int64_t q, F;
  const float *f, *scale, *shift;
  double* f_sums;  // backward: sums of the gradient for normalised f, and times f: 2 * 2F doubles a chunk
  float* d_nodes;
};

// Convolution 3x3, batch norm, relu and the products of the first two cells. images: NCHW.
struct StemStep {
  Shape shape;
  int64_t channels, K, S;  // image channels; 9 * channels; stem channels rounded up
  const float* images;
  const float *w, *scale, *shift;  // [K][S]
  const float* w_tiles;            // w for the tile unit; null where nothing was packed for one
  double* covariance;              // sums of patches.h: kPatchSums * channels * (channels + 1) doubles a chunk
  Product product;
  double* sums;  // backward: of the gradient, and times the raw output: 2 * S doubles a chunk
  float* dw;     // patch' gradient: K * S floats a chunk
};

}  // namespace ftso
