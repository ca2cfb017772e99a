#include "compute/kernels.h"

#include <string>
#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "compute/kernel_tables.h"

namespace elasticmoe::compute {
namespace {

#if defined(__x86_64__)
// Tiles exist, and the kernel grants this process their 8 KiB of state (it is asked once, for all threads).
bool MayUseAmx() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h
  constexpr int kTileData = 18;               // XFEATURE_XTILE_DATA
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  const bool bf16 = (edx >> 22 & 1) != 0, tile = (edx >> 24 & 1) != 0, int8 = (edx >> 25 & 1) != 0;
  return bf16 && tile && int8 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

// Measured on experts of 1024 x 384 that no cache holds. Zen 5: int8 of 2 to 5 rows at 34 GB/s a thread, not
// 26 to 14; bf16 of 5 to 7 at 34, not 31 to 27. Zen 4 (family 19h with AVX512) is slower for it.
const AheadRows& RowsToFetchAhead() {
  static const AheadRows rows = [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_is("amdfam19h")) return AheadRows{.bf16 = 8, .int8 = 6, .int4 = 3};
#endif
    return AheadRows{.bf16 = 4, .int8 = 2, .int4 = 3};
  }();
  return rows;
}

const std::vector<const Kernels*>& AvailableKernels() {
  static const std::vector<const Kernels*> tables = [] {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    const bool avx512_bf16 = vnni && __builtin_cpu_supports("avx512bf16");
    if (avx512_bf16 && MayUseAmx()) found.push_back(&AmxBf16Kernels());
    if (avx512_bf16) found.push_back(&Avx512Bf16Kernels());
    if (vnni) found.push_back(&Avx512VnniKernels());
    if (avx512) found.push_back(&Avx512Kernels());
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&Avx2Kernels());
#endif
    found.push_back(&ReferenceKernels());
    return found;
  }();
  return tables;
}

Expected<const Kernels*> FindKernels(std::string_view name) {
  if (name == "auto") return AvailableKernels().front();
  std::string names;
  for (const Kernels* table : AvailableKernels()) {
    if (table->name == name) return table;
    names += fmt::format(" {}", table->name);
  }
  return Fail(ErrorCode::kInvalidArgument,
              "choosing kernels: {} is not to be had here; use auto or one of:{}", name, names);
}

}  // namespace elasticmoe::compute
