// int8 and int4 products by VPDPBUSD: unsigned weights times signed activations into int32, a group of 64
// inputs at a time; then float32, in an order that no number of rows changes. Compiled with the instruction
// set; reached only through kernels.cc after the machine was asked.
#include <algorithm>
#include <cstring>
#include <type_traits>

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

// sums[row][panel][half] = rows x panels, over all groups.
template <WeightFormat kFormat, int kRows, int kPanels>
[[gnu::always_inline]] inline void Accumulate(const std::byte* const (&panels)[kPanels],
                                              const QuantizedRow (&x)[kRows], int groups,
                                              __m512 (&sums)[kRows][kPanels][2]) {
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kPanels; ++p) sums[r][p][0] = sums[r][p][1] = _mm512_setzero_ps();
  for (int group = 0; group < groups; ++group) {
    __m512i acc[kRows][kPanels][2];
    for (int r = 0; r < kRows; ++r)
      for (int p = 0; p < kPanels; ++p) acc[r][p][0] = acc[r][p][1] = _mm512_set1_epi32(x[r].offsets[group]);
    const std::size_t at = std::size_t(group) * GroupBytes(kFormat);
#pragma GCC unroll 8
    for (int pair = 0; pair < kQuads / 2; ++pair) {
      __m512i w[kPanels][2][2];
      for (int p = 0; p < kPanels; ++p) {
        const std::byte* quads = panels[p] + at + kPanel * sizeof(Bf16);
        LoadWeights<kFormat>(quads, pair, w[p]);
        if constexpr (kRows <= 3) {
          constexpr int kPairBytes = (kFormat == WeightFormat::kInt8 ? 4 : 2) * kPanel * 2;
          for (int line = 0; line < kPairBytes; line += 64)
            _mm_prefetch(reinterpret_cast<const char*>(quads) + 2048 + pair * kPairBytes + line, _MM_HINT_T0);
        }
      }
      for (int quad = 0; quad < 2; ++quad) {
        for (int r = 0; r < kRows; ++r) {
          std::int32_t four;
          std::memcpy(&four, x[r].values + std::size_t(group) * kGroup + (pair * 2 + quad) * 4, 4);
          const __m512i in = _mm512_set1_epi32(four);
          for (int p = 0; p < kPanels; ++p) {
            acc[r][p][0] = _mm512_dpbusd_epi32(acc[r][p][0], w[p][quad][0], in);
            acc[r][p][1] = _mm512_dpbusd_epi32(acc[r][p][1], w[p][quad][1], in);
          }
        }
      }
    }
    for (int p = 0; p < kPanels; ++p) {
      const auto* scales = reinterpret_cast<const __m256i*>(panels[p] + at);
      const __m512 low = FloatOf(_mm256_loadu_si256(scales)), high = FloatOf(_mm256_loadu_si256(scales + 1));
      for (int r = 0; r < kRows; ++r) {
        const __m512 scale = _mm512_set1_ps(x[r].scales[group]);
        sums[r][p][0] =
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][p][0]), _mm512_mul_ps(low, scale), sums[r][p][0]);
        sums[r][p][1] =
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][p][1]), _mm512_mul_ps(high, scale), sums[r][p][1]);
      }
    }
  }
}

// Rows of one panel that share its loads: 6 x 2 integer and as many float sums fit the 32 registers.
constexpr int kTileRows = 6;
// Up to so many rows take two panels side by side: enough independent sums to hide the latency.
constexpr int kPairedRows = 3;

// Calls body with the constant of `rows` in [1, kTileRows].
template <class Body>
[[gnu::always_inline]] inline void ForRows(int rows, const Body& body) {
  switch (rows) {
    case 1:
      return body(std::integral_constant<int, 1>());
    case 2:
      return body(std::integral_constant<int, 2>());
    case 3:
      return body(std::integral_constant<int, 3>());
    case 4:
      return body(std::integral_constant<int, 4>());
    case 5:
      return body(std::integral_constant<int, 5>());
    default:
      return body(std::integral_constant<int, 6>());
  }
}

inline void StorePanel(float* out, int n, int panel, const __m512 (&sums)[2]) {
  for (int half = 0; half < 2; ++half) {
    const int begin = panel * kPanel + half * 16;
    if (begin < n) _mm512_mask_storeu_ps(out + begin, FirstLanes(n - begin), sums[half]);
  }
}

