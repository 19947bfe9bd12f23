// The stages of a normal cell on a GPU (cell_step.h has the layouts, kernels/cell_step.py the equations): one launch
// forward, one backward; programs of one launch play several roles by their number. A program's products are blocked
// in registers over tiles in shared memory; sums are taken in a fixed order, without atomics.
#pragma once
#include "cell_mix.cuh"

namespace ftso {
namespace {

// What a launch is cut into.
struct Cut {
  int tiles, strided_tiles;  // of an image
  bool vector;
};

__device__ __forceinline__ Grid all_pixels(const CudaCell& c, const Cut& cut) {
  return {c.W, c.H * c.W, 1, 0, cut.vector};
}
__device__ __forceinline__ Grid strided_pixels(const CudaCell& c, const Cut& cut, int odd) {
  return {c.W, c.H / 2 * (c.W / 2), 2, odd, cut.vector && c.H * c.W % 16 == 0};
}

template <int kC>
struct ForwardTile : MainTile<kC> {
  // rows of weights at a time: all of a cell between equal cells; and columns
  static constexpr int N = 2 * kC, depth = kC <= 32 ? 16 : 8;
  static constexpr int per_thread = N / MainTile<kC>::groups;
};

template <int kC>
struct ForwardShared {
  float x[4 * kC][MainTile<kC>::ld];
  float w[2][ForwardTile<kC>::depth][ForwardTile<kC>::N];  // neighbouring lanes write neighbouring columns
};

// Rows [first, first + N) of w, columns [k, k + depth), turned around.
template <typename T>
struct WeightPiece {
  static constexpr int quads = T::N * T::depth / 4, each = (quads + kThreads - 1) / kThreads;
  float4 piece[each];

  __device__ __forceinline__ void load(const float* w, int first, int rows, int k) {
#pragma unroll
    for (int r = 0; r < each; ++r) {
      const int e = threadIdx.x + r * kThreads, row = first + e % T::N, at = k + e / T::N * 4;
      piece[r] = e < quads && row < rows
                     ? __ldg(reinterpret_cast<const float4*>(w + static_cast<int64_t>(row) * T::K + at))
                     : set4(0.f);
    }
  }
  __device__ __forceinline__ void store(float (&w)[T::depth][T::N]) const {
#pragma unroll
    for (int r = 0; r < each; ++r) {
      const int e = threadIdx.x + r * kThreads;
      if (e >= quads) continue;
      const int at = e / T::N * 4, row = e % T::N;
      w[at][row] = piece[r].x, w[at + 1][row] = piece[r].y, w[at + 2][row] = piece[r].z, w[at + 3][row] = piece[r].w;
    }
  }
};

// z = w x for the tile's pixels and the rows [begin, end) of w and z, with the sums of what was written.
template <int kC>
__device__ __forceinline__ void multiply(ForwardShared<kC>& s, const CudaProduct& reader, const Grid& g, int image,
                                         int part, int first_pixel, int begin, int end) {
  using T = ForwardTile<kC>;
  constexpr int R = T::per_thread;
  const int q = threadIdx.x % T::quads, group = threadIdx.x / T::quads * R;
  const Quad quad(g, first_pixel + 4 * q);
  for (int first = begin; first < end; first += T::N) {
    float4 total[R];
#pragma unroll
    for (int r = 0; r < R; ++r) total[r] = set4(0.f);
    WeightPiece<T> next;
    next.load(reader.w, first, end, 0);
    next.store(s.w[0]);
    __syncthreads();
    for (int k = 0, room = 0; k < T::K; k += T::depth, room ^= 1) {
      if (k + T::depth < T::K) next.load(reader.w, first, end, k + T::depth);
#pragma unroll
      for (int d = 0; d < T::depth; ++d) {
        const float4 x = at4(s.x[k + d][4 * q]);
#pragma unroll
        for (int r = 0; r < R; r += 4) {
          const float4 w = at4(s.w[room][d][group + r]);
          total[r] = fma4(w.x, x, total[r]), total[r + 1] = fma4(w.y, x, total[r + 1]);
          total[r + 2] = fma4(w.z, x, total[r + 2]), total[r + 3] = fma4(w.w, x, total[r + 3]);
        }
      }
      if (k + T::depth < T::K) next.store(s.w[room ^ 1]);
      __syncthreads();
    }
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int row = first + group + r;
      if (row < end) quad.store(g, reader.z + (static_cast<int64_t>(image) * reader.rows + row) * g.pixels, total[r]);
      const float4 there = quad.inside(total[r]);
      const float sum = segment_sum<T::quads>(sum4(there)), square = segment_sum<T::quads>(dot4(there, there));
      if (row < end && q == 0) {
        float* sums = reader.sums + static_cast<int64_t>(part) * 2 * reader.rows + row;
        sums[0] = sum, sums[reader.rows] = square;
      }
    }
  }
}

template <int kC>
__global__ void __launch_bounds__(kThreads, 2) cell_fwd(const CudaCellForward c, const Cut cut) {
  using T = MainTile<kC>;
  FTSO_SHARED(ForwardShared<kC>, s);
  int program = blockIdx.x;
  const int main = c.cell.B * cut.tiles;
  const bool strided = program >= main;
  if (strided) program -= main;
  const int tiles = strided ? cut.strided_tiles : cut.tiles, odd = strided ? program / (c.cell.B * tiles) : 0;
  const int part = program % (c.cell.B * tiles), image = part / tiles, first = part % tiles * T::P;
  const Grid g = strided ? strided_pixels(c.cell, cut, odd) : all_pixels(c.cell, cut);
  mix<T>(c.cell, g, image, first, true, s.x);
  const CudaProduct& reader = strided ? c.strided : c.main;
  const int rows = strided ? reader.rows / 2 : reader.rows;
  multiply<kC>(s, reader, g, image, part, first, odd * rows, (odd + 1) * rows);
}

template <int kC>
struct PoolShared {
  float x[4 * kC][ThinTile<kC>::ld], total[4 * kC];
};

// The last cell: a program an image.
template <int kC>
__global__ void __launch_bounds__(kThreads, 2) cell_pool(const CudaCellForward c, const Cut cut) {
  using T = ThinTile<kC>;
  FTSO_SHARED(PoolShared<kC>, s);
  const int lane = threadIdx.x % 32, image = blockIdx.x;
  const Grid g = all_pixels(c.cell, cut);
  for (int tile = 0; tile < cut.tiles; ++tile) {
    mix<T>(c.cell, g, image, tile * T::P, false, s.x);
    for (int row = threadIdx.x / 32; row < T::K; row += kThreads / 32) {
      float sum = 0;
      for (int p = lane; p < T::P; p += 32) sum += tile * T::P + p < g.pixels ? s.x[row][p] : 0.f;
      sum = segment_sum<32>(sum);
      if (lane == 0) s.total[row] = tile ? s.total[row] + sum : sum;
    }
    __syncthreads();
  }
  for (int row = threadIdx.x; row < T::K; row += kThreads)
    c.pooled[static_cast<int64_t>(image) * T::K + row] = s.total[row] / g.pixels;
}

}  // namespace
}  // namespace ftso
