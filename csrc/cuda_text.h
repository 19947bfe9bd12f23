// What a kernel's text includes: CUDA under nvcc, else the emulator, which runs the same text on the CPU.
#pragma once
#ifdef __CUDACC__
#include <cuda_runtime.h>
#define FTSO_LAUNCH(kernel, grid, threads, bytes, stream, ...) \
  kernel<<<grid, threads, bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define FTSO_SHARED(T, name)                     \
  extern __shared__ float4 ftso_shared_memory[]; \
  T& name = *reinterpret_cast<T*>(ftso_shared_memory)
#else
#include "emu/cuda_emu.h"
#endif
