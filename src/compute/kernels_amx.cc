// AMX-BF16: products by TDPBF16PS on 16 x 16 tiles, attention too (attend_amx.cc), everything else as
// avx512bf16. A panel's packed weights are two tile columns as they stand (rows of 16 pairs, 128 bytes
// apart). Each output adds its pairs front to back, 16 pairs a tile, whether 1 or 32 rows share the tiles:
// the last, shorter tile of k is filled up with zeros, which add nothing.
//
// Tiles: 0-3 sums, 4-5 activations, 6-7 (and 5) weights. A call leaves no tile state behind, so that a thread
// that sleeps has none to save.
#include <cstring>

#include "compute/amx_tiles.h"
#include "compute/kernel_tables.h"
#include "compute/simd_avx512.h"

namespace elasticmoe::compute {
namespace {

constexpr int kTileRows = 16;
constexpr int kTileK = 32;  // inputs a tile: 64 bytes of activations, 16 pairs of weights
constexpr int kTileStep = kTileK / 2 * kPanel * 2;  // of weights, elements
constexpr int kWeightStride = kPanel * 2 * sizeof(Bf16);

// Shapes the tiles for a block of `rows` in [1, 32] rows: up to 16 rows with two panels side by side (sums
// 0-1 | 2-3), or 17 to 32 rows with one panel (sums 0-1 above 2-3).
void Configure(int rows) {
  TileConfig config;
  const int upper = std::min(rows, kTileRows);
  const int lower = rows > kTileRows ? rows - kTileRows : upper;
  for (const int tile : {0, 1, 4}) config.Shape(tile, upper, 64);
  for (const int tile : {2, 3}) config.Shape(tile, lower, 64);
  config.Shape(5, rows > kTileRows ? lower : kTileRows, 64);
  for (const int tile : {6, 7}) config.Shape(tile, kTileRows, 64);
  config.Load();
}

// Inputs [begin, begin + count) of the rows, count <= 32, zeros after them.
struct alignas(64) ActivationTile {
  Bf16 values[2 * kTileRows][kTileK];
  void Fill(const void* const* rows, int m, int begin, int count) {
    if (count < kTileK) std::memset(values, 0, sizeof(values));
    for (int i = 0; i < m; ++i)
      std::memcpy(values[i], static_cast<const Bf16*>(rows[i]) + begin, std::size_t(count) * sizeof(Bf16));
    Settle(this);
  }
};

// `pairs` < 16 pairs of a panel, zeros after them.
struct alignas(64) WeightTile {
  Bf16 values[kTileRows][kPanel * 2];
  void Fill(const Bf16* from, int pairs) {
    std::memset(values, 0, sizeof(values));
    std::memcpy(values, from, std::size_t(pairs) * kWeightStride);
    Settle(this);
  }
};

[[gnu::always_inline]] inline void StepTwoPanels(const void* x, std::ptrdiff_t stride, const Bf16* first,
                                                 const Bf16* second) {
  _tile_loadd(4, x, stride);
  _tile_loadd(6, first, kWeightStride);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, first + 32, kWeightStride);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, second, kWeightStride);
  _tile_dpbf16ps(2, 4, 5);
  _tile_loadd(6, second + 32, kWeightStride);
  _tile_dpbf16ps(3, 4, 6);
}

[[gnu::always_inline]] inline void StepTwoRowTiles(const void* x, std::ptrdiff_t stride, const Bf16* panel) {
  _tile_loadd(4, x, stride);
  _tile_loadd(6, panel, kWeightStride);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, panel + 32, kWeightStride);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, static_cast<const std::byte*>(x) + kTileRows * stride, stride);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// Sums of a block of rows: [32 rows][32 outputs], or [16 rows][2 panels][32].
struct alignas(64) Sums {
  float values[2 * kTileRows * kPanel];
};

// A block of up to 32 rows, of whatever distance to each other.
class RowBlock {
 public:
  RowBlock() = default;
  RowBlock(const void* const* rows, int m) : rows_(rows), m_(m), even_(FindStride(rows, m, where_)) {}
  int Size() const { return m_; }

