// The running softmax of the AVX2 table's attention, over K and V as over latents.
#pragma once

#include <algorithm>
#include <limits>

#include "compute/kernels.h"
#include "compute/simd_avx2.h"

namespace elasticmoe::compute {
namespace {

// Lanes added in one fixed tree.
inline float ReduceAdd(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// The running softmax of one query.
struct Softmax {
  float largest = -std::numeric_limits<float>::infinity();
  float sum = 0;
  float rescale = 0;                        // of what earlier blocks left in the output
  alignas(32) float weights[kBlockTokens];  // of the present block's tokens
};

// Takes in the scores of a block of which the query sees tokens [first, count). The other lanes hold
// anything, NaN included: they never enter.
inline void Advance(__m256 low, __m256 high, int first, int count, float scale, Softmax& softmax) {
  float* weights = softmax.weights;
  _mm256_store_ps(weights, _mm256_mul_ps(low, _mm256_set1_ps(scale)));
  _mm256_store_ps(weights + 8, _mm256_mul_ps(high, _mm256_set1_ps(scale)));
  float largest = softmax.largest;
  for (int t = 0; t < first; ++t) weights[t] = -std::numeric_limits<float>::infinity();
  for (int t = first; t < count; ++t) largest = std::max(largest, weights[t]);
  for (int t = count; t < kBlockTokens; ++t) weights[t] = -std::numeric_limits<float>::infinity();
  const __m256 shift = _mm256_set1_ps(largest);
  const __m256 p_low = Exp(_mm256_sub_ps(_mm256_load_ps(weights), shift));
  const __m256 p_high = Exp(_mm256_sub_ps(_mm256_load_ps(weights + 8), shift));
  softmax.rescale = _mm256_cvtss_f32(Exp(_mm256_set1_ps(softmax.largest - largest)));
  softmax.sum = softmax.sum * softmax.rescale + ReduceAdd(_mm256_add_ps(p_low, p_high));
  softmax.largest = largest;
  _mm256_store_ps(weights, p_low);
  _mm256_store_ps(weights + 8, p_high);
}

}  // namespace
}  // namespace elasticmoe::compute
