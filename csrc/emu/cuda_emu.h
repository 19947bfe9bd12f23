// Runs CUDA kernels' own source on the CPU: included where nvcc would include cuda_runtime.h. A kernel is a function
// that fibers call, one fiber a thread of a block, one block at a time; the scheduler (cuda_emu.cpp, never
// instrumented) decides who runs, and stops with a sentence and the status kFault where a barrier diverges, a warp's
// exchange lacks a lane, or nobody can go on. Sanitizers see the kernel's code and nothing else.
//
// The subset: threadIdx ... gridDim, __syncthreads, __syncwarp and __shfl_*_sync of whole warps, atomicAdd and
// atomicMax, __ldg, float2/4, int2/4, static and dynamic __shared__. A thread is only left at a synchronisation.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmath>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline  // forced, sanitized texts take three times as long to compile
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static thread_local
#define __syncthreads() ftso::emu::barrier(__FILE__, __LINE__)
#define __syncwarp(...) ftso::emu::warp_barrier(__FILE__, __LINE__)
#define __shfl_sync(mask, value, lane, ...) \
  ftso::emu::from_lane(mask, value, ftso::emu::Pick{'i', (lane), ##__VA_ARGS__}, __FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, lane, ...) \
  ftso::emu::from_lane(mask, value, ftso::emu::Pick{'x', (lane), ##__VA_ARGS__}, __FILE__, __LINE__)
#define __shfl_up_sync(mask, value, lane, ...) \
  ftso::emu::from_lane(mask, value, ftso::emu::Pick{'u', (lane), ##__VA_ARGS__}, __FILE__, __LINE__)
#define __shfl_down_sync(mask, value, lane, ...) \
  ftso::emu::from_lane(mask, value, ftso::emu::Pick{'d', (lane), ##__VA_ARGS__}, __FILE__, __LINE__)

#define threadIdx (ftso::emu::self->thread)
#define blockIdx (ftso::emu::self->block)
#define blockDim (ftso::emu::shape.threads)
#define gridDim (ftso::emu::shape.blocks)
#define warpSize 32

#define FTSO_LAUNCH(kernel, grid, threads, bytes, stream, ...) \
  (static_cast<void>(stream), ftso::emu::launch(grid, threads, bytes, [=] { kernel(__VA_ARGS__); }))
#define FTSO_SHARED(T, name) T& name = *static_cast<T*>(ftso::emu::shared_memory(sizeof(T)))

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

template <typename T>
__forceinline__ T __ldg(const T* p) {
  return *p;
}

// As atomic for a race detector too.
template <typename T, typename Change>
T ftso_emu_change(T* p, Change change) {
  T before, after;
  __atomic_load(p, &before, __ATOMIC_RELAXED);
  do after = change(before);
  while (!__atomic_compare_exchange(p, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return before;
}
template <typename T>
T atomicAdd(T* p, T value) {
  return ftso_emu_change(p, [=](T before) { return before + value; });
}
template <typename T>
T atomicMax(T* p, T value) {
  return ftso_emu_change(p, [=](T before) { return before < value ? value : before; });
}

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr int cudaFuncAttributeMaxDynamicSharedMemorySize = 8;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
struct cudaFuncAttributes {};
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, int, int) {
  return cudaSuccess;
}

namespace ftso::emu {

constexpr int kFault = 3;  // the exit status of a kernel that the emulator stops

// Who goes on, of those who can: the next in ascending or descending order, in turn; always the first warp, or the
// last, as far as it gets; anyone.
enum class Policy { kAscending, kDescending, kFirstAhead, kLastAhead, kRandom };
enum class Order { kAscending, kDescending, kShuffled };
constexpr int kPolicies = 5, kOrders = 3;

// For the launches that follow. join: a block happens after the one before it, as far as a race detector is told;
// only for kernels with static __shared__ arrays, which all blocks have in common here.
void schedule(Policy policy, Order blocks, uint32_t seed = 1, bool join = false);

struct Thread {
  uint3 thread, block;
};
struct Shape {
  dim3 blocks, threads;
};
extern Thread* self;
extern Shape shape;

void launch(dim3 blocks, dim3 threads, size_t shared_bytes, const std::function<void()>& kernel);
void* shared_memory(size_t bytes);  // of this block: bytes must be what the launch gave, or less
void barrier(const char* file, int line);
void warp_barrier(const char* file, int line);

struct Pick {
  char how;
  int by, width = 32;
};
// Hands `mine` to the warp; the 8 bytes that the lane of `pick` has handed in.
uint64_t exchange(unsigned mask, uint64_t mine, Pick pick, const char* file, int line);

template <typename T>
T from_lane(unsigned mask, T value, Pick pick, const char* file, int line) {
  static_assert(sizeof(T) <= 8, "a lane exchanges at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, pick, file, line);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace ftso::emu
