// Small parts that the AMX tables share. For those files only, as simd_avx512.h. A call leaves no tile state
// behind, so that a thread that sleeps has none to save.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace elasticmoe::compute {

// The compiler sees no read of memory in a tile load: what was written must be there before it.
[[gnu::always_inline]] inline void Settle(const void* written) {
  asm volatile("" ::"r"(written) : "memory");
}

struct alignas(64) TileConfig {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t column_bytes[16] = {};
  std::uint8_t rows[16] = {};

  void Shape(int tile, int tile_rows, int bytes) {
    rows[tile] = static_cast<std::uint8_t>(tile_rows);
    column_bytes[tile] = static_cast<std::uint16_t>(bytes);
  }
  [[gnu::always_inline]] void Load() const {
    Settle(this);
    _tile_loadconfig(this);
  }
};

// Rows of activations at one distance from each other, as tile loads want them.
struct EvenRows {
  const std::byte* base = nullptr;
  std::ptrdiff_t stride = 64;
};

// False where they are not.
[[gnu::always_inline]] inline bool FindStride(const void* const* rows, int m, EvenRows& even) {
  even.base = static_cast<const std::byte*>(rows[0]);
  if (m > 1) even.stride = static_cast<const std::byte*>(rows[1]) - even.base;
  for (int i = 2; i < m; ++i)
    if (static_cast<const std::byte*>(rows[i]) - static_cast<const std::byte*>(rows[i - 1]) != even.stride)
      return false;
  return true;
}

}  // namespace elasticmoe::compute
