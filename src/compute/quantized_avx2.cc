// int8 and int4 products for machines without VNNI: bytes widened to 16 bits and multiplied in pairs
// (VPMADDWD), whose sums are exact; float32 in the same order as the other tables.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "compute/kernel_tables.h"
#include "compute/quantize_group.h"
#include "compute/quantized_row.h"
#include "compute/simd_avx2.h"

namespace elasticmoe::compute {
namespace {

constexpr int kVectors = kPanel / 8;

void QuantizeGroup(const float* values, int group, const QuantizedRowOut& out) {
  const __m256 sign = _mm256_set1_ps(-0.0F);
  __m256 largest = _mm256_setzero_ps();
  for (int i = 0; i < kGroup; i += 8)
    largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, _mm256_load_ps(values + i)));
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, largest);
  float most = lanes[0];
  for (int i = 1; i < 8; ++i) most = std::max(most, lanes[i]);
  out.scales[group] = most * (1.0F / 127.0F);
  const __m256 inverse = _mm256_set1_ps(most > 0 ? 127.0F / most : 0.0F);
  std::int32_t sum = 0;
  for (int i = 0; i < kGroup; i += 8) {
    alignas(32) std::int32_t q[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(q),
                       _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(values + i), inverse)));
    for (int j = 0; j < 8; ++j) {
      const auto value = static_cast<std::int8_t>(std::clamp(q[j], -127, 127));
      out.values[group * kGroup + i + j] = value;
      sum += value;
    }
  }
  out.offsets[group] = -128 * sum;
}

void Quantize(const void* activations, int k, void* quantized) {
  const auto* in = static_cast<const Bf16*>(activations);
  const QuantizedRowOut out = QuantizedRowOut::At(quantized, GroupsOf(k));
  for (int group = 0; group < GroupsOf(k); ++group) {
    alignas(32) float values[kGroup] = {};
    for (int i = 0; i < std::min(kGroup, k - group * kGroup); ++i)
      values[i] = ToFloat(in[group * kGroup + i]);
    QuantizeGroup(values, group, out);
  }
}

// Two sums of each of 4 + 4 outputs -> the 8 outputs in order.
inline __m256i AddPairs(__m256i first, __m256i second) {
  return _mm256_permute4x64_epi64(_mm256_hadd_epi32(first, second), _MM_SHUFFLE(3, 1, 2, 0));
}

// sums = one row x one panel.
template <WeightFormat kFormat>
inline void PanelDot(const PackedMatrix& w, int panel, const void* row, __m256 (&sums)[kVectors]) {
  const int groups = GroupsOf(w.k);
  const QuantizedRow x = QuantizedRow::At(row, groups);
  const std::byte* at = w.Panel(panel);
  for (__m256& sum : sums) sum = _mm256_setzero_ps();
  for (int group = 0; group < groups; ++group, at += GroupBytes(kFormat)) {
    __m256i acc[kVectors * 2];  // 4 outputs each, two sums an output
    for (__m256i& sum : acc) sum = _mm256_setzero_si256();
    const std::byte* quads = at + kPanel * sizeof(Bf16);
    for (int quad = 0; quad < kGroup / 4; ++quad) {
      std::int32_t four;
      std::memcpy(&four, x.values + group * kGroup + quad * 4, 4);
      const __m256i in = _mm256_cvtepi8_epi16(_mm_set1_epi32(four));
      for (int v = 0; v < kVectors * 2; ++v) {
        __m128i bytes;
        if constexpr (kFormat == WeightFormat::kInt8) {
          bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(quads + quad * kPanel * 4 + v * 16));
        } else {
          bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(quads + quad / 2 * kPanel * 4 + v * 16));
          if (quad % 2 == 0) bytes = _mm_slli_epi16(bytes, 4);
          bytes = _mm_and_si128(bytes, _mm_set1_epi8(static_cast<char>(0xf0)));
        }
        acc[v] = _mm256_add_epi32(acc[v], _mm256_madd_epi16(_mm256_cvtepu8_epi16(bytes), in));
      }
    }
    const __m256 scale = _mm256_set1_ps(x.scales[group]);
    const __m256i offset = _mm256_set1_epi32(x.offsets[group]);
    for (int v = 0; v < kVectors; ++v) {
      const __m256i sum = _mm256_add_epi32(AddPairs(acc[2 * v], acc[2 * v + 1]), offset);
      const __m256 weight = FloatOf(reinterpret_cast<const Bf16*>(at) + v * 8);
      sums[v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(weight, scale), sums[v]);
    }
  }
}

inline void PanelDot(const PackedMatrix& w, int panel, const void* row, float* to) {
  __m256 sums[kVectors];
  if (w.format == WeightFormat::kInt4) {
    PanelDot<WeightFormat::kInt4>(w, panel, row, sums);
  } else {
    PanelDot<WeightFormat::kInt8>(w, panel, row, sums);
  }
  for (int v = 0; v < kVectors; ++v) _mm256_store_ps(to + v * 8, sums[v]);
}

void Matmul(const PackedMatrix& w, const void* const* rows, int m, int panel_begin, int panel_end,
            float* const* out) {
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    const int count = std::min(kPanel, w.n - panel * kPanel);
    for (int r = 0; r < m; ++r) {
      alignas(32) float sums[kPanel];
      PanelDot(w, panel, rows[r], sums);
      std::memcpy(out[r] + panel * kPanel, sums, std::size_t(count) * sizeof(float));
    }
  }
}

void GateUp(const PackedMatrix& gate, const PackedMatrix& up, const Activation& activation,
            const void* const* rows, int m, int panel_begin, int panel_end, void* const* out) {
  for (int panel = panel_begin; panel < panel_end; panel += 2) {
    const int halves = std::min(2, panel_end - panel);
    const int valid = std::min(kGroup, gate.n - panel * kPanel);
    for (int r = 0; r < m; ++r) {
      alignas(32) float g[kGroup] = {}, u[kGroup] = {};
      for (int half = 0; half < halves; ++half) {
        PanelDot(gate, panel + half, rows[r], g + half * kPanel);
        PanelDot(up, panel + half, rows[r], u + half * kPanel);
      }
      for (int i = 0; i < kGroup; i += 8)
        _mm256_store_ps(g + i, Activated(activation, _mm256_load_ps(g + i), _mm256_load_ps(u + i),
                                         panel * kPanel + i, gate.n));
      std::fill(g + valid, g + kGroup, 0.0F);
      QuantizeGroup(g, panel / 2, QuantizedRowOut::At(out[r], GroupsOf(gate.n)));
    }
  }
}

void PackGroups(const float* values, WeightFormat format, int first_lane, std::byte* group) {
  QuantizeGroupsBody(values, format, first_lane, group);
}

}  // namespace

QuantizedKernels Avx2QuantizedKernels() {
  return {PackGroups, Quantize, Matmul, GateUp};
}

}  // namespace elasticmoe::compute
