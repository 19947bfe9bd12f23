// What the passes of both families do with the partial sums of their chunks.
#pragma once
#include "chain.h"

namespace ftso {

constexpr double kEps = 1e-5;  // of torch's batch norm

// The sum of a chunked partial, chunk after chunk.
template <typename T>
double over_chunks(const T* partial, int64_t stride, int64_t at) {
  double sum = 0;
  for (int64_t c = 0; c < kChunks; ++c) sum += partial[c * stride + at];
  return sum;
}

}  // namespace ftso
