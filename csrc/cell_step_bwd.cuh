// Backward of a normal cell (cell_step.h): tiles of pixels from the readers' gradients to the inputs', and programs
// that sum the weight gradients over many tiles. Both recompute the nodes from the inputs.
#pragma once
#include "cell_step.cuh"

namespace ftso {
namespace {

template <int kC>
struct BackwardTile : ThinTile<kC> {
  static constexpr int depth = kC <= 32 ? 16 : kC == 64 ? 8 : 4;  // rows of weights at a time
};

template <int kC>
struct WeightTile : ThinTile<kC> {
  static constexpr int rows = kC == 16 ? 4 : 8, N = rows * (kThreads / 32);  // of a thread, of a program
  static constexpr int span = 4 * kC < 256 ? 4 * kC : 256, columns = span / 32;
};

template <int kC>
struct BackwardShared {
  struct Pixels {
    float x[4 * kC][ThinTile<kC>::ld];
    float dz[BackwardTile<kC>::depth][ThinTile<kC>::ld];
    float w[BackwardTile<kC>::depth][4 * kC];
    float dots[kThreads / 32][kCudaEdges];
  };
  struct Weights {
    float x[4 * kC][WeightTile<kC>::ld];
    float dz[WeightTile<kC>::N][WeightTile<kC>::ld];
  };
  union {
    Pixels pixels;
    Weights weights;
  };
};

// dz at four positions of a plane, zero where there is no pixel.
__device__ __forceinline__ float4 load_behind(const CudaBehind& d, const Grid& g, const Quad& quad, int image,
                                              int row) {
  const int64_t plane = (static_cast<int64_t>(image) * d.rows + row) * g.pixels;
  const Grid own{g.W, g.pixels, 1, 0, g.vector};
  Quad here = quad;
  here.vector = g.vector && quad.n == 4;
  const float4 grad = here.load(own, d.g + plane), z = here.load(own, d.z + plane);
  const float al = __ldg(d.al + row), be = __ldg(d.be + row), ga = __ldg(d.ga + row);
  return quad.inside(fma4(al, grad, fma4(be, z, set4(ga))));
}

// The strided readers' dz at one pixel of the cell: of row `row` where (even, even), of row S + `row` where (odd, odd).
__device__ __forceinline__ float strided_behind(const CudaBehind& d, const CudaCell& c, int image, int row, int pixel) {
  const int y = pixel / c.W, x = pixel % c.W;
  if (pixel >= c.H * c.W || (y + x) % 2) return 0.f;
  row += y % 2 * (d.rows / 2);
  const int64_t at = (static_cast<int64_t>(image) * d.rows + row) * (c.H / 2 * (c.W / 2)) + y / 2 * (c.W / 2) + x / 2;
  return fmaf(__ldg(d.al + row), __ldg(d.g + at), fmaf(__ldg(d.be + row), __ldg(d.z + at), __ldg(d.ga + row)));
}

// A step of a product w' dz: `depth` rows of dz and of w from memory to registers, and on to shared memory. Strided,
// half as many rows, each with its two rows of w: pixels in even columns are (even, even) or nothing, in odd columns
// (odd, odd) or nothing, so that a column knows its weights.
template <int kC, bool kStrided>
struct GradientPiece {
  using T = BackwardTile<kC>;
  static constexpr int rows = kStrided ? T::depth / 2 : T::depth;
  static constexpr int dz_quads = rows * T::quads, dz_each = (dz_quads + kThreads - 1) / kThreads;
  static constexpr int w_quads = T::depth * T::K / 4, w_each = (w_quads + kThreads - 1) / kThreads;
  float4 dz[dz_each], w[w_each];

