// What the VNNI and the AMX products of int8 and int4 matrices share. For those files only, as simd_avx512.h.
#pragma once

#include <algorithm>

#include "compute/quantized_row.h"
#include "compute/simd_avx512.h"

namespace elasticmoe::compute {

inline constexpr int kQuads = kGroup / 4;

// kGroup values, as four registers, into group `group` of a row.
[[gnu::always_inline]] inline void QuantizeGroup(const __m512 (&values)[4], int group,
                                                 const QuantizedRowOut& out) {
  __m512 largest = _mm512_abs_ps(values[0]);
  for (int i = 1; i < 4; ++i) largest = _mm512_max_ps(largest, _mm512_abs_ps(values[i]));
  const float most = _mm512_reduce_max_ps(largest);
  out.scales[group] = most * (1.0F / 127.0F);
  const __m512 inverse = _mm512_set1_ps(most > 0 ? 127.0F / most : 0.0F);
  __m512i sum = _mm512_setzero_si512();
  for (int i = 0; i < 4; ++i) {
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(values[i], inverse));
    sum = _mm512_add_epi32(sum, q);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out.values + std::size_t(group) * kGroup + i * 16),
                     _mm512_cvtsepi32_epi8(q));
  }
  out.offsets[group] = -128 * _mm512_reduce_add_epi32(sum);
}

// The weights of two quads of inputs for 16 outputs each: [quad][half of the panel].
template <WeightFormat kFormat>
[[gnu::always_inline]] inline void LoadWeights(const std::byte* quads, int pair, __m512i (&w)[2][2]) {
  if constexpr (kFormat == WeightFormat::kInt8) {
    const std::byte* at = quads + std::size_t(pair) * 2 * kPanel * 4;
    w[0][0] = _mm512_loadu_si512(at);
    w[0][1] = _mm512_loadu_si512(at + 64);
    w[1][0] = _mm512_loadu_si512(at + 128);
    w[1][1] = _mm512_loadu_si512(at + 192);
  } else {
    const __m512i high = _mm512_set1_epi8(static_cast<char>(0xf0));
    for (int half = 0; half < 2; ++half) {
      const __m512i both = _mm512_loadu_si512(quads + std::size_t(pair) * kPanel * 4 + half * 64);
      w[0][half] = _mm512_and_si512(_mm512_slli_epi16(both, 4), high);
      w[1][half] = _mm512_and_si512(both, high);
    }
  }
}

// Rows that go through gate_up together, and the sums of theirs that wait for the other matrix.
inline constexpr int kBlockRows = 64;
inline constexpr int kBlockSums = kBlockRows * kGroup;

// gate_up of quantized matrices. fill(w, rows, count, first, last, to, stride) writes the sums of rows x
// panels [first, last) of w, to[row * stride + output]. As many panels of one matrix run before the other's
// as there is room for: the longer a stream, the better machines fetch it ahead.
template <class Fill>
[[gnu::always_inline]] inline void GateUpBlocks(const PackedMatrix& gate, const PackedMatrix& up,
                                                const Activation& activation, const void* const* rows, int m,
                                                int panel_begin, int panel_end, void* const* out,
                                                const Fill& fill) {
  const int groups_out = GroupsOf(gate.n);
  alignas(64) float gate_sums[kBlockSums];
  alignas(64) float up_sums[kBlockSums];
  const int step = 2 * std::max(1, kBlockRows / std::max(1, m));  // panels
  for (int panel = panel_begin; panel < panel_end; panel += step) {
    const int last = std::min(panel_end, panel + step);
    const int stride = (last - panel + 1) / 2 * kGroup;
    for (int begin = 0; begin < m; begin += kBlockRows) {
      const int count = std::min(kBlockRows, m - begin);
      fill(gate, rows + begin, count, panel, last, gate_sums, stride);
      fill(up, rows + begin, count, panel, last, up_sums, stride);
      for (int r = 0; r < count; ++r) {
        const QuantizedRowOut to = QuantizedRowOut::At(out[begin + r], groups_out);
        for (int first = panel; first < last; first += 2) {
          const std::size_t at = std::size_t(r) * stride + (first - panel) * kPanel;
          const int valid = std::min(kGroup, gate.n - first * kPanel);
          __m512 values[4];
          for (int i = 0; i < 4; ++i) {
            values[i] = Activated(activation, _mm512_load_ps(gate_sums + at + i * 16),
                                  _mm512_load_ps(up_sums + at + i * 16), first * kPanel + i * 16, gate.n);
            values[i] = _mm512_maskz_mov_ps(FirstLanes(std::max(0, valid - i * 16)), values[i]);
          }
          QuantizeGroup(values, first / 2, to);
        }
      }
    }
  }
}

}  // namespace elasticmoe::compute
