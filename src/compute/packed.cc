#include "compute/packed.h"

#include <bit>
#include <cstring>

namespace elasticmoe::compute {
namespace {

float HalfToFloat(std::uint16_t half) {
  const std::uint32_t sign = std::uint32_t(half & 0x8000u) << 16;
  std::uint32_t exponent = (half >> 10) & 0x1f;
  std::uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0x1f) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    if (mantissa == 0) return std::bit_cast<float>(sign);
    exponent = 1;
    while ((mantissa & 0x400u) == 0) {
      mantissa <<= 1;
      --exponent;
    }
    mantissa &= 0x3ffu;
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

template <class T>
T LoadAt(const void* source, std::size_t index) {
  T value;
  std::memcpy(&value, static_cast<const std::byte*>(source) + index * sizeof(T), sizeof(T));
  return value;
}

Bf16 LoadBf16(const void* source, DType type, std::size_t index) {
  switch (type) {
    case DType::kBf16:
      return LoadAt<Bf16>(source, index);
    case DType::kF16:
      return ToBf16(HalfToFloat(LoadAt<std::uint16_t>(source, index)));
    case DType::kF32:
      return ToBf16(LoadAt<float>(source, index));
  }
  return 0;
}

}  // namespace

void PackRows(const void* source, DType type, int row_begin, int rows, int k, Bf16* packed) {
  const std::size_t pairs = static_cast<std::size_t>((k + 1) / 2);
  for (int row = 0; row < rows; ++row) {
    const int output = row_begin + row;
    Bf16* out = packed + (output / kPanel) * pairs * kPanel * 2 + (output % kPanel) * 2;
    if (type == DType::kBf16) {  // the common case moves a pair at a time
      const std::byte* in = static_cast<const std::byte*>(source) + std::size_t(row) * k * 2;
      for (int pair = 0; pair < k / 2; ++pair)
        std::memcpy(out + std::size_t(pair) * kPanel * 2, in + pair * 4, 4);
      if (k % 2 != 0) {
        std::memcpy(out + (pairs - 1) * kPanel * 2, in + (k - 1) * 2, 2);
        out[(pairs - 1) * kPanel * 2 + 1] = 0;
      }
      continue;
    }
    for (int i = 0; i < k; ++i)
      out[std::size_t(i / 2) * kPanel * 2 + i % 2] = LoadBf16(source, type, std::size_t(row) * k + i);
    if (k % 2 != 0) out[(pairs - 1) * kPanel * 2 + 1] = 0;
  }
}

void PackColumn(const void* source, DType type, int column, int n, int k, Bf16* packed) {
  const std::size_t pairs = static_cast<std::size_t>((k + 1) / 2);
  for (int i = 0; i < n; ++i)
    packed[((i / kPanel) * pairs + column / 2) * kPanel * 2 + (i % kPanel) * 2 + column % 2] =
        LoadBf16(source, type, i);
}

void ConvertToFloat(const void* source, DType type, std::size_t count, float* out) {
  for (std::size_t i = 0; i < count; ++i) {
    switch (type) {
      case DType::kBf16:
        out[i] = ToFloat(LoadAt<Bf16>(source, i));
        break;
      case DType::kF16:
        out[i] = HalfToFloat(LoadAt<std::uint16_t>(source, i));
        break;
      case DType::kF32:
        out[i] = LoadAt<float>(source, i);
        break;
    }
  }
}

void UnpackRow(const PackedMatrix& matrix, int row, float* out) {
  const std::size_t pairs = static_cast<std::size_t>((matrix.k + 1) / 2);
  const Bf16* in = matrix.data + (row / kPanel) * pairs * kPanel * 2 + (row % kPanel) * 2;
  for (int i = 0; i < matrix.k; ++i) out[i] = ToFloat(in[std::size_t(i / 2) * kPanel * 2 + i % 2]);
}

}  // namespace elasticmoe::compute
