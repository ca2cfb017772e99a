// The one weight format: bf16 matrices packed for all kernels alike, once, while loading.
//
// W [n outputs, k inputs] (row-major in the checkpoint) becomes panels of 32 outputs,
//   [ceil(n / 32)][ceil(k / 2)][32][2] bf16,
// pairs of neighbouring inputs side by side (the operand order of VDPBF16PS), zeros where n or k end early.
// A kernel walks a panel front to back, so memory is read in order, at M = 1 as at M = 512.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

#include "model/dtype.h"

namespace elasticmoe::compute {

inline constexpr int kPanel = 32;          // outputs a panel
inline constexpr std::size_t kAlign = 64;  // of every tensor inside its blob, bytes

using Bf16 = std::uint16_t;  // upper half of an IEEE float32

using model::DType;

// View of a packed matrix; does not own.
struct PackedMatrix {
  const Bf16* data = nullptr;
  int n = 0;
  int k = 0;
};

constexpr std::size_t PackedBytes(int n, int k) {
  return static_cast<std::size_t>((n + kPanel - 1) / kPanel) * ((k + 1) / 2) * kPanel * 2 * sizeof(Bf16);
}

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
void PackRows(const void* source, DType type, int row_begin, int rows, int k, Bf16* packed);

// Packs one column of a matrix [n, k]: packed W[i][column] = source[i] for i in [0, n), so that rows of a
// tensor become columns and what is packed is its transpose. A column never written stays as it is.
void PackColumn(const void* source, DType type, int column, int n, int k, Bf16* packed);

// count values to float32 (norm weights, router).
void ConvertToFloat(const void* source, DType type, std::size_t count, float* out);

// out[k] = row `row` of the matrix, exact.
void UnpackRow(const PackedMatrix& matrix, int row, float* out);

}  // namespace elasticmoe::compute
