// A tile of pixels of a cell: who works on what, its nodes, its rows. A thread owns four pixels in a row, a quad, of a
// few neighbouring channels; the quads of a channel are neighbouring lanes, so that a warp reads and writes whole
// 128-byte lines of a plane. Rows of a tile in shared memory are P + 4 floats apart: eight lanes, which the memory
// serves at once at 16 bytes each, hit 32 different banks whether they are quads of a row or the same quad of rows.
#pragma once
#include "cell_step.h"
#include "cuda_text.h"

namespace ftso {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kWarp = ~0u;

template <int kC, int kP>
struct Tile {
  static constexpr int C = kC, P = kP, K = 4 * kC, ld = kP + 4;
  static constexpr int quads = kP / 4, groups = kThreads / quads, items = kC / groups;
  static_assert(quads <= 32 && groups * items == kC, "quads of a channel are lanes of one warp");
};

// Forward and the main part of backward; 4C rows of P + 4 floats must leave room for a second block.
template <int kC>
using MainTile = Tile<kC, kC == 16    ? 128
                          : kC == 128 ? 32
                                      : 64>;

// For weight gradients: two channels a thread.
template <int kC>
using ThinTile = Tile<kC, 2048 / kC>;

__device__ __forceinline__ float4 set4(float v) { return make_float4(v, v, v, v); }
__device__ __forceinline__ float4 fma4(float s, float4 a, float4 b) {
  return make_float4(fmaf(s, a.x, b.x), fmaf(s, a.y, b.y), fmaf(s, a.z, b.z), fmaf(s, a.w, b.w));
}
__device__ __forceinline__ float4 scale4(float s, float4 a) { return make_float4(s * a.x, s * a.y, s * a.z, s * a.w); }
__device__ __forceinline__ float dot4(float4 a, float4 b, float to = 0.f) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, to))));
}
__device__ __forceinline__ float sum4(float4 a) { return (a.x + a.y) + (a.z + a.w); }
__device__ __forceinline__ float relu(float v) { return v < 0.f ? 0.f : v; }  // NaN stays
__device__ __forceinline__ float4 relu4(float4 a) { return make_float4(relu(a.x), relu(a.y), relu(a.z), relu(a.w)); }
// g where x is positive
__device__ __forceinline__ float4 where4(float4 x, float4 g) {
  return make_float4(x.x > 0.f ? g.x : 0.f, x.y > 0.f ? g.y : 0.f, x.z > 0.f ? g.z : 0.f, x.w > 0.f ? g.w : 0.f);
}
__device__ __forceinline__ float4& at4(float& first) { return reinterpret_cast<float4&>(first); }

// Sum over the lanes of a segment of `width`, in every lane, in the same order everywhere.
template <int kWidth>
__device__ __forceinline__ float segment_sum(float v) {
#pragma unroll
  for (int d = kWidth / 2; d > 0; d /= 2) v += __shfl_xor_sync(kWarp, v, d);
  return v;
}

// The pixels of a reader: all (step 1), or (odd, odd) of every second row and column (step 2; odd is 0 or 1).
struct Grid {
  int W, pixels, step, odd;
  bool vector;  // quads are aligned to 16 bytes in every tensor

  __device__ __forceinline__ int offset(int p) const {
    if (step == 1) return p;
    const int half = W / 2;
    return (2 * (p / half) + odd) * W + 2 * (p % half) + odd;
  }
};

// Four pixels from `p` on; `n` of them are there.
struct Quad {
  int p, n;
  bool vector;

  __device__ __forceinline__ Quad(const Grid& g, int first)
      : p(first),
        n(g.pixels - first < 0   ? 0
          : g.pixels - first < 4 ? g.pixels - first
                                 : 4),
        vector(g.vector && g.step == 1 && n == 4) {}

