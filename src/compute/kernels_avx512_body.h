// The AVX512 tables, for kernels_avx512.cc and kernels_avx512bf16.cc to compile: activations bf16, products
// by VDPBF16PS where the machine has it, else two multiplications of float32. A panel's 32 outputs are two
// registers; each output is one lane that adds its pairs of inputs front to back, for one row as for twelve.
#pragma once

#include <algorithm>
#include <cstring>

#include "compute/attend_avx512.h"
#include "compute/kernel_tables.h"
#include "compute/simd_avx512.h"

namespace elasticmoe::compute {
namespace {

// The pair of inputs (2 pair, 2 pair + 1) in every lane; a missing last input is zero.
inline __m512i PairOf(const Bf16* x, int pair, int k) {
  std::uint32_t both;
  if (2 * pair + 1 < k) {
    std::memcpy(&both, x + 2 * pair, 4);
  } else {
    both = x[2 * pair];
  }
  return _mm512_set1_epi32(static_cast<int>(both));
}

// Rows x panels of one tile: acc[row][panel][2 registers]. All loops over constants are unrolled.
template <int kRows, int kPanels>
inline void Accumulate(const Bf16* const (&w)[kPanels], const Bf16* const* x, int k,
                       __m512 (&acc)[kRows][kPanels][2]) {
  for (int r = 0; r < kRows; ++r)
    for (int p = 0; p < kPanels; ++p) acc[r][p][0] = acc[r][p][1] = _mm512_setzero_ps();
  const int pairs = k / 2;
  for (int i = 0; i < pairs; ++i) {
    __m512i weights[kPanels][2];
    for (int p = 0; p < kPanels; ++p) {
      const Bf16* at = w[p] + std::size_t(i) * kPanel * 2;
      weights[p][0] = _mm512_loadu_si512(at);
      weights[p][1] = _mm512_loadu_si512(at + 32);
    }
    for (int r = 0; r < kRows; ++r) {
      std::uint32_t both;
      std::memcpy(&both, x[r] + 2 * i, 4);
      const __m512i pair = _mm512_set1_epi32(static_cast<int>(both));
      for (int p = 0; p < kPanels; ++p) {
        acc[r][p][0] = DotBf16(acc[r][p][0], weights[p][0], pair);
        acc[r][p][1] = DotBf16(acc[r][p][1], weights[p][1], pair);
      }
    }
  }
  if (k % 2 != 0) {
    for (int r = 0; r < kRows; ++r) {
      const __m512i pair = PairOf(x[r], pairs, k);
      for (int p = 0; p < kPanels; ++p) {
        const Bf16* at = w[p] + std::size_t(pairs) * kPanel * 2;
        acc[r][p][0] = DotBf16(acc[r][p][0], _mm512_loadu_si512(at), pair);
        acc[r][p][1] = DotBf16(acc[r][p][1], _mm512_loadu_si512(at + 32), pair);
      }
    }
  }
}

inline void StorePanel(float* out, int n, int panel, const __m512 (&acc)[2]) {
  for (int half = 0; half < 2; ++half) {
    const int begin = panel * kPanel + half * 16;
    if (begin + 16 <= n) {
      _mm512_storeu_ps(out + begin, acc[half]);
    } else if (begin < n) {
      _mm512_mask_storeu_ps(out + begin, static_cast<__mmask16>((1u << (n - begin)) - 1), acc[half]);
    }
  }
}

// One panel at a time: read front to back and by nothing but the loads, the matrix is one stream, which
// machines fetch ahead faster than two side by side or than prefetches ask for it.
template <int kRows>
void MatmulTile(const PackedMatrix& w, const void* const* rows, int panel, float* const* out) {
  const Bf16* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = static_cast<const Bf16*>(rows[r]);
  const Bf16* const panels[1] = {PanelOf(w, panel)};
  __m512 acc[kRows][1][2];
  Accumulate<kRows, 1>(panels, x, w.k, acc);
  for (int r = 0; r < kRows; ++r) StorePanel(out[r], w.n, panel, acc[r][0]);
}

template <int kRows>
void MatmulRows(const PackedMatrix& w, const void* const* rows, int panel_begin, int panel_end,
                float* const* out) {
  for (int panel = panel_begin; panel < panel_end; ++panel) MatmulTile<kRows>(w, rows, panel, out);
}

// Rows a tile: 12 x 2 sums + 2 weights fit the 32 registers.
constexpr int kMatmulRows = 12;

void Matmul(const PackedMatrix& w, const void* const* rows, int m, int panel_begin, int panel_end,
            float* const* out) {
  if (m > kMatmulRows) {  // panel by panel, so that a panel stays in cache for all rows
    for (int panel = panel_begin; panel < panel_end; ++panel) {
      int r = 0;
      for (; r + kMatmulRows <= m; r += kMatmulRows) MatmulTile<kMatmulRows>(w, rows + r, panel, out + r);
      if (r < m) Matmul(w, rows + r, m - r, panel, panel + 1, out + r);
    }
    return;
  }
  switch (m) {
    case 1:
      return MatmulRows<1>(w, rows, panel_begin, panel_end, out);
    case 2:
      return MatmulRows<2>(w, rows, panel_begin, panel_end, out);
    case 3:
      return MatmulRows<3>(w, rows, panel_begin, panel_end, out);
    case 4:
      return MatmulRows<4>(w, rows, panel_begin, panel_end, out);
    case 5:
      return MatmulRows<5>(w, rows, panel_begin, panel_end, out);
    case 6:
      return MatmulRows<6>(w, rows, panel_begin, panel_end, out);
    case 7:
      return MatmulRows<7>(w, rows, panel_begin, panel_end, out);
    case 8:
      return MatmulRows<8>(w, rows, panel_begin, panel_end, out);
    case 9:
      return MatmulRows<9>(w, rows, panel_begin, panel_end, out);
    case 10:
      return MatmulRows<10>(w, rows, panel_begin, panel_end, out);
    case 11:
      return MatmulRows<11>(w, rows, panel_begin, panel_end, out);
    case 12:
      return MatmulRows<12>(w, rows, panel_begin, panel_end, out);
    default:
      return;
  }
}

template <int kRows>
void GateUpTile(const PackedMatrix& gate, const PackedMatrix& up, const Activation& activation,
                const void* const* rows, int panel, void* const* out) {
  const Bf16* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = static_cast<const Bf16*>(rows[r]);
  const Bf16* panels[2] = {PanelOf(gate, panel), PanelOf(up, panel)};
  __m512 acc[kRows][2][2];
  Accumulate<kRows, 2>(panels, x, gate.k, acc);
  for (int r = 0; r < kRows; ++r) {
    for (int half = 0; half < 2; ++half)
      StoreActivated(activation, acc[r][0][half], acc[r][1][half], panel * kPanel + half * 16, gate.n,
                     static_cast<Bf16*>(out[r]));
  }
}

constexpr int kGateUpRows = 6;  // 6 x 4 sums + 4 weights

void GateUp(const PackedMatrix& gate, const PackedMatrix& up, const Activation& activation,
            const void* const* rows, int m, int panel_begin, int panel_end, void* const* out) {
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    for (int r = 0; r < m;) {
      const int left = std::min(kGateUpRows, m - r);
      switch (left) {
        case 1:
          GateUpTile<1>(gate, up, activation, rows + r, panel, out + r);
          break;
        case 2:
          GateUpTile<2>(gate, up, activation, rows + r, panel, out + r);
          break;
        case 3:
          GateUpTile<3>(gate, up, activation, rows + r, panel, out + r);
          break;
        case 4:
          GateUpTile<4>(gate, up, activation, rows + r, panel, out + r);
          break;
        case 5:
          GateUpTile<5>(gate, up, activation, rows + r, panel, out + r);
          break;
        default:
          GateUpTile<6>(gate, up, activation, rows + r, panel, out + r);
          break;
      }
      r += left;
    }
  }
}

// A tile of the router: each logit is one register of 16 partial sums, added up in one fixed tree.
template <int kRows, int kExperts>
void RouterTile(const float* x, const float* w, int experts, int hidden, float* logits) {
  __m512 acc[kRows][kExperts];
  for (int r = 0; r < kRows; ++r)
    for (int e = 0; e < kExperts; ++e) acc[r][e] = _mm512_setzero_ps();
  for (int i = 0; i < hidden; i += 16) {
    const __mmask16 lanes = FirstLanes(hidden - i);
    __m512 in[kRows];
    for (int r = 0; r < kRows; ++r) in[r] = _mm512_maskz_loadu_ps(lanes, x + std::size_t(r) * hidden + i);
    for (int e = 0; e < kExperts; ++e) {
      const __m512 weight = _mm512_maskz_loadu_ps(lanes, w + std::size_t(e) * hidden + i);
      for (int r = 0; r < kRows; ++r) acc[r][e] = _mm512_fmadd_ps(in[r], weight, acc[r][e]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int e = 0; e < kExperts; ++e) logits[std::size_t(r) * experts + e] = _mm512_reduce_add_ps(acc[r][e]);
}

template <int kRows>
void RouterRows(const float* x, const float* w, int experts, int hidden, float* logits) {
  int e = 0;
  for (; e + 4 <= experts; e += 4)
    RouterTile<kRows, 4>(x, w + std::size_t(e) * hidden, experts, hidden, logits + e);
  for (; e < experts; ++e) RouterTile<kRows, 1>(x, w + std::size_t(e) * hidden, experts, hidden, logits + e);
}

void Router(const float* x, int m, const float* w, int experts, int hidden, float* logits) {
  int r = 0;
  for (; r + 4 <= m; r += 4)
    RouterRows<4>(x + std::size_t(r) * hidden, w, experts, hidden, logits + std::size_t(r) * experts);
  for (; r < m; ++r)
    RouterRows<1>(x + std::size_t(r) * hidden, w, experts, hidden, logits + std::size_t(r) * experts);
}

Kernels TableOf(std::string_view name, const QuantizedKernels& quantized) {
  return {name, 2, 2, false, ToActivation, Matmul, GateUp, Router, StoreKv, Attend, quantized};
}

}  // namespace
}  // namespace elasticmoe::compute
