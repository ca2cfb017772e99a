// Weight matrices packed for all kernels alike, once, while loading.
//
// W [n outputs, k inputs] (row-major in the checkpoint) becomes panels of 32 outputs. A kernel walks a panel
// front to back, so memory is read in order, at M = 1 as at M = 512.
//
// bf16: [ceil(n / 32)][ceil(k / 2)][32][2] bf16, pairs of neighbouring inputs side by side (the operand order
// of VDPBF16PS), zeros where n or k end early.
//
// int8: [ceil(n / 32)][ceil(k / 64)] groups of
//   scale [32] bf16, then [16 quads of inputs][32 outputs][4] uint8 = q + 128
// (the operand order of VPDPBUSD), w = scale * q, q in [-127, 127]. An output beyond n has scale 0, an input
// beyond k has q = 0.
//
// int4: the same with [8 pairs of quads][32 outputs][4] uint8: the low nibble is the first quad's q + 8, the
// high nibble the second one's, q in [-8, 7]. `scale` is a sixteenth of the weight's: kernels take the nibble
// as the upper half of a byte, 16 q + 128, so that they unpack with a mask alone.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "core/spec.h"
#include "model/dtype.h"

namespace elasticmoe::compute {

inline constexpr int kPanel = 32;          // outputs a panel
inline constexpr std::size_t kAlign = 64;  // of every tensor inside its blob, bytes

using Bf16 = std::uint16_t;  // upper half of an IEEE float32

using core::WeightFormat;
using model::DType;

inline constexpr int kGroup = 64;  // inputs that share a scale
constexpr int GroupsOf(int k) {
  return (k + kGroup - 1) / kGroup;
}
// Of one group of one panel, scales included.
constexpr std::size_t GroupBytes(WeightFormat format) {
  return kPanel * sizeof(Bf16) + kPanel * kGroup / (format == WeightFormat::kInt4 ? 2 : 1);
}
constexpr std::size_t PanelBytes(int k, WeightFormat format) {
  return format == WeightFormat::kBf16 ? static_cast<std::size_t>((k + 1) / 2) * kPanel * 2 * sizeof(Bf16)
                                       : GroupsOf(k) * GroupBytes(format);
}
constexpr std::size_t PackedBytes(int n, int k, WeightFormat format = WeightFormat::kBf16) {
  return static_cast<std::size_t>((n + kPanel - 1) / kPanel) * PanelBytes(k, format);
}

// View of a packed matrix; does not own.
struct PackedMatrix {
  const void* data = nullptr;
  int n = 0;
  int k = 0;
  WeightFormat format = WeightFormat::kBf16;

  [[gnu::always_inline]] const std::byte* Panel(int panel) const {
    return static_cast<const std::byte*>(data) + panel * PanelBytes(k, format);
  }
  std::size_t Bytes() const { return PackedBytes(n, k, format); }
};

// Always inlined: a copy compiled for one instruction set must never be linked into code for all machines.
[[gnu::always_inline]] inline float ToFloat(Bf16 value) {
  return std::bit_cast<float>(std::uint32_t{value} << 16);
}

// Rounds to nearest even; NaN stays NaN.
[[gnu::always_inline]] inline Bf16 ToBf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<Bf16>((bits >> 16) | 0x40u);  // quiet
  return static_cast<Bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Packs rows [row_begin, row_begin + rows) of a matrix of n_total outputs whose packed form starts at
// `packed`. `source` holds those rows only, row-major, `rows * k` values of `type`, any alignment.
// Rows never written stay as they are: zero `packed` first where n_total is no multiple of 32.
void PackRows(const void* source, DType type, int row_begin, int rows, int k, void* packed,
              WeightFormat format = WeightFormat::kBf16);

// Packs one column of a matrix [n, k]: packed W[i][column] = source[i] for i in [0, n), so that rows of a
// tensor become columns and what is packed is its transpose. A column never written stays as it is. bf16
// only.
void PackColumn(const void* source, DType type, int column, int n, int k, Bf16* packed);

// count values to float32 (norm weights, router).
void ConvertToFloat(const void* source, DType type, std::size_t count, float* out);

// out[k] = row `row` of the matrix: what the packed form stands for, exactly.
void UnpackRow(const PackedMatrix& matrix, int row, float* out);

}  // namespace elasticmoe::compute
