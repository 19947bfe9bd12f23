// The CUDA stages of a normal cell, from batch norm to batch norm (kernels/cell_step.py has the equations): layouts and
// launchers. Everything is float32, NCHW: the planes of an image lie one behind the other, images any distance apart.
// A launcher checks nothing but what it can build, allocates nothing, waits for nothing; it returns null or an error.
#pragma once
#include <stdint.h>

namespace ftso {

constexpr int kCudaEdges = 14;

// x = z * scale + shift, C channels; `image`: floats from one image to the next.
struct CudaRaw {
  const float* z;
  int64_t image;
  const float *scale, *shift;
};

// A reader's 1x1 weights w [rows][4C] and what they make: z [B][rows][pixels], sums [parts][2][rows].
struct CudaProduct {
  const float* w;
  float *z, *sums;
  int rows;  // 0: nobody reads
};

// dz = al * g + be * z + ga, [B][rows][pixels]; dw: parts of [rows][4C], `part` floats apart, or null.
struct CudaBehind {
  const float *w, *g, *z, *al, *be, *ga;
  float* dw;
  int64_t part;
  int rows, parts;
};

struct CudaCell {
  int B, C, H, W, k;
  const float* edges;  // 14
  CudaRaw x[2];
};

// A program a tile of pixels; the parts of `sums` are the tiles. The strided reader has its own: rows [0, S) from the
// pixels (even, even), rows [S, 2S) from (odd, odd). pooled [B][4C]: alone, the mean over the image instead.
struct CudaCellForward {
  CudaCell cell;
  CudaProduct main, strided;
  float* pooled;
};

// g[i]: where the gradient for x_i goes, laid out as x_i is, or null. sums [parts][2][2C]: of g, and of g x, for the
// channels of x0, then of x1; dots [parts][14]. Of main and strided, or d_pooled [B][4C] alone.
struct CudaCellBackward {
  CudaCell cell;
  CudaBehind main, strided;
  const float* d_pooled;
  float *g[2], *sums, *dots;
};

// The parts that a stage writes: forward of main and of strided, by their pixels; backward of the cell.
int cell_parts(int B, int C, int pixels, bool backward);

// Shared memory of a program of each kernel.
const char* cell_shared_bytes(int C, int* forward, int* pool, int* backward);

// Why a device cannot run the kernels: it, or its driver, is older than what they were built for. Null where it can.
const char* cell_unfit(int device);

const char* cell_step_fwd(const CudaCellForward& c, int device, void* stream);
const char* cell_step_bwd(const CudaCellBackward& c, int device, void* stream);

}  // namespace ftso
