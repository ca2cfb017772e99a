// int8 and int4 products by VPDPBUSD: unsigned weights times signed activations into int32, a group of 64
// inputs at a time; then float32, in an order that no number of rows changes. Compiled with the instruction
// set; reached only through kernels.cc after the machine was asked.
#include <algorithm>
#include <cstring>

#include "compute/kernel_tables.h"
#include "compute/quantize_group.h"
#include "compute/quantized_avx512.h"

namespace elasticmoe::compute {
namespace {

void Quantize(const void* activations, int k, void* quantized) {
  const auto* in = static_cast<const Bf16*>(activations);
  const int groups = GroupsOf(k);
  const QuantizedRowOut out = QuantizedRowOut::At(quantized, groups);
  for (int group = 0; group < groups; ++group) {
    __m512 values[4];
    for (int i = 0; i < 4; ++i) {
      const int begin = group * kGroup + i * 16;
      values[i] = begin + 16 <= k ? FloatOf(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + begin)))
                  : begin < k     ? FloatOf(_mm256_maskz_loadu_epi16(FirstLanes(k - begin), in + begin))
                                  : _mm512_setzero_ps();
    }
    QuantizeGroup(values, group, out);
  }
}

// sums[row][half] = rows x panel, over all groups, front to back.
template <WeightFormat kFormat, int kRows, bool kAhead>
[[gnu::always_inline]] inline void Accumulate(const std::byte* panel, const QuantizedRow (&x)[kRows],
                                              int groups, __m512 (&sums)[kRows][2]) {
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  for (int group = 0; group < groups; ++group, panel += GroupBytes(kFormat)) {
    if constexpr (kAhead)
      for (std::size_t line = 0; line < GroupBytes(kFormat); line += 64) FetchAhead(panel + line);
    __m512i acc[kRows][2];
    for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = _mm512_set1_epi32(x[r].offsets[group]);
#pragma GCC unroll 8
    for (int pair = 0; pair < kQuads / 2; ++pair) {
      __m512i w[2][2];
      LoadWeights<kFormat>(panel + kPanel * sizeof(Bf16), pair, w);
      for (int quad = 0; quad < 2; ++quad) {
        for (int r = 0; r < kRows; ++r) {
          std::int32_t four;
          std::memcpy(&four, x[r].values + std::size_t(group) * kGroup + (pair * 2 + quad) * 4, 4);
          const __m512i in = _mm512_set1_epi32(four);
          acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], w[quad][0], in);
          acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], w[quad][1], in);
        }
      }
    }
    const auto* scales = reinterpret_cast<const __m256i*>(panel);
    const __m512 low = FloatOf(_mm256_loadu_si256(scales)), high = FloatOf(_mm256_loadu_si256(scales + 1));
    for (int r = 0; r < kRows; ++r) {
      const __m512 scale = _mm512_set1_ps(x[r].scales[group]);
      sums[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][0]), _mm512_mul_ps(low, scale), sums[r][0]);
      sums[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][1]), _mm512_mul_ps(high, scale), sums[r][1]);
    }
  }
}

// Rows of one panel that share its loads and their unpacking: 8 x 2 integer sums and what is unpacked fit the
// 32 registers, their float sums wait in the L1 cache meanwhile.
constexpr int kTileRows = 8;

inline void StorePanel(float* out, int n, int panel, const __m512 (&sums)[2]) {
  for (int half = 0; half < 2; ++half) {
    const int begin = panel * kPanel + half * 16;
    if (begin < n) _mm512_mask_storeu_ps(out + begin, FirstLanes(n - begin), sums[half]);
  }
}

// store(row, sums): one panel for all rows, while it stays in cache.
template <WeightFormat kFormat, class Store>
[[gnu::always_inline]] inline void ForPanel(const PackedMatrix& w, const void* const* rows, int m, int panel,
                                            const Store& store) {
  const int groups = GroupsOf(w.k);
  const AheadRows& ahead = RowsToFetchAhead();
  const int least_ahead = kFormat == WeightFormat::kInt4 ? ahead.int4 : ahead.int8;
  ForTiles<kTileRows>(m, [&](int first, auto count, bool cold) {
    QuantizedRow x[count()];
    for (int r = 0; r < count(); ++r) x[r] = QuantizedRow::At(rows[first + r], groups);
    __m512 sums[count()][2];
    if (cold && count() >= least_ahead)
      Accumulate<kFormat, count(), true>(w.Panel(panel), x, groups, sums);
    else
      Accumulate<kFormat, count(), false>(w.Panel(panel), x, groups, sums);
    for (int r = 0; r < count(); ++r) store(first + r, sums[r]);
  });
}

template <WeightFormat kFormat>
void MatmulAs(const PackedMatrix& w, const void* const* rows, int m, int panel_begin, int panel_end,
              float* const* out) {
  for (int panel = panel_begin; panel < panel_end; ++panel)
    ForPanel<kFormat>(w, rows, m, panel,
                      [&](int r, const __m512(&sums)[2]) { StorePanel(out[r], w.n, panel, sums); });
}

void Matmul(const PackedMatrix& w, const void* const* rows, int m, int panel_begin, int panel_end,
            float* const* out) {
  if (w.format == WeightFormat::kInt4)
    return MatmulAs<WeightFormat::kInt4>(w, rows, m, panel_begin, panel_end, out);
  MatmulAs<WeightFormat::kInt8>(w, rows, m, panel_begin, panel_end, out);
}

template <WeightFormat kFormat>
void FillPanels(const PackedMatrix& w, const void* const* rows, int m, int panel_begin, int panel_end,
                float* to, int stride) {
  for (int panel = panel_begin; panel < panel_end; ++panel, to += kPanel)
    ForPanel<kFormat>(w, rows, m, panel, [&](int r, const __m512(&sums)[2]) {
      _mm512_store_ps(to + r * stride, sums[0]);
      _mm512_store_ps(to + r * stride + 16, sums[1]);
    });
}

void GateUp(const PackedMatrix& gate, const PackedMatrix& up, const Activation& activation,
            const void* const* rows, int m, int panel_begin, int panel_end, void* const* out) {
  GateUpBlocks(
      gate, up, activation, rows, m, panel_begin, panel_end, out,
      gate.format == WeightFormat::kInt4 ? FillPanels<WeightFormat::kInt4> : FillPanels<WeightFormat::kInt8>);
}

void PackGroups(const float* values, WeightFormat format, int first_lane, std::byte* group) {
  QuantizeGroupsBody(values, format, first_lane, group);
}

}  // namespace

QuantizedKernels VnniQuantizedKernels() {
  return {PackGroups, Quantize, Matmul, GateUp};
}

}  // namespace elasticmoe::compute