  __device__ __forceinline__ void load(const CudaBehind& d, const CudaCell& c, const Grid& g, int image, int pixel,
                                       int first) {
    const int end = kStrided ? d.rows / 2 : d.rows;
#pragma unroll
    for (int r = 0; r < dz_each; ++r) {
      const int e = threadIdx.x + r * kThreads, row = first + e / T::quads, p = pixel + 4 * (e % T::quads);
      dz[r] = set4(0.f);
      if (e >= dz_quads || row >= end) continue;
      if (kStrided)
        dz[r] = make_float4(strided_behind(d, c, image, row, p), strided_behind(d, c, image, row, p + 1),
                            strided_behind(d, c, image, row, p + 2), strided_behind(d, c, image, row, p + 3));
      else
        dz[r] = load_behind(d, g, Quad(g, p), image, row);
    }
#pragma unroll
    for (int r = 0; r < w_each; ++r) {
      const int e = threadIdx.x + r * kThreads, line = e / (T::K / 4), row = first + line % rows;
      const int64_t at = static_cast<int64_t>(row + line / rows * end) * T::K + e % (T::K / 4) * 4;
      w[r] = e < w_quads && row < end ? __ldg(reinterpret_cast<const float4*>(d.w + at)) : set4(0.f);
    }
  }
  __device__ __forceinline__ void store(typename BackwardShared<kC>::Pixels& s) const {
#pragma unroll
    for (int r = 0; r < dz_each; ++r) {
      const int e = threadIdx.x + r * kThreads;
      if (e < dz_quads) at4(s.dz[e / T::quads][e % T::quads * 4]) = dz[r];
    }
#pragma unroll
    for (int r = 0; r < w_each; ++r) {
      const int e = threadIdx.x + r * kThreads;
      if (e < w_quads) at4(s.w[e / (T::K / 4)][e % (T::K / 4) * 4]) = w[r];
    }
  }
};

// Columns in turn even and odd, each with its own weight.
__device__ __forceinline__ void add_outer(float even, float odd, float4 dz, float4& to) {
  to = make_float4(fmaf(even, dz.x, to.x), fmaf(odd, dz.y, to.y), fmaf(even, dz.z, to.z), fmaf(odd, dz.w, to.w));
}

// d += w' dz of one reader: of the thread's pixels and channels, in all four nodes.
template <int kC, bool kStrided>
__device__ __forceinline__ void pull_back(typename BackwardShared<kC>::Pixels& s, const CudaBehind& behind,
                                          const CudaCell& c, const Grid& g, int image, int pixel,
                                          float4 (&d)[4][ThinTile<kC>::items]) {
  using T = BackwardTile<kC>;
  using Piece = GradientPiece<kC, kStrided>;
  const int q = threadIdx.x % T::quads, channel = threadIdx.x / T::quads * T::items;
  const int rows = kStrided ? behind.rows / 2 : behind.rows;
  Piece next;
  if (rows) next.load(behind, c, g, image, pixel, 0);
  for (int first = 0; first < rows; first += Piece::rows) {
    next.store(s);
    __syncthreads();
    if (first + Piece::rows < rows) next.load(behind, c, g, image, pixel, first + Piece::rows);
#pragma unroll
    for (int n = 0; n < Piece::rows; ++n) {
      const float4 dz = at4(s.dz[n][4 * q]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        static_assert(T::items == 2, "read as one float2");
        const float2 even = reinterpret_cast<const float2&>(s.w[n][j * T::C + channel]);
        const float2 odd = reinterpret_cast<const float2&>(s.w[kStrided ? n + Piece::rows : n][j * T::C + channel]);
        add_outer(even.x, odd.x, dz, d[j][0]);
        add_outer(even.y, odd.y, dz, d[j][1]);
      }
    }
    __syncthreads();
  }
}

// From the gradients d of the nodes, readers only, and the nodes in s.x to the inputs' gradients, sums and dots. A row
// of s.x gives up its node for the node's total gradient once nobody needs the node.
template <int kC>
__device__ __forceinline__ void unmix(typename BackwardShared<kC>::Pixels& s, const CudaCellBackward& c, const Grid& g,
                                      int image, int part, int pixel, float4 (&d)[4][ThinTile<kC>::items]) {
  using T = ThinTile<kC>;
  const int q = threadIdx.x % T::quads, channel = threadIdx.x / T::quads * T::items;
  const Quad quad(g, pixel + 4 * q);
  float dots[kCudaEdges];
#pragma unroll
  for (int e = 0; e < kCudaEdges; ++e) dots[e] = 0;
#pragma unroll
  for (int node = 5; node >= 2; --node) {
#pragma unroll
    for (int i = 0; i < T::items; ++i) at4(s.x[(node - 2) * T::C + channel + i][4 * q]) = d[node - 2][i];
    __syncthreads();
    if (node > 2)
#pragma unroll
      for (int i = 0; i < T::items; ++i) {
        const float4 u = at4(s.x[(node - 2) * T::C + shuffled(c.cell, channel + i)][4 * q]);
#pragma unroll
        for (int m = 2; m < node; ++m) {
          const int e = first_edge(node) + m;
          dots[e] = dot4(u, at4(s.x[(m - 2) * T::C + channel + i][4 * q]), dots[e]);
          d[m - 2][i] = fma4(__ldg(c.cell.edges + e), u, d[m - 2][i]);
        }
      }
  }
#pragma unroll
  for (int i = 0; i < T::items; ++i) {
    float4 x[2], grad[2];
#pragma unroll
    for (int m = 0; m < 2; ++m) x[m] = load_input(c.cell, g, quad, m, image, channel + i), grad[m] = set4(0.f);
#pragma unroll
    for (int node = 2; node < 6; ++node) {
      const float4 u = at4(s.x[(node - 2) * T::C + shuffled(c.cell, channel + i)][4 * q]);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int e = first_edge(node) + m;
        dots[e] = dot4(u, x[m], dots[e]);
        grad[m] = fma4(__ldg(c.cell.edges + e), u, grad[m]);
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (c.g[m])
        quad.store(g, c.g[m] + image * c.cell.x[m].image + static_cast<int64_t>(channel + i) * g.pixels, grad[m]);
      const float sum = segment_sum<T::quads>(sum4(grad[m])), product = segment_sum<T::quads>(dot4(grad[m], x[m]));
      float* sums = c.sums + static_cast<int64_t>(part) * 4 * T::C + m * T::C + channel + i;
      if (q == 0) sums[0] = sum, sums[2 * T::C] = product;
    }
  }
#pragma unroll
  for (int e = 0; e < kCudaEdges; ++e) {
    const float sum = segment_sum<32>(dots[e]);
    if (threadIdx.x % 32 == 0) s.dots[threadIdx.x / 32][e] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kCudaEdges) {
    float sum = 0;
    for (int w = 0; w < kThreads / 32; ++w) sum += s.dots[w][threadIdx.x];
    c.dots[static_cast<int64_t>(part) * kCudaEdges + threadIdx.x] = sum;
  }
}

template <int kC>
__device__ __forceinline__ void input_gradients(typename BackwardShared<kC>::Pixels& s, const CudaCellBackward& c,
                                                const Cut& cut, int part) {
  using T = ThinTile<kC>;
  const int image = part / cut.tiles, pixel = part % cut.tiles * T::P;
  const int q = threadIdx.x % T::quads, channel = threadIdx.x / T::quads * T::items;
  const Grid g = all_pixels(c.cell, cut);
  const Quad quad(g, pixel + 4 * q);
  mix<T>(c.cell, g, image, pixel, false, s.x);
  float4 d[4][T::items];
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int i = 0; i < T::items; ++i) {
      const int row = j * T::C + channel + i;
      d[j][i] = c.d_pooled ? quad.inside(set4(__ldg(c.d_pooled + static_cast<int64_t>(image) * T::K + row) / g.pixels))
                           : set4(0.f);
    }
  pull_back<kC, false>(s, c.main, c.cell, g, image, pixel, d);
  pull_back<kC, true>(s, c.strided, c.cell, g, image, pixel, d);
  if (!c.d_pooled)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < T::items; ++i) d[j][i] = where4(at4(s.x[j * T::C + channel + i][4 * q]), d[j][i]);
  unmix<kC>(s, c, g, image, part, pixel, d);
}

