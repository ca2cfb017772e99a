#include "compute/kernels.h"

#include <string>

#include "compute/kernel_tables.h"

namespace elasticmoe::compute {

const std::vector<const Kernels*>& AvailableKernels() {
  static const std::vector<const Kernels*> tables = [] {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&Avx512Bf16Kernels());
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
