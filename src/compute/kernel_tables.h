// The tables there are, one a file kernels_*.cc.
#pragma once

#include "compute/kernels.h"

namespace elasticmoe::compute {

// Kernels::store_kv and attend, which know how K and V lie in a block.
struct AttentionKernels {
  decltype(Kernels::store_kv) store_kv;
  decltype(Kernels::attend) attend;
};

// Rows of a product from which on its weights are asked for ahead, into L2, on this machine. With fewer, a
// plain stream of loads is what machines fetch ahead best by themselves; with more, loads wait behind
// arithmetic in the machine's window, and memory idles. Which number changes with the machine, not the
// result.
struct AheadRows {
  int bf16, int8, int4;  // of int4 a line is twice as much to compute
};
const AheadRows& RowsToFetchAhead();

const Kernels& ReferenceKernels();
QuantizedKernels ReferenceQuantizedKernels();
#if defined(__x86_64__)
QuantizedKernels Avx2QuantizedKernels();  // REQUIRES: avx2, fma
QuantizedKernels VnniQuantizedKernels();  // REQUIRES: avx512 f, bw, vl, dq, vnni
const Kernels& Avx2Kernels();             // REQUIRES: avx2, fma
const Kernels& Avx512Kernels();           // REQUIRES: avx512 f, bw, vl, dq
const Kernels& Avx512VnniKernels();       // REQUIRES: those, vnni
const Kernels& Avx512Bf16Kernels();       // REQUIRES: avx512 f, bw, vl, dq, bf16
AttentionKernels AmxAttention();          // REQUIRES: avx512 f, bw, vl, dq, bf16, amx tile and bf16
QuantizedKernels AmxQuantizedKernels();   // REQUIRES: those, amx tile and int8
const Kernels&
AmxBf16Kernels();  // REQUIRES: those, vnni, amx tile, bf16 and int8, and leave of the kernel to use tiles
#endif

}  // namespace elasticmoe::compute
