// The whole native surface on one page. Nothing here knows torch or Python; every buffer is the caller's.
#pragma once
#include <stdint.h>

#include "chain.h"
#include "planes.h"

namespace ftso {

// The skip cell on planes (B, C, H*W), float32, contiguous; out is (B, 4*C, H*W), nodes 2..5 one after another.
// weights: the 14 edge weights, node 2 from (0,1), node 3 from (0,1,2), ... The shuffle is a permutation of the
// channels, and its cycles are independent problems: `channels` lists them one after another, each in the order
// in which the shuffle walks it (channels[i+1] = shuffle(channels[i]) inside a cycle).
struct SkipCell {
  int64_t C, HW;
  const int32_t* channels;  // C entries
  const int32_t* lengths;   // n_cycles entries, summing to C
  int32_t n_cycles;
};

constexpr int kEdges = 14;
constexpr int kNodes = 4;
constexpr int kTile = 256;  // pixels that travel through a cycle together

// What one instruction set offers. Each function works on the images [begin, end) and returns the name of the
// instruction set that was compiled into it.
struct Kernels {
  const char* isa;
  // w [K][N] as a right operand of the tile unit (tiles.h), thirds_floats(K, N); null where the kernels have none.
  void (*split)(const float* w, int64_t K, int64_t N, float* tiles);
  const char* (*skip_cell_fwd)(const SkipCell&, int64_t begin, int64_t end, const float* x0, const float* x1,
                               const float* weights, float* out);
  // grad_x0, grad_x1, dots may be null: what nobody asked for is not computed. dots: 14 doubles an image, the
  // derivative for the weights. scratch: skip_cell_scratch(longest cycle) floats.
  const char* (*skip_cell_bwd)(const SkipCell&, int64_t begin, int64_t end, const float* grad_out, const float* x0,
                               const float* x1, const float* weights, float* grad_x0, float* grad_x1, double* dots,
                               float* scratch);

  // The stages of the skip-only network (chain.h), each for one chunk of the images; scratch is the thread's own.
  const char* (*stem_covariance)(const StemStep&, int64_t chunk, float* scratch);
  const char* (*stem_fwd)(const StemStep&, int64_t chunk, float* scratch);
  const char* (*stem_bwd)(const StemStep&, int64_t chunk, float* scratch);
  const char* (*cell_fwd)(const CellStep&, int64_t chunk, float* scratch);
  const char* (*cell_bwd)(const CellStep&, int64_t chunk, float* scratch);
  const char* (*reduce_paths_fwd)(const ReducePaths&, int64_t chunk, float* scratch);
  const char* (*reduce_paths_bwd)(const ReducePaths&, int64_t chunk, float* scratch);
  const char* (*reduce_fwd)(const ReduceStep&, int64_t chunk, float* scratch);
  const char* (*reduce_bwd)(const ReduceStep&, int64_t chunk, float* scratch);

  // The launches of a mixed node (planes.h), each for one chunk of the images; scratch is the thread's own.
  const char* (*block_fwd)(const BlockStep&, int64_t chunk, float* scratch);
  const char* (*block_bwd)(const BlockStep&, int64_t chunk, float* scratch);
  const char* (*block_infer)(const BlockStep&, int64_t chunk, float* scratch);
  const char* (*chain_infer)(const BlockStep& first, const BlockStep& second, int64_t chunk, float* scratch);
  const char* (*pools_fwd)(const PoolStep&, int64_t chunk, float* scratch);
  const char* (*pools_bwd)(const PoolStep&, int64_t chunk, float* scratch);
  const char* (*mix_fwd)(const MixStep&, int64_t chunk, float* scratch);
  const char* (*mix_bwd)(const MixStep&, int64_t chunk, float* scratch);

  // For benchmarks: multiply-adds on registers alone; operations: how many floating point operations they were.
  const char* (*fma_peak)(int64_t rounds, double* operations);
};

constexpr int64_t skip_cell_scratch(int64_t longest) { return (longest + 2) * 3 * kTile; }

#define FTSO_DECLARE(ISA)       \
  namespace ISA {               \
  extern const Kernels kernels; \
  }
FTSO_DECLARE(scalar)
#if defined(__x86_64__)
FTSO_DECLARE(avx2)
FTSO_DECLARE(avx512)
FTSO_DECLARE(avx512bf16)
FTSO_DECLARE(amx)
#endif
#undef FTSO_DECLARE

// isa.cpp: the choice. Detected once, fastest first; FTSO_ISA or force_isa decide otherwise. Throws
// std::invalid_argument for a name that is unknown or that this machine cannot run.
const Kernels& kernels();
void force_isa(const char* name);  // null: back to FTSO_ISA, or else the fastest
int available_isas(const char** names, int capacity);

// launch.cpp: one parallel region an operation, on torch's pool. Work is cut by image, partial sums are added in
// the order of the images: the result does not depend on `threads`.
const char* skip_cell_fwd(int64_t B, int64_t C, int64_t HW, int64_t k, const float* x0, const float* x1,
                          const float* weights, float* out, int threads);
const char* skip_cell_bwd(int64_t B, int64_t C, int64_t HW, int64_t k, const float* grad_out, const float* x0,
                          const float* x1, const float* weights, float* grad_x0, float* grad_x1, float* grad_weights,
                          int threads);
// Inference, batch norms folded into pointwise and bias: one block, or two as one launch (the second of stride 1).
// weights: depthwise (where K > 1) and pointwise of each block; channels: before, between and behind the blocks. `plus`
// is added to y, and may be y; null: nothing. Rows of x are `row` floats apart: W, or more where pixels are picked
// (K = 1, stride 2).
struct FoldedConv {
  int64_t B, H, W, row;
  const int64_t* channels;
  int blocks, K, stride, dilation;
};
const char* folded_conv(const FoldedConv& spec, Planes x, const float* const* weights, const float* const* biases,
                        Planes plus, Planes y, int threads);
// Has the system hand over untouched pages at once: half the time of a fault for each. Huge ones as long as each takes
// `patience` seconds or less on average, then small ones. Returns whether all are huge; where the
// system hands none over they are to be small, as they are touched.
bool populate(char* pages, int64_t bytes, double patience, int threads);
const char* fma_peak(int64_t rounds, double* operations, int threads);  // `rounds` on each thread, all at once

}  // namespace ftso
