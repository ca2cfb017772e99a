// Small parts that the AVX2 tables share. For those files only: everything is inlined where it is used, so
// that no copy of it can be linked into code for other machines.
#pragma once

#include <immintrin.h>

#include <cstddef>

#include "compute/activation.h"
#include "compute/packed.h"

namespace elasticmoe::compute {

// As in simd_avx512.h, eight lanes.
[[gnu::always_inline]] inline __m256 Exp(__m256 x) {
  const __m256 low = _mm256_set1_ps(-87.0F);
  const __m256 tiny = _mm256_cmp_ps(x, low, _CMP_LT_OQ);
  x = _mm256_min_ps(_mm256_max_ps(x, low), _mm256_set1_ps(88.0F));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504F)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375F), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4F), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4F);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3F));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3F));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2F));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1F));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1F));
  p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), _mm256_add_ps(r, _mm256_set1_ps(1.0F)));
  const __m256i power =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_andnot_ps(tiny, _mm256_mul_ps(p, _mm256_castsi256_ps(power)));
}

// activation(gate, up) of outputs [begin, begin + 8); of those from n on anything.
[[gnu::always_inline]] inline __m256 Activated(const Activation& activation, __m256 gate, __m256 up,
                                               int begin, int n) {
  const __m256 one = _mm256_set1_ps(1.0F);
  if (activation.gate_bias != nullptr && begin < n) {
    const __m256i lanes =
        _mm256_cmpgt_epi32(_mm256_set1_epi32(n - begin), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    gate = _mm256_add_ps(gate, _mm256_maskload_ps(activation.gate_bias + begin, lanes));
    up = _mm256_add_ps(up, _mm256_maskload_ps(activation.up_bias + begin, lanes));
  }
  __m256 slope = gate;  // of the sigmoid
  if (activation.spec.kind == Activation::Kind::kClampedSwiglu) {
    const __m256 limit = _mm256_set1_ps(activation.spec.limit);
    gate = _mm256_min_ps(gate, limit);
    up = _mm256_min_ps(_mm256_max_ps(up, _mm256_sub_ps(_mm256_setzero_ps(), limit)), limit);
    up = _mm256_add_ps(up, one);
    slope = _mm256_mul_ps(gate, _mm256_set1_ps(activation.spec.alpha));
  }
  const __m256 divisor = _mm256_add_ps(one, Exp(_mm256_sub_ps(_mm256_setzero_ps(), slope)));
  return _mm256_mul_ps(_mm256_div_ps(gate, divisor), up);
}

[[gnu::always_inline]] inline __m256 FloatOf(const Bf16* in) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in))), 16));
}

}  // namespace elasticmoe::compute
