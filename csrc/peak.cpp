// The machine's limit for the kernels of one instruction set: multiply-adds on registers, nothing else.
#include "ftso.h"
#include "simd.h"

namespace ftso::FTSO_ISA {

// As many independent chains as fit in the registers beside the two operands; each then waits only for itself.
constexpr int kChains = kPanel > 1 ? 16 : kStateVectors ? 6 : 3;

const char* fma_peak(int64_t rounds, double* operations) {
  Vec chains[kChains];
  for (int i = 0; i < kChains; ++i) chains[i] = set1(static_cast<float>(i));
  const Vec a = set1(0.5f), b = set1(1.0f);
  for (int64_t r = 0; r < rounds; ++r)
    for (int i = 0; i < kChains; ++i) chains[i] = fma(chains[i], a, b);
  Vec total = zero();
  for (int i = 0; i < kChains; ++i) total = add(total, chains[i]);
  const double done = 2.0 * kLanes * kChains * static_cast<double>(rounds);
  *operations = sum(total) > 0 ? done : 0;  // which reads the chains, so that they are computed
  return compiled_isa;
}

}  // namespace ftso::FTSO_ISA
