// The tables there are, one a file kernels_*.cc.
#pragma once

#include "compute/kernels.h"

namespace elasticmoe::compute {

const Kernels& ReferenceKernels();
QuantizedKernels ReferenceQuantizedKernels();
#if defined(__x86_64__)
QuantizedKernels Avx2QuantizedKernels();  // REQUIRES: avx2, fma
QuantizedKernels VnniQuantizedKernels();  // REQUIRES: avx512 f, bw, vl, dq, vnni, bf16
const Kernels& Avx2Kernels();             // REQUIRES: avx2, fma
const Kernels& Avx512Bf16Kernels();       // REQUIRES: avx512 f, bw, vl, dq, bf16
const Kernels& AmxBf16Kernels();  // REQUIRES: those, amx tile and bf16, and leave of the kernel to use tiles
#endif

}  // namespace elasticmoe::compute
