// int8 and int4 products on AMX tiles (TDPBSUD): a group of 64 inputs of a packed panel is two tiles of
// weights as it stands, so one tile product makes a group's exact sums of 16 rows and 16 outputs; the rest is
// as in quantized_vnni.cc, to the last bit. Few rows, which only wait for memory, go there.
#include <algorithm>
#include <cstring>

#include "compute/amx_tiles.h"
#include "compute/kernel_tables.h"
#include "compute/quantized_avx512.h"

namespace elasticmoe::compute {
namespace {

// Rows below which VNNI is as fast: unpacking int4 to bytes pays later.
constexpr int LeastRows(WeightFormat format) {
  return format == WeightFormat::kInt4 ? 24 : 8;
}
constexpr int kTileRows = 16;

// The groups [0, count) of a panel as unsigned bytes, however they were stored.
struct Groups {
  const std::byte* quads = nullptr;  // of the first group: [16 quads][32 outputs][4] uint8
  std::size_t quads_stride = 0;      // from a group to the next
  const std::byte* scales = nullptr;
  std::size_t scales_stride = 0;
  int count = 0;
};

// Groups that are unpacked at a time.
constexpr int kSlice = 16;
struct alignas(64) Unpacked {
  std::byte quads[kSlice][kPanel * kGroup];
};

Groups Take(const std::byte* panel, WeightFormat format, int begin, int count, Unpacked& unpacked) {
  const std::size_t stride = GroupBytes(format);
  Groups groups{panel + begin * stride + kPanel * sizeof(Bf16), stride, panel + begin * stride, stride,
                count};
  if (format == WeightFormat::kInt8) return groups;
  for (int group = 0; group < count; ++group) {
    const std::byte* from = groups.quads + group * stride;
    for (int pair = 0; pair < kQuads / 2; ++pair) {
      __m512i w[2][2];
      LoadWeights<WeightFormat::kInt4>(from, pair, w);
      for (int quad = 0; quad < 2; ++quad)
        for (int half = 0; half < 2; ++half)
          _mm512_store_si512(unpacked.quads[group] + (pair * 2 + quad) * kPanel * 4 + half * 64,
                             w[quad][half]);
    }
  }
  Settle(&unpacked);
  groups.quads = unpacked.quads[0];
  groups.quads_stride = sizeof(unpacked.quads[0]);
  return groups;
}

// Exact sums of a group: up to 32 rows x the 32 outputs of a panel.
struct alignas(64) Products {
  std::int32_t values[2 * kTileRows][kPanel];
};

// Tiles 0-3: sums (upper rows: 0-1, lower rows: 2-3), 4-5 activations, 6-7 weights.
void Configure(int rows) {
  TileConfig config;
  const int upper = std::min(rows, kTileRows), lower = std::max(rows - kTileRows, 1);
  for (const int tile : {0, 1, 4}) config.Shape(tile, upper, 64);
  for (const int tile : {2, 3, 5}) config.Shape(tile, lower, 64);
  for (const int tile : {6, 7}) config.Shape(tile, kQuads, 64);
  config.Load();
}

[[gnu::always_inline]] inline void Multiply(const std::byte* quads, const std::byte* rows,
                                            std::ptrdiff_t stride, bool lower, Products& to) {
  constexpr int kQuadBytes = kPanel * 4, kOutBytes = kPanel * sizeof(std::int32_t);
  _tile_zero(0);
  _tile_zero(1);
  _tile_loadd(6, quads, kQuadBytes);
  _tile_loadd(4, rows, stride);
  _tile_dpbsud(0, 4, 6);
  _tile_loadd(7, quads + 64, kQuadBytes);
  _tile_dpbsud(1, 4, 7);
  if (lower) {
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(5, rows + kTileRows * stride, stride);
    _tile_dpbsud(2, 5, 6);
    _tile_dpbsud(3, 5, 7);
  }
  _tile_stored(0, to.values[0], kOutBytes);
  _tile_stored(1, to.values[0] + 16, kOutBytes);
  if (lower) {
    _tile_stored(2, to.values[kTileRows], kOutBytes);
    _tile_stored(3, to.values[kTileRows] + 16, kOutBytes);
  }
}

// Adds groups [first, first + groups.count) of `m` <= 32 rows x a panel to sums, one row of 32 every `stride`
// floats; the first group of all starts them. REQUIRES: Configure(m).
void AddGroups(const Groups& groups, int first, const EvenRows& rows, int m, int all_groups, float* sums,
               int stride) {
  Products products[2];
  const auto multiply = [&](int group) {
    Multiply(groups.quads + group * groups.quads_stride, rows.base + std::size_t(first + group) * kGroup,
             rows.stride, m > kTileRows, products[group % 2]);
  };
  const std::byte* const scales_of_rows = rows.base + std::size_t(all_groups) * kGroup;
  multiply(0);
  for (int group = 0; group < groups.count; ++group) {
    // A group's sums are taken up while the next one's are made: tile stores are slow to be read back.
    if (group + 1 < groups.count) multiply(group + 1);
    const auto* scales = reinterpret_cast<const __m256i*>(groups.scales + group * groups.scales_stride);
    const __m512 low = FloatOf(_mm256_loadu_si256(scales)), high = FloatOf(_mm256_loadu_si256(scales + 1));
    const std::byte* of_row = scales_of_rows + std::size_t(first + group) * sizeof(float);
    for (int r = 0; r < m; ++r, of_row += rows.stride) {
      const __m512 scale = _mm512_set1_ps(*reinterpret_cast<const float*>(of_row));
      const __m512i offset = _mm512_set1_epi32(
          *reinterpret_cast<const std::int32_t*>(of_row + std::size_t(all_groups) * sizeof(float)));
      float* to = sums + r * stride;
      const std::int32_t* product = products[group % 2].values[r];
      const __m512 before[2] = {_mm512_load_ps(to), _mm512_load_ps(to + 16)};
      const __m512 exact[2] = {_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_load_si512(product), offset)),
                               _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_load_si512(product + 16), offset))};
      _mm512_store_ps(to, _mm512_fmadd_ps(exact[0], _mm512_mul_ps(low, scale), before[0]));
      _mm512_store_ps(to + 16, _mm512_fmadd_ps(exact[1], _mm512_mul_ps(high, scale), before[1]));
    }
  }
}

