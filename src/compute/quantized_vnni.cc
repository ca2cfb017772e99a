// int8 and int4 products by VPDPBUSD: unsigned weights times signed activations into int32, a group of 64
// inputs at a time; then float32, in an order that no number of rows changes. Compiled with the instruction
// set; reached only through kernels.cc after the machine was asked.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "compute/kernel_tables.h"
#include "compute/quantized_row.h"
#include "compute/simd_avx512.h"

namespace elasticmoe::compute {
namespace {

constexpr int kQuads = kGroup / 4;

// kGroup values, as four registers, into group `group` of a row.
inline void QuantizeGroup(const __m512 (&values)[4], int group, const QuantizedRowOut& out) {
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

// What the rows of a block wait in until two panels, a group of the output, are done.
constexpr int kBlockRows = 48;
struct alignas(64) GateUpBlock {
  float gate[kBlockRows][kGroup];
  float up[kBlockRows][kGroup];
};

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

template <WeightFormat kFormat>
void GateUpAs(const PackedMatrix& gate, const PackedMatrix& up, const void* const* rows, int m,
              int panel_begin, int panel_end, void* const* out) {
  const int groups_out = GroupsOf(gate.n);
  GateUpBlock block;
  for (int panel = panel_begin; panel < panel_end; panel += 2) {
    for (int begin = 0; begin < m; begin += kBlockRows) {
      const int count = std::min(kBlockRows, m - begin);
      GateUpPanel<kFormat>(gate, up, rows + begin, count, panel, 0, block);
      if (panel + 1 < panel_end) GateUpPanel<kFormat>(gate, up, rows + begin, count, panel + 1, 1, block);
      const int valid = std::min(kGroup, gate.n - panel * kPanel);
      for (int r = 0; r < count; ++r) {
        __m512 values[4];
        for (int i = 0; i < 4; ++i) {
          values[i] = Silu(_mm512_load_ps(block.gate[r] + i * 16), _mm512_load_ps(block.up[r] + i * 16));
          values[i] = _mm512_maskz_mov_ps(FirstLanes(std::max(0, valid - i * 16)), values[i]);
        }
        QuantizeGroup(values, panel / 2, QuantizedRowOut::At(out[begin + r], groups_out));
      }
    }
  }
}

void GateUp(const PackedMatrix& gate, const PackedMatrix& up, const void* const* rows, int m, int panel_begin,
            int panel_end, void* const* out) {
  if (gate.format == WeightFormat::kInt4)
    return GateUpAs<WeightFormat::kInt4>(gate, up, rows, m, panel_begin, panel_end, out);
  GateUpAs<WeightFormat::kInt8>(gate, up, rows, m, panel_begin, panel_end, out);
}

}  // namespace

QuantizedKernels VnniQuantizedKernels() {
  return {Quantize, Matmul, GateUp};
}

}  // namespace elasticmoe::compute