template <int kC>
struct WeightCut {
  static constexpr int column_blocks = 4 * kC / WeightTile<kC>::span;
  __device__ __host__ static int row_blocks(int rows) { return (rows + WeightTile<kC>::N - 1) / WeightTile<kC>::N; }
  // Programs of one part, of a reader or of half a strided one.
  __device__ __host__ static int blocks(int rows) { return row_blocks(rows) * column_blocks; }
};

// Rows x columns of one part's dw, over every parts-th tile of pixels.
template <int kC>
__device__ __forceinline__ void weight_gradients(typename BackwardShared<kC>::Weights& s, const CudaCell& c,
                                                 const CudaBehind& behind, const Grid& g, int odd, int rows, int part,
                                                 int block) {
  using T = WeightTile<kC>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = block % WeightCut<kC>::column_blocks * T::span + lane;
  const int row = block / WeightCut<kC>::column_blocks * T::N;
  const int tiles = (g.pixels + T::P - 1) / T::P;
  float total[T::rows][T::columns];
#pragma unroll
  for (int r = 0; r < T::rows; ++r)
#pragma unroll
    for (int k = 0; k < T::columns; ++k) total[r][k] = 0;
  for (int tile = part; tile < c.B * tiles; tile += behind.parts) {
    const int image = tile / tiles, pixel = tile % tiles * T::P;
    for (int e = threadIdx.x; e < T::N * T::quads; e += kThreads) {
      const int n = e / T::quads, q = e % T::quads;
      at4(s.dz[n][4 * q]) =
          row + n < rows ? load_behind(behind, g, Quad(g, pixel + 4 * q), image, odd * rows + row + n) : set4(0.f);
    }
    mix<T, true>(c, g, image, pixel, true, s.x);
#pragma unroll 1
    for (int p = 0; p < T::P; p += 4) {
      float4 x[T::columns];
#pragma unroll
      for (int k = 0; k < T::columns; ++k) x[k] = at4(s.x[column + 32 * k][p]);
#pragma unroll
      for (int r = 0; r < T::rows; ++r) {
        const float4 dz = at4(s.dz[warp + kThreads / 32 * r][p]);
#pragma unroll
        for (int k = 0; k < T::columns; ++k) total[r][k] = dot4(dz, x[k], total[r][k]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < T::rows; ++r) {
    const int n = row + warp + kThreads / 32 * r;
    if (n >= rows) continue;
    float* out = behind.dw + part * behind.part + static_cast<int64_t>(odd * rows + n) * T::K + column;
#pragma unroll
    for (int k = 0; k < T::columns; ++k) out[32 * k] = total[r][k];
  }
}

// Programs: those of dw, longest first; of the strided dw, even then odd; then a tile each.
template <int kC>
__global__ void __launch_bounds__(kThreads, 2) cell_bwd(const CudaCellBackward c, const Cut cut) {
  FTSO_SHARED(BackwardShared<kC>, s);
  int program = blockIdx.x;
  const int rows = c.main.rows, main = c.main.dw ? WeightCut<kC>::blocks(rows) * c.main.parts : 0;
  const int half = c.strided.rows / 2, strided = c.strided.dw ? WeightCut<kC>::blocks(half) * c.strided.parts : 0;
  if (program < main) {
    weight_gradients<kC>(s.weights, c.cell, c.main, all_pixels(c.cell, cut), 0, rows, program % c.main.parts,
                         program / c.main.parts);
    return;
  }
  program -= main;
  if (program < 2 * strided) {
    const int odd = program / strided;
    weight_gradients<kC>(s.weights, c.cell, c.strided, strided_pixels(c.cell, cut, odd), odd, half,
                         program % c.strided.parts, program % strided / c.strided.parts);
    return;
  }
  input_gradients<kC>(s.pixels, c, cut, program - 2 * strided);
}

}  // namespace
}  // namespace ftso