// sums[i * stride + ...] = row i x the 32 outputs of a panel, for up to kBlockRows rows.
void PanelSums(const PackedMatrix& w, int panel, EvenRows rows, int m, float* sums, int stride) {
  const int all = GroupsOf(w.k);
  const __m512 zero = _mm512_setzero_ps();
  for (int r = 0; r < m; ++r) {
    _mm512_store_ps(sums + r * stride, zero);
    _mm512_store_ps(sums + r * stride + 16, zero);
  }
  Unpacked unpacked;
  for (int first = 0; first < all; first += kSlice) {
    const Groups groups = Take(w.Panel(panel), w.format, first, std::min(kSlice, all - first), unpacked);
    int configured = 0;
    for (int row = 0; row < m; row += 2 * kTileRows) {
      const int count = std::min(2 * kTileRows, m - row);
      if (count != configured) Configure(configured = count);
      AddGroups(groups, first, {rows.base + row * rows.stride, rows.stride}, count, all, sums + row * stride,
                stride);
    }
  }
}

void Matmul(const PackedMatrix& w, const void* const* rows, int m, int panel_begin, int panel_end,
            float* const* out) {
  EvenRows even;
  if (m < LeastRows(w.format) || !FindStride(rows, m, even))
    return VnniQuantizedKernels().matmul(w, rows, m, panel_begin, panel_end, out);
  alignas(64) float sums[kBlockRows][kPanel];
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    const int count = std::min(kPanel, w.n - panel * kPanel);
    for (int begin = 0; begin < m; begin += kBlockRows) {
      const int block = std::min(kBlockRows, m - begin);
      PanelSums(w, panel, {even.base + begin * even.stride, even.stride}, block, sums[0], kPanel);
      for (int r = 0; r < block; ++r) {
        float* to = out[begin + r] + panel * kPanel;
        _mm512_mask_storeu_ps(to, FirstLanes(count), _mm512_load_ps(sums[r]));
        if (count > 16) _mm512_mask_storeu_ps(to + 16, FirstLanes(count - 16), _mm512_load_ps(sums[r] + 16));
      }
    }
  }
  _tile_release();
}

void GateUp(const PackedMatrix& gate, const PackedMatrix& up, const Activation& activation,
            const void* const* rows, int m, int panel_begin, int panel_end, void* const* out) {
  EvenRows even;
  if (m < LeastRows(gate.format) || !FindStride(rows, m, even))
    return VnniQuantizedKernels().gate_up(gate, up, activation, rows, m, panel_begin, panel_end, out);
  GateUpBlocks(gate, up, activation, rows, m, panel_begin, panel_end, out,
               [&](const PackedMatrix& w, const void* const* some, int count, int first, int last, float* to,
                   int stride) {
                 const EvenRows block{static_cast<const std::byte*>(some[0]), even.stride};
                 for (int panel = first; panel < last; ++panel)
                   PanelSums(w, panel, block, count, to + (panel - first) * kPanel, stride);
               });
  _tile_release();
}

}  // namespace

QuantizedKernels AmxQuantizedKernels() {
  QuantizedKernels amx = VnniQuantizedKernels();
  amx.matmul = Matmul;
  amx.gate_up = GateUp;
  return amx;
}

}  // namespace elasticmoe::compute
