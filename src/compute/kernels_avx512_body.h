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

// Rows x one panel: acc[row][2 registers]. All loops over constants are unrolled.
template <int kRows, bool kAhead>
inline void Accumulate(const Bf16* w, const Bf16* const* x, int k, __m512 (&acc)[kRows][2]) {
  for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_ps();
  const int pairs = k / 2;
  for (int i = 0; i < pairs; ++i, w += kPanel * 2) {
    const __m512i low = _mm512_loadu_si512(w), high = _mm512_loadu_si512(w + 32);
    if constexpr (kAhead) FetchAhead(w), FetchAhead(w + 32);
    for (int r = 0; r < kRows; ++r) {
      std::uint32_t both;
      std::memcpy(&both, x[r] + 2 * i, 4);
      const __m512i pair = _mm512_set1_epi32(static_cast<int>(both));
      acc[r][0] = DotBf16(acc[r][0], low, pair);
      acc[r][1] = DotBf16(acc[r][1], high, pair);
    }
  }
  if (k % 2 == 0) return;
  for (int r = 0; r < kRows; ++r) {
    const __m512i pair = PairOf(x[r], pairs, k);
    acc[r][0] = DotBf16(acc[r][0], _mm512_loadu_si512(w), pair);
    acc[r][1] = DotBf16(acc[r][1], _mm512_loadu_si512(w + 32), pair);
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

// Rows a tile: 12 x 2 sums + 2 weights fit the 32 registers.
constexpr int kTileRows = 12;
// One panel at a time: read front to back, a matrix is one stream.
template <int kRows>
[[gnu::always_inline]] inline void AccumulatePanel(const PackedMatrix& w, const void* const* rows, int panel,
                                                   bool ahead, __m512 (&acc)[kRows][2]) {
  const Bf16* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = static_cast<const Bf16*>(rows[r]);
  if (ahead)
    Accumulate<kRows, true>(PanelOf(w, panel), x, w.k, acc);
  else
    Accumulate<kRows, false>(PanelOf(w, panel), x, w.k, acc);
}

void Matmul(const PackedMatrix& w, const void* const* rows, int m, int panel_begin, int panel_end,
            float* const* out) {
  const int least_ahead = RowsToFetchAhead().bf16;
  for (int panel = panel_begin; panel < panel_end; ++panel) {  // for all rows, while it stays in cache
    ForTiles<kTileRows>(m, [&](int first, auto count, bool cold) {
      __m512 acc[count()][2];
      AccumulatePanel(w, rows + first, panel, cold && count() >= least_ahead, acc);
      for (int r = 0; r < count(); ++r) StorePanel(out[first + r], w.n, panel, acc[r]);
    });
  }
}

void GateUp(const PackedMatrix& gate, const PackedMatrix& up, const Activation& activation,
            const void* const* rows, int m, int panel_begin, int panel_end, void* const* out) {
  const int least_ahead = RowsToFetchAhead().bf16;
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    ForTiles<kTileRows>(m, [&](int first, auto count, bool cold) {
      __m512 gates[count()][2], ups[count()][2];
      const bool ahead = cold && count() >= least_ahead;
      AccumulatePanel(gate, rows + first, panel, ahead, gates);
      AccumulatePanel(up, rows + first, panel, ahead, ups);
      for (int r = 0; r < count(); ++r)
        for (int half = 0; half < 2; ++half)
          StoreActivated(activation, gates[r][half], ups[r][half], panel * kPanel + half * 16, gate.n,
                         static_cast<Bf16*>(out[first + r]));
    });
  }
}

// A tile of the router: each logit is one register of 16 partial sums, added up in one fixed tree. Left to
// itself GCC 12 keeps a loop over the sums, and then the sums in memory.
template <int kRows, int kExperts>
void RouterTile(const float* x, const float* w, int experts, int hidden, float* logits) {
  constexpr int kSums = kRows * kExperts;
  __m512 acc[kSums];
#pragma GCC unroll 16
  for (int s = 0; s < kSums; ++s) acc[s] = _mm512_setzero_ps();
  for (int i = 0; i < hidden; i += 16) {
    const __mmask16 lanes = FirstLanes(hidden - i);
    __m512 in[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) in[r] = _mm512_maskz_loadu_ps(lanes, x + std::size_t(r) * hidden + i);
#pragma GCC unroll 16
    for (int s = 0; s < kSums; ++s)
      acc[s] = _mm512_fmadd_ps(in[s % kRows],
                               _mm512_maskz_loadu_ps(lanes, w + std::size_t(s / kRows) * hidden + i), acc[s]);
  }
#pragma GCC unroll 16
  for (int s = 0; s < kSums; ++s)
    logits[std::size_t(s % kRows) * experts + s / kRows] = _mm512_reduce_add_ps(acc[s]);
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
