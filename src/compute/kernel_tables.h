// The tables there are, one a file: kernels_reference.cc, kernels_avx2.cc, kernels_avx512.cc.
#pragma once

#include "compute/kernels.h"

namespace elasticmoe::compute {

const Kernels& ReferenceKernels();
#if defined(__x86_64__)
const Kernels& Avx2Kernels();        // REQUIRES: avx2, fma
const Kernels& Avx512Bf16Kernels();  // REQUIRES: avx512 f, bw, vl, dq, bf16
#endif

}  // namespace elasticmoe::compute
