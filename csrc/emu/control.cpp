// The schedule, for whoever has loaded kernels and emulator as a library.
#include "cuda_emu.h"

extern "C" __attribute__((visibility("default"))) void ftso_emu_schedule(int policy, int order, uint32_t seed) {
  ftso::emu::schedule(static_cast<ftso::emu::Policy>(policy), static_cast<ftso::emu::Order>(order), seed);
}