  // Two panels for up to 16 rows. REQUIRES: Configure(Size()).
  void TwoPanels(const Bf16* first, const Bf16* second, int k, Sums& sums) const {
    ZeroSums();
    const int whole = k / kTileK;
    for (int i = 0; i < whole; ++i) {
      const Bf16* a = first + std::size_t(i) * kTileStep;
      const Bf16* b = second + std::size_t(i) * kTileStep;
      for (int line = 0; line < kTileStep; line += 32) {
        _mm_prefetch(reinterpret_cast<const char*>(a + kTileStep + line), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(b + kTileStep + line), _MM_HINT_T0);
      }
      if (even_) {
        StepTwoPanels(where_.base + std::size_t(i) * 64, where_.stride, a, b);
      } else {
        ActivationTile x;
        x.Fill(rows_, m_, i * kTileK, kTileK);
        StepTwoPanels(&x, 64, a, b);
      }
    }
    if (const int left = k % kTileK; left != 0) {
      ActivationTile x;
      WeightTile a, b;
      x.Fill(rows_, m_, whole * kTileK, left);
      a.Fill(first + std::size_t(whole) * kTileStep, (left + 1) / 2);
      b.Fill(second + std::size_t(whole) * kTileStep, (left + 1) / 2);
      StepTwoPanels(&x, 64, &a.values[0][0], &b.values[0][0]);
    }
    constexpr int kStride = 2 * kPanel * sizeof(float);
    _tile_stored(0, sums.values, kStride);
    _tile_stored(1, sums.values + 16, kStride);
    _tile_stored(2, sums.values + 32, kStride);
    _tile_stored(3, sums.values + 48, kStride);
  }

  // Adds inputs [begin, end) of one panel for 17 to 32 rows to sums (begin 0 starts them). `begin` is a
  // multiple of 32. REQUIRES: Configure(Size()).
  void OnePanel(const Bf16* panel, int begin, int end, Sums& sums) const {
    constexpr int kStride = kPanel * sizeof(float);
    if (begin == 0) {
      ZeroSums();
    } else {
      _tile_loadd(0, sums.values, kStride);
      _tile_loadd(1, sums.values + 16, kStride);
      _tile_loadd(2, sums.values + kTileRows * kPanel, kStride);
      _tile_loadd(3, sums.values + kTileRows * kPanel + 16, kStride);
    }
    const int whole = end / kTileK;
    for (int i = begin / kTileK; i < whole; ++i) {
      const Bf16* w = panel + std::size_t(i) * kTileStep;
      for (int line = 0; line < kTileStep; line += 32)
        _mm_prefetch(reinterpret_cast<const char*>(w + kTileStep + line), _MM_HINT_T0);
      if (even_) {
        StepTwoRowTiles(where_.base + std::size_t(i) * 64, where_.stride, w);
      } else {
        ActivationTile x;
        x.Fill(rows_, m_, i * kTileK, kTileK);
        StepTwoRowTiles(&x, 64, w);
      }
    }
    if (const int left = end % kTileK; left != 0) {
      ActivationTile x;
      WeightTile w;
      x.Fill(rows_, m_, whole * kTileK, left);
      w.Fill(panel + std::size_t(whole) * kTileStep, (left + 1) / 2);
      StepTwoRowTiles(&x, 64, &w.values[0][0]);
    }
    _tile_stored(0, sums.values, kStride);
    _tile_stored(1, sums.values + 16, kStride);
    _tile_stored(2, sums.values + kTileRows * kPanel, kStride);
    _tile_stored(3, sums.values + kTileRows * kPanel + 16, kStride);
  }

 private:
  static void ZeroSums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }

  const void* const* rows_ = nullptr;
  int m_ = 0;
  EvenRows where_;
  bool even_ = false;
};

// Row blocks that pass by a panel together. A slice of the panel (16 KiB) stays in the first-level cache for
// all of them; their sums wait in memory meanwhile, which changes no bit of them.
constexpr int kGroupBlocks = 16;
struct Group {
  RowBlock blocks[kGroupBlocks];
  int count = 0;
  int first_row = 0;

  int Size(int block) const { return blocks[block].Size(); }
  // REQUIRES: Size(0) > 16, Configure(Size(0)), all blocks of one size.
  void Multiply(const Bf16* panel, int k, Sums* sums) const {
    constexpr int kSlice = 8 * kTileK;
    for (int begin = 0; begin < k; begin += kSlice)
      for (int b = 0; b < count; ++b) blocks[b].OnePanel(panel, begin, std::min(k, begin + kSlice), sums[b]);
  }
};