template <WeightFormat kFormat, int kRows, int kPanels>
void MatmulTile(const PackedMatrix& w, const void* const* rows, int panel, float* const* out) {
  const int groups = GroupsOf(w.k);
  QuantizedRow x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = QuantizedRow::At(rows[r], groups);
  const std::byte* panels[kPanels];
  for (int p = 0; p < kPanels; ++p) panels[p] = w.Panel(panel + p);
  __m512 sums[kRows][kPanels][2];
  Accumulate<kFormat>(panels, x, groups, sums);
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kPanels; ++p) StorePanel(out[r], w.n, panel + p, sums[r][p]);
}

template <WeightFormat kFormat>
void MatmulAs(const PackedMatrix& w, const void* const* rows, int m, int panel_begin, int panel_end,
              float* const* out) {
  int panel = panel_begin;
  if (m <= kPairedRows)
    for (; panel + 2 <= panel_end; panel += 2)
      ForRows(m, [&](auto count) {
        if constexpr (count() <= kPairedRows) MatmulTile<kFormat, count(), 2>(w, rows, panel, out);
      });
  for (; panel < panel_end; ++panel)  // a panel stays in cache for all rows
    for (int r = 0; r < m; r += kTileRows)
      ForRows(std::min(kTileRows, m - r),
              [&](auto count) { MatmulTile<kFormat, count(), 1>(w, rows + r, panel, out + r); });
}

void Matmul(const PackedMatrix& w, const void* const* rows, int m, int panel_begin, int panel_end,
            float* const* out) {
  if (w.format == WeightFormat::kInt4)
    return MatmulAs<WeightFormat::kInt4>(w, rows, m, panel_begin, panel_end, out);
  MatmulAs<WeightFormat::kInt8>(w, rows, m, panel_begin, panel_end, out);
}

template <WeightFormat kFormat>
void GateUpPanel(const PackedMatrix& gate, const PackedMatrix& up, const void* const* rows, int m, int panel,
                 int half, GateUpBlock& block) {
  const int groups = GroupsOf(gate.k);
  const std::byte* const both[2] = {gate.Panel(panel), up.Panel(panel)};
  const auto store = [&](const __m512(&sums)[2], float* to) {
    _mm512_store_ps(to + half * kPanel, sums[0]);
    _mm512_store_ps(to + half * kPanel + 16, sums[1]);
  };
  if (m <= kPairedRows) {
    ForRows(m, [&](auto count) {
      if constexpr (count() <= kPairedRows) {
        QuantizedRow x[count()];
        for (int r = 0; r < count(); ++r) x[r] = QuantizedRow::At(rows[r], groups);
        __m512 sums[count()][2][2];
        Accumulate<kFormat>(both, x, groups, sums);
        for (int r = 0; r < count(); ++r) {
          store(sums[r][0], block.gate[r]);
          store(sums[r][1], block.up[r]);
        }
      }
    });
    return;
  }
  for (int which = 0; which < 2; ++which) {
    const std::byte* const one[1] = {both[which]};
    auto& to = which == 0 ? block.gate : block.up;
    for (int begin = 0; begin < m; begin += kTileRows)
      ForRows(std::min(kTileRows, m - begin), [&](auto count) {
        QuantizedRow x[count()];
        for (int r = 0; r < count(); ++r) x[r] = QuantizedRow::At(rows[begin + r], groups);
        __m512 sums[count()][1][2];
        Accumulate<kFormat>(one, x, groups, sums);
        for (int r = 0; r < count(); ++r) store(sums[r][0], to[begin + r]);
      });
  }
}

void GateUp(const PackedMatrix& gate, const PackedMatrix& up, const Activation& activation,
            const void* const* rows, int m, int panel_begin, int panel_end, void* const* out) {
  GateUpBlocks(gate, activation, rows, m, panel_begin, panel_end, out,
               [&](const void* const* block_rows, int count, int panel, int half, GateUpBlock& block) {
                 if (gate.format == WeightFormat::kInt4) {
                   GateUpPanel<WeightFormat::kInt4>(gate, up, block_rows, count, panel, half, block);
                 } else {
                   GateUpPanel<WeightFormat::kInt8>(gate, up, block_rows, count, panel, half, block);
                 }
               });
}

void PackGroup(const float* values, WeightFormat format, int lane, std::byte* group) {
  QuantizeGroupBody(values, format, lane, group);
}

}  // namespace

QuantizedKernels VnniQuantizedKernels() {
  return {PackGroup, Quantize, Matmul, GateUp};
}

}  // namespace elasticmoe::compute
