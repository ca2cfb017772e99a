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

// What running `rows` rows through `panels` panels of a matrix costs, in bytes of weights read from memory.
inline std::size_t CostOf(const PackedMatrix& w, int panels, std::size_t rows) {
  // An int4 panel is half the bytes of an int8 one, and as much to compute.
  const std::size_t free_rows = w.format == WeightFormat::kInt4 ? kFreeRows / 2 : kFreeRows;
  return panels * PanelBytes(w.k, w.format) * std::max<std::size_t>(1, rows / free_rows);
}

}  // namespace elasticmoe::compute
