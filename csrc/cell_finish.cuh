// What stands between two stages of a cell: partial sums added up in float64, in a fixed order, and what batch norm
// makes of them (kernels/cell_step.py). A program has eight columns: eight neighbouring floats are what memory moves.
#pragma once
#include "cell_step.h"
#include "cuda_text.h"

namespace ftso {
namespace {

constexpr int kColumns = 8, kRows = 32;
constexpr double kEps = 1e-5;

struct FinishShared {
  double sum[kRows][kColumns];
};

// Of column threadIdx.x % kColumns, in every thread of that column. All threads of the block.
__device__ __forceinline__ double column_sum(FinishShared& s, const float* from, int parts, int64_t stride,
                                             bool there) {
  const int column = threadIdx.x % kColumns, row = threadIdx.x / kColumns;
  double sum = 0;
  for (int part = row; there && part < parts; part += kRows) sum += from[part * stride];
  __syncthreads();
  s.sum[row][column] = sum;
  __syncthreads();
  sum = 0;
  for (int r = 0; r < kRows; ++r) sum += s.sum[r][column];
  return sum;
}

__global__ void __launch_bounds__(kColumns* kRows)
    sum_parts(const float* rows, int parts, int64_t stride, int count, float* out) {
  FTSO_SHARED(FinishShared, s);
  const int column = blockIdx.x * kColumns + threadIdx.x % kColumns;
  const double sum = column_sum(s, rows + column, parts, stride, column < count);
  if (threadIdx.x < kColumns && column < count) out[column] = static_cast<float>(sum);
}

__global__ void __launch_bounds__(kColumns* kRows)
    statistics(const float* sums, int parts, int ld, int N, double n, double* mean, float* scale, float* shift) {
  FTSO_SHARED(FinishShared, s);
  const int column = blockIdx.x * kColumns + threadIdx.x % kColumns;
  const double m = column_sum(s, sums + column, parts, 2 * ld, column < N) / n;
  const double square = column_sum(s, sums + ld + column, parts, 2 * ld, column < N) / n;
  if (threadIdx.x >= kColumns || column >= N) return;
  const double variance = square - m * m, r = 1 / sqrt((variance < 0 ? 0 : variance) + kEps);
  mean[column] = m, scale[column] = static_cast<float>(r), shift[column] = static_cast<float>(-m * r);
}

__global__ void __launch_bounds__(kColumns* kRows)
    coefficients(const float* sums, int parts, int ld, int N, double n, const double* mean, const float* scale,
                 float* al, float* be, float* ga) {
  FTSO_SHARED(FinishShared, s);
  const int column = blockIdx.x * kColumns + threadIdx.x % kColumns;
  const double g = column_sum(s, sums + column, parts, 2 * ld, column < N) / n;
  const double gx = column_sum(s, sums + ld + column, parts, 2 * ld, column < N) / n;
  if (threadIdx.x >= kColumns || column >= N) return;
  const double r = scale[column];
  al[column] = scale[column];
  be[column] = static_cast<float>(-r * r * gx);
  ga[column] = static_cast<float>(-r * g + r * r * mean[column] * gx);
}

}  // namespace
}  // namespace ftso