  // From a plane of the input; zero where there is no pixel.
  __device__ __forceinline__ float4 load(const Grid& g, const float* plane) const {
    if (vector) return __ldg(reinterpret_cast<const float4*>(plane + p));
    return make_float4(n > 0 ? __ldg(plane + g.offset(p)) : 0.f, n > 1 ? __ldg(plane + g.offset(p + 1)) : 0.f,
                       n > 2 ? __ldg(plane + g.offset(p + 2)) : 0.f, n > 3 ? __ldg(plane + g.offset(p + 3)) : 0.f);
  }
  // To a plane of the reader's own pixels.
  __device__ __forceinline__ void store(const Grid& g, float* plane, float4 v) const {
    if (g.vector && n == 4) {
      *reinterpret_cast<float4*>(plane + p) = v;
      return;
    }
    if (n > 0) plane[p] = v.x;
    if (n > 1) plane[p + 1] = v.y;
    if (n > 2) plane[p + 2] = v.z;
    if (n > 3) plane[p + 3] = v.w;
  }
  __device__ __forceinline__ float4 inside(float4 v) const {
    return make_float4(n > 0 ? v.x : 0.f, n > 1 ? v.y : 0.f, n > 2 ? v.z : 0.f, n > 3 ? v.w : 0.f);
  }
};

__device__ __forceinline__ int first_edge(int node) { return (node - 2) * (node + 1) / 2; }  // of node 2..5

// The channel shuffle's target of channel c.
__device__ __forceinline__ int shuffled(const CudaCell& c, int channel) {
  const int part = c.C / c.k;
  return channel % part * c.k + channel / part;
}

__device__ __forceinline__ float4 load_input(const CudaCell& c, const Grid& g, const Quad& quad, int i, int image,
                                             int channel) {
  const CudaRaw& x = c.x[i];
  const float scale = __ldg(x.scale + channel), shift = __ldg(x.shift + channel);
  const float4 z = quad.load(g, x.z + image * x.image + static_cast<int64_t>(channel) * c.H * c.W);
  return fma4(scale, z, set4(shift));
}

// The four nodes of a tile, row (node - 2) * C + channel; rectify: with ReLU at the end. All threads of the block.
// kLean: with as few registers as it takes, for who holds sums meanwhile.
template <typename T, bool kLean = false>
__device__ __forceinline__ void mix(const CudaCell& c, const Grid& g, int image, int first, bool rectify,
                                    float (&x)[T::K][T::ld]) {
  const int q = threadIdx.x % T::quads, channel = threadIdx.x / T::quads * T::items;
  const Quad quad(g, first + 4 * q);
  float4 state[T::items][5];
#pragma unroll
  for (int i = 0; i < T::items; ++i) {
    state[i][0] = load_input(c, g, quad, 0, image, channel + i);
    state[i][1] = load_input(c, g, quad, 1, image, channel + i);
  }
#pragma unroll
  for (int node = 2; node < 6; ++node) {
#pragma unroll
    for (int i = 0; i < T::items; ++i) {
      float4 total = scale4(__ldg(c.edges + first_edge(node)), state[i][0]);
#pragma unroll
      for (int m = 1; m < node; ++m) {
        const bool again = kLean && m > 1;
        const float4 x_m = again ? at4(x[(again ? m - 2 : 0) * T::C + channel + i][4 * q]) : state[i][again ? 0 : m];
        total = fma4(__ldg(c.edges + first_edge(node) + m), x_m, total);
      }
      at4(x[(node - 2) * T::C + shuffled(c, channel + i)][4 * q]) = total;
    }
    __syncthreads();
    if (node < 5 && !kLean)
#pragma unroll
      for (int i = 0; i < T::items; ++i) state[i][node] = at4(x[(node - 2) * T::C + channel + i][4 * q]);
  }
  if (!rectify) return;
#pragma unroll
  for (int node = 2; node < 6; ++node)
#pragma unroll
    for (int i = 0; i < T::items; ++i) {
      float4& own = at4(x[(node - 2) * T::C + channel + i][4 * q]);
      own = relu4(own);
    }
  __syncthreads();
}

}  // namespace
}  // namespace ftso
