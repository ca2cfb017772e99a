// Small parts that the AVX-512 tables share. For those files only: everything is inlined where it is used, so
// that no copy of it can be linked into code for other machines.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "compute/activation.h"
#include "compute/packed.h"

namespace elasticmoe::compute {

// A line that is asked for ahead (RowsToFetchAhead) is so many bytes before its use, into L2.
inline constexpr std::size_t kAheadBytes = 8192;

// Not _mm_prefetch: around that GCC keeps sums in memory that belong into registers.
[[gnu::always_inline]] inline void FetchAhead(const void* line) {
  asm volatile("prefetcht1 %c1(%0)" : : "r"(line), "i"(kAheadBytes));
}

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

// 16 values to bf16, to the nearest even. Without the instruction NaN stays NaN, and numbers below 2^-126
// stay too.
[[gnu::always_inline]] inline __m256i Bf16Of(__m512 values) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(values);
#else
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
#endif
}

// sum + the products of 16 pairs of bf16; of a pair one after the other where there is no instruction for
// both.
[[gnu::always_inline]] inline __m512 DotBf16(__m512 sum, __m512i a, __m512i b) {
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  const auto first = [](__m512i pair) { return _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16)); };
  const auto second = [&](__m512i pair) { return _mm512_castsi512_ps(_mm512_and_si512(pair, upper)); };
  return _mm512_fmadd_ps(second(a), second(b), _mm512_fmadd_ps(first(a), first(b), sum));
#endif
}

[[gnu::always_inline]] inline __m512 FloatOf(__m256i bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
}

// activation(gate, up) of outputs [begin, begin + 16); of those from n on anything.
[[gnu::always_inline]] inline __m512 Activated(const Activation& activation, __m512 gate, __m512 up,
                                               int begin, int n) {
  const __m512 one = _mm512_set1_ps(1.0F);
  if (activation.gate_bias != nullptr) {
    const __mmask16 lanes = FirstLanes(std::max(0, n - begin));
    gate = _mm512_add_ps(gate, _mm512_maskz_loadu_ps(lanes, activation.gate_bias + begin));
    up = _mm512_add_ps(up, _mm512_maskz_loadu_ps(lanes, activation.up_bias + begin));
  }
  __m512 slope = gate;  // of the sigmoid
  if (activation.spec.kind == Activation::Kind::kClampedSwiglu) {
    const __m512 limit = _mm512_set1_ps(activation.spec.limit);
    gate = _mm512_min_ps(gate, limit);
    up = _mm512_min_ps(_mm512_max_ps(up, _mm512_sub_ps(_mm512_setzero_ps(), limit)), limit);
    up = _mm512_add_ps(up, one);
    slope = _mm512_mul_ps(gate, _mm512_set1_ps(activation.spec.alpha));
  }
  const __m512 divisor = _mm512_add_ps(one, Exp(_mm512_sub_ps(_mm512_setzero_ps(), slope)));
  return _mm512_mul_ps(_mm512_div_ps(gate, divisor), up);
}

// out[begin...] = bf16 of activation(gate, up), no further than n.
[[gnu::always_inline]] inline void StoreActivated(const Activation& activation, __m512 gate, __m512 up,
                                                  int begin, int n, Bf16* out) {
  if (begin >= n) return;
  _mm256_mask_storeu_epi16(out + begin, FirstLanes(n - begin),
                           Bf16Of(Activated(activation, gate, up, begin, n)));
}

// Calls body with the constant of `rows` in [1, kMost].
template <int kMost, class Body>
[[gnu::always_inline]] inline void ForRows(int rows, const Body& body) {
  if constexpr (kMost > 1)
    if (rows < kMost) return ForRows<kMost - 1>(rows, body);
  body(std::integral_constant<int, kMost>());
}

// body(first row, constant count of rows, whether it is the first tile) for tiles of about as many rows each,
// at most kMost.
template <int kMost, class Body>
[[gnu::always_inline]] inline void ForTiles(int m, const Body& body) {
  const int tiles = (m + kMost - 1) / kMost;
  for (int tile = 0, begin = 0; tile < tiles; ++tile) {
    const int end = static_cast<int>(std::int64_t{m} * (tile + 1) / tiles);
    ForRows<kMost>(end - begin, [&](auto count) { body(begin, count, tile == 0); });
    begin = end;
  }
}

// Where a panel of a bf16 matrix begins.
[[gnu::always_inline]] inline const Bf16* PanelOf(const PackedMatrix& w, int panel) {
  return reinterpret_cast<const Bf16*>(w.Panel(panel));
}

}  // namespace elasticmoe::compute
