// Kernels with one mistake each, and the same without: what the emulator must catch, and must not.
// known_bad NAME good|bad POLICY BLOCKS: 0 where the result is right, 1 where it is wrong, else who stopped it.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_text.h"

namespace {

constexpr int kThreads = 64, kBlocks = 4;

struct Parts {
  float part[kThreads / 32];
};

// Sums of a block's 64 numbers. bad: a thread reads what another warp may not have written.
template <bool kBad>
__global__ void missing_barrier(const float* in, float* out) {
  FTSO_SHARED(Parts, s);
  float v = in[blockIdx.x * kThreads + threadIdx.x];
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  if (threadIdx.x % 32 == 0) s.part[threadIdx.x / 32] = v;
  if (!kBad) __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = s.part[0] + s.part[1];
}

struct Row {
  float x[kThreads];
};

// Two steps through one row, turned around each time. bad: the second overwrites what may still be read.
template <bool kBad>
__global__ void overwritten(const float* in, float* out) {
  FTSO_SHARED(Row, s);
  float v = in[blockIdx.x * kThreads + threadIdx.x];
  for (int step = 0; step < 3; ++step) {
    s.x[threadIdx.x] = v;
    __syncthreads();
    v = s.x[kThreads - 1 - threadIdx.x] + 1;
    if (!kBad) __syncthreads();
  }
  out[blockIdx.x * kThreads + threadIdx.x] = v;
}

struct Halo {
  float x[kThreads + 2];
};

// Sums of three neighbours. bad: the outer neighbours are read where there are none.
template <bool kBad>
__global__ void halo(const float* in, float* out) {
  FTSO_SHARED(Halo, s);
  const int i = blockIdx.x * kThreads + threadIdx.x, n = kThreads * gridDim.x;
  s.x[threadIdx.x + 1] = __ldg(in + i);
  if (threadIdx.x == 0) s.x[0] = kBad || i > 0 ? __ldg(in + i - 1) : 0.f;
  if (threadIdx.x == kThreads - 1) s.x[kThreads + 1] = kBad || i + 1 < n ? __ldg(in + i + 1) : 0.f;
  __syncthreads();
  out[i] = s.x[threadIdx.x] + s.x[threadIdx.x + 1] + s.x[threadIdx.x + 2];
}

struct Table {
  float part[kThreads / 8][8];
};

// Sums of eight. bad: a row is read one too far, where the next one lies.
template <bool kBad>
__global__ void shared_overrun(const float* in, float* out) {
  FTSO_SHARED(Table, s);
  const int row = threadIdx.x / 8;
  s.part[row][threadIdx.x % 8] = in[blockIdx.x * kThreads + threadIdx.x];
  __syncthreads();
  float v = 0;
  for (int i = 0; i < (kBad && row + 1 < kThreads / 8 ? 9 : 8); ++i) v += s.part[row][i];
  out[blockIdx.x * kThreads + threadIdx.x] = v;
}

// bad: blocks add to one number without telling each other.
template <bool kBad>
__global__ void block_race(const float* in, float* out) {
  if (threadIdx.x) return;
  if (kBad)
    out[0] += in[blockIdx.x];
  else
    atomicAdd(out, in[blockIdx.x]);
}

// The same with a static array, which blocks have in common in the emulator.
template <bool kBad>
__global__ void static_array(const float* in, float* out) {
  __shared__ float x[kThreads];
  x[threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x];
  if (!kBad) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = x[kThreads - 1 - threadIdx.x];
}

template <bool kBad>
__global__ void divergent_barrier(const float* in, float* out) {
  FTSO_SHARED(Row, s);
  s.x[threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x];
  if (kBad && threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = s.x[kThreads - 1 - threadIdx.x];
}

template <bool kBad>
__global__ void left_early(const float* in, float* out) {
  FTSO_SHARED(Row, s);
  s.x[threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x];
  if (kBad && threadIdx.x == 7) return;
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = s.x[kThreads - 1 - threadIdx.x];
}

template <bool kBad>
__global__ void absent_lane(const float* in, float* out) {
  float v = in[blockIdx.x * kThreads + threadIdx.x];
  if (!kBad || threadIdx.x % 32 < 16) v += __shfl_xor_sync(~0u, v, 8);
  out[blockIdx.x * kThreads + threadIdx.x] = v;
}

template <bool kBad>
__global__ void small_launch(const float* in, float* out) {
  FTSO_SHARED(Row, s);
  s.x[threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x];
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = s.x[kThreads - 1 - threadIdx.x];
}

// Every exchange, against what the programming guide says of it.
template <bool kBad>
__global__ void exchanges(const float* in, float* out) {
  const int lane = threadIdx.x % 32, me = static_cast<int>(in[0]) + static_cast<int>(threadIdx.x);
  int wrong = 0;
  wrong += __shfl_sync(~0u, me, 3) != static_cast<int>(threadIdx.x) - lane + 3 + static_cast<int>(in[0]);
  wrong += __shfl_sync(~0u, lane, 5, 8) != lane / 8 * 8 + 5;
  wrong += __shfl_up_sync(~0u, lane, 2) != (lane < 2 ? lane : lane - 2);
  wrong += __shfl_down_sync(~0u, lane, 3, 16) != (lane % 16 > 12 ? lane : lane + 3);
  wrong += __shfl_xor_sync(~0u, lane * 1.5, 9) != (lane ^ 9) * 1.5;
  __syncwarp();
  out[blockIdx.x * kThreads + threadIdx.x] = static_cast<float>(wrong) + (kBad ? 1.f : 0.f);
}

constexpr int kN = kThreads * kBlocks;

float number(int i) { return static_cast<float>(i * 7 % 32); }

float wanted(const char* name, int i) {
  const auto is = [=](const char* other) { return strcmp(name, other) == 0; };
  const int mirrored = i / kThreads * kThreads + kThreads - 1 - i % kThreads;
  float sum = 0;
  if (is("missing_barrier"))
    for (int j = 0; j < kThreads; ++j) sum += number(i * kThreads + j);
  else if (is("overwritten"))
    sum = number(mirrored) + 3;
  else if (is("halo"))
    sum = (i ? number(i - 1) : 0) + number(i) + (i + 1 < kN ? number(i + 1) : 0);
  else if (is("shared_overrun"))
    for (int j = i / 8 * 8; j < i / 8 * 8 + 8; ++j) sum += number(j);
  else if (is("block_race"))
    for (int j = 0; j < kBlocks; ++j) sum += number(j);
  else if (is("absent_lane"))
    sum = number(i) + number(i ^ 8);
  else if (!is("exchanges"))
    sum = number(mirrored);
  return sum;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  const char* name = argv[1];
  const bool bad = strcmp(argv[2], "bad") == 0;
  ftso::emu::schedule(static_cast<ftso::emu::Policy>(atoi(argv[3])), static_cast<ftso::emu::Order>(atoi(argv[4])), 1,
                      strcmp(name, "static_array") == 0);
  float *in = new float[kN], *out = new float[kN];
  for (int i = 0; i < kN; ++i) in[i] = number(i), out[i] = 0;
  int results = 0;
#define RUN(kernel, shared, count)                                                \
  if (strcmp(name, #kernel) == 0) {                                               \
    results = count;                                                              \
    auto* chosen = bad ? kernel<true> : kernel<false>;                            \
    FTSO_LAUNCH(chosen, dim3(kBlocks), dim3(kThreads), shared, nullptr, in, out); \
  }
  RUN(missing_barrier, sizeof(Parts), kBlocks)
  RUN(overwritten, sizeof(Row), kN)
  RUN(halo, sizeof(Halo), kN)
  RUN(shared_overrun, sizeof(Table), kN)
  RUN(block_race, 0, 1)
  RUN(static_array, 0, kN)
  RUN(divergent_barrier, sizeof(Row), kN)
  RUN(left_early, sizeof(Row), kN)
  RUN(absent_lane, 0, kN)
  RUN(small_launch, sizeof(Row) - (bad ? 16 : 0), kN)
  RUN(exchanges, 0, kN)
  if (!results) return 2;
  int wrong = 0;
  for (int i = 0; i < results; ++i) wrong += !(out[i] == wanted(name, i));
  printf("%d wrong of %d\n", wrong, results);
  delete[] in;
  delete[] out;
  return wrong ? 1 : 0;
}
