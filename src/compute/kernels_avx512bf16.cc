// AVX512-BF16 (Cooper Lake, Sapphire Rapids, Zen 4 and later). Compiled with the instruction set; reached
// only through kernels.cc after the machine was asked.
#include "compute/kernels_avx512_body.h"

namespace elasticmoe::compute {

const Kernels& Avx512Bf16Kernels() {
  static const Kernels table = TableOf("avx512bf16", VnniQuantizedKernels());
  return table;
}

}  // namespace elasticmoe::compute
