#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "ftso.h"

namespace ftso {
namespace {

struct Entry {
  const Kernels* kernels;
  bool runs;
};

#if defined(__x86_64__)
// Linux lends the tile unit's registers to a process that asks for them.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

const std::vector<Entry>& table() {  // fastest first
#if defined(__x86_64__)
  __builtin_cpu_init();
  static const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const bool wide = fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool bf16 = wide && __builtin_cpu_supports("avx512bf16");
  static const bool tiles =
      bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && may_use_tiles();
  static const std::vector<Entry> entries = {{&amx::kernels, tiles},
                                             {&avx512bf16::kernels, bf16},
                                             {&avx512::kernels, wide},
                                             {&avx2::kernels, fma},
                                             {&scalar::kernels, true}};
#else
  static const std::vector<Entry> entries = {{&scalar::kernels, true}};
#endif
  return entries;
}

const Kernels* find(const std::string& name, const std::string& asked_by) {
  std::string names;
  for (const Entry& e : table()) {
    names += (names.empty() ? "" : ", ") + std::string(e.kernels->isa);
    if (name != e.kernels->isa) continue;
    if (e.runs) return e.kernels;
    throw std::invalid_argument(asked_by + ": this machine has no " + name + "; leave it unset or name another");
  }
  throw std::invalid_argument(asked_by + ": expected one of " + names + ", got '" + name + "'");
}

const Kernels* choose() {
  if (const char* name = std::getenv("FTSO_ISA"); name && *name) return find(name, "FTSO_ISA");
  for (const Entry& e : table())
    if (e.runs) return e.kernels;
  return nullptr;
}

const Kernels* chosen = nullptr;

}  // namespace

const Kernels& kernels() {
  if (!chosen) chosen = choose();
  return *chosen;
}

void force_isa(const char* name) { chosen = name ? find(name, "force_isa") : choose(); }

int available_isas(const char** names, int capacity) {
  int n = 0;
  for (const Entry& e : table())
    if (e.runs && n < capacity) names[n++] = e.kernels->isa;
  return n;
}

}  // namespace ftso
