// How products are cut into pieces for threads. Pure.
#pragma once

#include <algorithm>
#include <cstddef>

#include "compute/packed.h"

namespace elasticmoe::compute {

constexpr int PanelsOf(int n) {
  return (n + kPanel - 1) / kPanel;
}

// Work that is worth another thread's hand: ~2 us of reading weights, a few times what handing it out costs.
inline constexpr std::size_t kPieceBytes = 64 << 10;

// Rows whose products take as long as reading the weights for them (where the kernels turn from memory to
// compute).
inline constexpr std::size_t kFreeRows = 12;

// What running `rows` rows through `panels` panels of k inputs costs, in bytes of weights read from memory.
constexpr std::size_t CostOf(int panels, int k, std::size_t rows) {
  return PackedBytes(panels * kPanel, k) * std::max<std::size_t>(1, rows / kFreeRows);
}

}  // namespace elasticmoe::compute
