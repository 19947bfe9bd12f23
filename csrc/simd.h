// What the compiler was told about the machine. Kernels include no std headers (the linker would keep one copy of
// an inline function for everybody, compiled for a machine that not everybody has).
#pragma once

namespace ftso {
#if defined(__AVX512F__)
constexpr const char* compiled_isa = "avx512";
#elif defined(__AVX2__)
constexpr const char* compiled_isa = "avx2";
#else
constexpr const char* compiled_isa = "scalar";
#endif
}  // namespace ftso