// Calls body(group, first panel, last panel) so that all pairs of row and panel are met, tiles configured.
// Panels go in groups that stay in the second-level cache while rows pass by in groups that do too.
template <class Body>
void ForGroups(const void* const* rows, int m, int k, int panel_begin, int panel_end, const Body& body) {
  constexpr std::size_t kCachedBytes = 768 << 10;
  constexpr int kBlockRows = 2 * kTileRows;
  const std::size_t panel_bytes = std::size_t(k + 1) / 2 * kWeightStride;
  const int panels = static_cast<int>(std::max<std::size_t>(2, kCachedBytes / panel_bytes / 2 * 2));
  const int blocks = static_cast<int>(
      std::clamp<std::size_t>(kCachedBytes / (std::size_t(k) * sizeof(Bf16) * kBlockRows), 1, kGroupBlocks));
  const int whole = m / kBlockRows;
  Group group;
  for (int panel = panel_begin; panel < panel_end; panel += panels) {
    const int last_panel = std::min(panel_end, panel + panels);
    if (whole > 0) Configure(kBlockRows);
    for (int block = 0; block < whole; block += blocks) {
      group.first_row = block * kBlockRows;
      group.count = std::min(blocks, whole - block);
      for (int b = 0; b < group.count; ++b)
        group.blocks[b] = RowBlock(rows + (block + b) * kBlockRows, kBlockRows);
      body(group, panel, last_panel);
    }
    if (const int left = m - whole * kBlockRows; left > 0) {
      Configure(left);
      group.first_row = whole * kBlockRows;
      group.count = 1;
      group.blocks[0] = RowBlock(rows + group.first_row, left);
      body(group, panel, last_panel);
    }
  }
  _tile_release();
}

void Matmul(const PackedMatrix& w, const void* const* rows, int m, int panel_begin, int panel_end,
            float* const* out) {
  Sums sums[kGroupBlocks];
  const auto store = [&](int row, int panel, const float* values) {
    const int count = std::min(kPanel, w.n - panel * kPanel);
    float* to = out[row] + panel * kPanel;
    _mm512_mask_storeu_ps(to, FirstLanes(count), _mm512_load_ps(values));
    if (count > 16) _mm512_mask_storeu_ps(to + 16, FirstLanes(count - 16), _mm512_load_ps(values + 16));
  };
  ForGroups(rows, m, w.k, panel_begin, panel_end, [&](const Group& group, int first_panel, int last_panel) {
    for (int panel = first_panel; panel < last_panel;) {
      int row = group.first_row;
      if (group.Size(0) > kTileRows) {
        group.Multiply(PanelOf(w, panel), w.k, sums);
        for (int b = 0; b < group.count; ++b)
          for (int i = 0; i < group.Size(b); ++i) store(row++, panel, sums[b].values + i * kPanel);
        ++panel;
        continue;
      }
      // A panel left alone is computed twice, side by side with itself.
      const int second = std::min(panel + 1, last_panel - 1);
      group.blocks[0].TwoPanels(PanelOf(w, panel), PanelOf(w, second), w.k, sums[0]);
      for (int i = 0; i < group.Size(0); ++i, ++row) {
        store(row, panel, sums[0].values + i * 2 * kPanel);
        store(row, second, sums[0].values + i * 2 * kPanel + kPanel);
      }
      panel += 2;
    }
  });
}

void GateUp(const PackedMatrix& gate, const PackedMatrix& up, const Activation& activation,
            const void* const* rows, int m, int panel_begin, int panel_end, void* const* out) {
  Sums gates[kGroupBlocks], ups[kGroupBlocks];
  const auto store = [&](int row, int panel, const float* g, const float* u) {
    for (int half = 0; half < kPanel; half += 16)
      StoreActivated(activation, _mm512_load_ps(g + half), _mm512_load_ps(u + half), panel * kPanel + half,
                     gate.n, static_cast<Bf16*>(out[row]));
  };
  ForGroups(rows, m, gate.k, panel_begin, panel_end,
            [&](const Group& group, int first_panel, int last_panel) {
              for (int panel = first_panel; panel < last_panel; ++panel) {
                int row = group.first_row;
                if (group.Size(0) > kTileRows) {
                  group.Multiply(PanelOf(gate, panel), gate.k, gates);
                  group.Multiply(PanelOf(up, panel), gate.k, ups);
                  for (int b = 0; b < group.count; ++b)
                    for (int i = 0; i < group.Size(b); ++i)
                      store(row++, panel, gates[b].values + i * kPanel, ups[b].values + i * kPanel);
                } else {
                  group.blocks[0].TwoPanels(PanelOf(gate, panel), PanelOf(up, panel), gate.k, gates[0]);
                  for (int i = 0; i < group.Size(0); ++i)
                    store(row++, panel, gates[0].values + i * 2 * kPanel,
                          gates[0].values + i * 2 * kPanel + kPanel);
                }
              }
            });
}

}  // namespace

const Kernels& AmxBf16Kernels() {
  static const Kernels table = [] {
    Kernels amx = Avx512Bf16Kernels();
    amx.name = "amxbf16";
    amx.wants_even_rows = true;
    amx.matmul = Matmul;
    amx.gate_up = GateUp;
    amx.quantized = AmxQuantizedKernels();
    amx.store_kv = AmxAttention().store_kv;
    amx.attend = AmxAttention().attend;
    return amx;
  }();
  return table;
}

}  // namespace elasticmoe::compute
