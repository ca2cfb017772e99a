// Small parts that the AVX-512 tables share. For those files only: everything is inlined where it is used, so
// that no copy of it can be linked into code for other machines.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstddef>

#include "compute/packed.h"

namespace elasticmoe::compute {

// e^x for x <= 88: 2^n * p(r), Cephes' polynomial on [-ln2/2, ln2/2], error below 2 ulp. Below -87 it gives
// 0.
[[gnu::always_inline]] inline __m512 Exp(__m512 x) {
  const __m512 low = _mm512_set1_ps(-87.0F);
  const __mmask16 tiny = _mm512_cmp_ps_mask(x, low, _CMP_LT_OQ);
  x = _mm512_min_ps(_mm512_max_ps(x, low), _mm512_set1_ps(88.0F));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504F)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375F), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4F), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4F);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1F));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0F)));
  return _mm512_maskz_mov_ps(static_cast<__mmask16>(~tiny), _mm512_scalef_ps(p, n));
}

// The first `count` lanes, all where there are more.
[[gnu::always_inline]] inline __mmask16 FirstLanes(int count) {
  return count >= 16 ? __mmask16(0xffff) : static_cast<__mmask16>((1u << count) - 1);
}

[[gnu::always_inline]] inline __m512bh AsBf16(__m512i v) {
  return (__m512bh)v;
}

[[gnu::always_inline]] inline __m512 FloatOf(__m256i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}

[[gnu::always_inline]] inline __m512 Silu(__m512 gate, __m512 up) {
  const __m512 divisor = _mm512_add_ps(_mm512_set1_ps(1.0F), Exp(_mm512_sub_ps(_mm512_setzero_ps(), gate)));
  return _mm512_mul_ps(_mm512_div_ps(gate, divisor), up);
}

// out[begin...] = bf16 of silu(gate) * up, no further than n.
[[gnu::always_inline]] inline void StoreSilu(__m512 gate, __m512 up, int begin, int n, Bf16* out) {
  if (begin >= n) return;
  _mm256_mask_storeu_epi16(out + begin, FirstLanes(n - begin), (__m256i)_mm512_cvtneps_pbh(Silu(gate, up)));
}

// Where a panel of a bf16 matrix begins.
[[gnu::always_inline]] inline const Bf16* PanelOf(const PackedMatrix& w, int panel) {
  return reinterpret_cast<const Bf16*>(w.Panel(panel));
}

}  // namespace elasticmoe::compute
