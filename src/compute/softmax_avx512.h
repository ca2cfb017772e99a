// What attention of the AVX512 tables shares, over K and V as over latents: the running softmax of a query,
// and lines that are fetched meanwhile.
#pragma once

#include <algorithm>
#include <cstddef>

#include "compute/kernels.h"
#include "compute/simd_avx512.h"

namespace elasticmoe::compute {
namespace {

constexpr int kSpanBlocks = 4;
constexpr int kSpan = kSpanBlocks * kBlockTokens;  // tokens between two updates of a softmax

// Lines that are fetched a few at a time, while something is computed. Into the L2 cache: as many as are on
// their way to L1 at a time are too few to hide how far memory is.
class Fetch {
 public:
  // bytes each of `blocks`; all of them in about `steps` calls of Some.
  Fetch(const Bf16* const* blocks, int count, std::size_t bytes, int steps)
      : blocks_(blocks), left_(count), bytes_(bytes) {
    const std::size_t lines = count * ((bytes + 63) / 64);
    some_ = static_cast<int>((lines + steps - 1) / steps);
  }
  [[gnu::always_inline]] void Some() {
    for (int i = 0; i < some_ && left_ > 0; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(*blocks_) + at_, _MM_HINT_T1);
      at_ += 64;
      if (at_ >= bytes_) {
        at_ = 0;
        ++blocks_;
        --left_;
      }
    }
  }

 private:
  const Bf16* const* blocks_;
  int left_, some_;
  std::size_t bytes_, at_ = 0;
};

constexpr float kLog2E = 1.44269504F;

// 2^x of x <= 0 (-inf: 0), to 3e-6: the Taylor series of 2^r, r in [-1/2, 1/2], as weights are rounded to
// bf16 anyhow.
[[gnu::always_inline]] inline __m512 Exp2(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-200.0F));
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.33335581e-3F);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.61812911e-3F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.55041087e-2F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.40226507e-1F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93147181e-1F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0F));
  return _mm512_scalef_ps(p, n);
}

// The running softmax of one query, to base 2.
struct Softmax {
  float largest = 0;
  float sum = 0;
  float rescale = 1;                // of what earlier spans left in the output
  int first = 0, seen = 0;          // of the present span's tokens the query sees [first, seen)
  alignas(64) Bf16 weights[kSpan];  // of the present span's tokens
};

// Takes in the scores (q . k) of blocks [first_block, first_block + kBlocks) of the present span. Lanes that
// the query does not see hold anything, NaN included: they never enter. What is added up are the weights as
// they are multiplied with values, rounded.
template <int kBlocks>
[[gnu::always_inline]] inline void Advance(const __m512* scores, int first_block, float scale,
                                           Softmax& softmax) {
  __m512 scaled[kBlocks];
  __mmask16 valid[kBlocks];
  __m512 most = _mm512_set1_ps(softmax.largest);
  for (int b = 0; b < kBlocks; ++b) {
    const int begin = (first_block + b) * kBlockTokens;
    valid[b] = static_cast<__mmask16>(FirstLanes(std::max(0, softmax.seen - begin)) &
                                      ~FirstLanes(std::max(0, softmax.first - begin)));
    scaled[b] = _mm512_mul_ps(scores[b], _mm512_set1_ps(scale));
    most = _mm512_mask_max_ps(most, valid[b], most, scaled[b]);
  }
  const float largest = _mm512_reduce_max_ps(most);
  const __m512 shift = _mm512_set1_ps(largest);
  __m512 sum = _mm512_setzero_ps();
  for (int b = 0; b < kBlocks; ++b) {
    const __m256i p = Bf16Of(_mm512_maskz_mov_ps(valid[b], Exp2(_mm512_sub_ps(scaled[b], shift))));
    _mm256_store_si256(reinterpret_cast<__m256i*>(softmax.weights + (first_block + b) * kBlockTokens), p);
    sum = _mm512_add_ps(sum, FloatOf(p));
  }
  softmax.rescale =
      largest == softmax.largest ? 1.0F : _mm512_cvtss_f32(Exp2(_mm512_set1_ps(softmax.largest - largest)));
  softmax.sum = softmax.sum * softmax.rescale + _mm512_reduce_add_ps(sum);
  softmax.largest = largest;
}

}  // namespace
}  // namespace elasticmoe::compute
