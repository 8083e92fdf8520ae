// Run-time choice of the instruction set; API in dispatch.h.
// The processor's word (cpuid) and the operating system's (xgetbv through the compiler's check, arch_prctl for AMX)
// both count. AMX state must be asked for once per process: permission for XTILEDATA, component 18.
#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace peftkern {

#if defined(__x86_64__)
namespace {

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool has_amx() {
  unsigned a, b, c, d;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kAmxBf16) || !(d & kAmxTile)) return false;
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

std::vector<Feature> processor_features() {
  __builtin_cpu_init();
  static const bool amx = has_amx();
  return {{"avx2", has_avx2()},
          {"avx512", has_avx512()},
          {"avx512_bf16", bool(__builtin_cpu_supports("avx512bf16"))},
          {"amx_bf16", amx}};
}
#else
std::vector<Feature> processor_features() { return {}; }
#endif

Level best_level() {
  static const Level level = [] {
    Level best = kPortable;
#if defined(__x86_64__)
    std::vector<Feature> have = processor_features();
    if (have[0].present) best = kAvx2;
    if (best == kAvx2 && have[1].present) best = kAvx512;
    if (best == kAvx512 && have[2].present && have[3].present) best = kAmx;
#endif
    return best;
  }();
  return level;
}

const Kernels& kernels_of(Level level) {
#if defined(__x86_64__)
  if (level == kAmx) return amx::kernels();
  if (level == kAvx512) return avx512::kernels;
  if (level == kAvx2) return avx2::kernels;
#endif
  (void)level;
  return portable::kernels;
}

const BlockKernels& block_kernels_of(Level level) {
#if defined(__x86_64__)
  if (level == kAmx) return amx::block_kernels();
  if (level == kAvx512) return avx512::block_kernels;
  if (level == kAvx2) return avx2::block_kernels;
#endif
  (void)level;
  return portable::block_kernels;
}

}  // namespace peftkern
