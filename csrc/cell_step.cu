// Launchers of the cell's stages: sizes and pointers to grids.
#include <type_traits>

#include "cell_step_bwd.cuh"

namespace ftso {
namespace {

// The device of the call, for as long as it lasts.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    if (cudaGetDevice(&before_) != cudaSuccess) before_ = device;
    if (before_ != device) cudaSetDevice(device);
    changed_ = before_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename Visit>
const char* with_channels(int C, Visit visit) {
  switch (C) {
    case 16:
      return visit(std::integral_constant<int, 16>());
    case 32:
      return visit(std::integral_constant<int, 32>());
    case 64:
      return visit(std::integral_constant<int, 64>());
    case 128:
      return visit(std::integral_constant<int, 128>());
    default:
      return "the kernels are built for 16, 32, 64 and 128 channels";
  }
}

template <typename Shared, typename Kernel, typename Call>
const char* launch(Kernel* kernel, int64_t programs, const Call& call, const Cut& cut, int device, void* stream) {
  if (programs > 0x7fffffff) return "more programs than a launch has";
  const OnDevice on(device);
  static_assert(sizeof(Shared) <= 99 * 1024, "what a block may have on sm_86");
  const int bytes = static_cast<int>(sizeof(Shared));
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess)
    FTSO_LAUNCH(kernel, dim3(static_cast<unsigned>(programs)), dim3(kThreads), bytes, stream, call, cut);
  return last_error();
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

Cut cut_of(const CudaCell& c, bool backward) {
  const int pixels = c.H * c.W, strided = c.H / 2 * (c.W / 2);
  bool vector = pixels % 4 == 0;
  for (const CudaRaw& x : c.x) vector = vector && aligned(x.z) && x.image % 4 == 0;
  return {cell_parts(1, c.C, pixels, backward), cell_parts(1, c.C, strided, backward), vector};
}

template <int kC>
int64_t weight_programs(const CudaBehind& d, bool strided) {
  if (!d.dw) return 0;
  return static_cast<int64_t>(d.parts) *
         (strided ? 2 * WeightCut<kC>::blocks(d.rows / 2) : WeightCut<kC>::blocks(d.rows));
}

}  // namespace

int cell_parts(int B, int C, int pixels, bool backward) {
  const int forward = C == 16 ? MainTile<16>::P : C == 128 ? MainTile<128>::P : MainTile<32>::P;
  static_assert(MainTile<32>::P == MainTile<64>::P, "one answer for both");
  const int tile = backward ? 2048 / C : forward;
  return B * ((pixels + tile - 1) / tile);
}

const char* cell_shared_bytes(int C, int* forward, int* pool, int* backward) {
  return with_channels(C, [=](auto channels) -> const char* {
    constexpr int kC = decltype(channels)::value;
    *forward = sizeof(ForwardShared<kC>), *pool = sizeof(PoolShared<kC>), *backward = sizeof(BackwardShared<kC>);
    return nullptr;
  });
}

const char* cell_unfit(int device) {
  const OnDevice on(device);
  cudaFuncAttributes found;
  return cudaFuncGetAttributes(&found, cell_pool<16>) == cudaSuccess ? nullptr : last_error();  // which forgets it
}

const char* cell_step_fwd(const CudaCellForward& c, int device, void* stream) {
  Cut cut = cut_of(c.cell, false);
  for (const CudaProduct* p : {&c.main, &c.strided}) cut.vector = cut.vector && aligned(p->z);
  if (c.pooled) cut.tiles = cell_parts(1, c.cell.C, c.cell.H * c.cell.W, true);
  return with_channels(c.cell.C, [&](auto channels) {
    constexpr int kC = decltype(channels)::value;
    if (c.pooled) return launch<PoolShared<kC>>(cell_pool<kC>, c.cell.B, c, cut, device, stream);
    const int64_t programs =
        c.cell.B * (int64_t{c.main.rows ? cut.tiles : 0} + (c.strided.rows ? 2 * cut.strided_tiles : 0));
    return launch<ForwardShared<kC>>(cell_fwd<kC>, programs, c, cut, device, stream);
  });
}

const char* cell_step_bwd(const CudaCellBackward& c, int device, void* stream) {
  Cut cut = cut_of(c.cell, true);
  for (const CudaBehind* d : {&c.main, &c.strided}) cut.vector = cut.vector && aligned(d->g) && aligned(d->z);
  for (const float* g : c.g) cut.vector = cut.vector && aligned(g);
  return with_channels(c.cell.C, [&](auto channels) {
    constexpr int kC = decltype(channels)::value;
    const int64_t programs =
        int64_t{c.cell.B} * cut.tiles + weight_programs<kC>(c.main, false) + weight_programs<kC>(c.strided, true);
    return launch<BackwardShared<kC>>(cell_bwd<kC>, programs, c, cut, device, stream);
  });
}

}  // namespace ftso
