// AVX512 without VDPBF16PS (Skylake-X to Ice Lake). Compiled with the instruction set; reached only through
// kernels.cc after the machine was asked.
#include "compute/kernels_avx512_body.h"

namespace elasticmoe::compute {

const Kernels& Avx512Kernels() {
  static const Kernels table = TableOf("avx512", Avx2QuantizedKernels());
  return table;
}

const Kernels& Avx512VnniKernels() {
  static const Kernels table = TableOf("avx512vnni", VnniQuantizedKernels());
  return table;
}

}  // namespace elasticmoe::compute
