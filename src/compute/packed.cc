#include "compute/packed.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <vector>

#include "compute/quantize.h"
#include "model/numbers.h"

namespace elasticmoe::compute {
namespace {

using model::HalfToFloat;

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

// One row: pairs of inputs go to every kPanel-th pair of `out`.
template <class T, class Convert>
void PackRow(const std::byte* in, int k, Convert convert, Bf16* out) {
  for (int i = 0; i + 1 < k; i += 2, out += kPanel * 2) {
    out[0] = convert(LoadAt<T>(in, i));
    out[1] = convert(LoadAt<T>(in, i + 1));
  }
  if (k % 2 != 0) {
    out[0] = convert(LoadAt<T>(in, k - 1));
    out[1] = 0;
  }
}

void PackBf16Rows(const void* source, DType type, int row_begin, int rows, int k, Bf16* packed) {
  const std::size_t pairs = static_cast<std::size_t>((k + 1) / 2);
  for (int row = 0; row < rows; ++row) {
    const int output = row_begin + row;
    Bf16* out = packed + (output / kPanel) * pairs * kPanel * 2 + (output % kPanel) * 2;
    const std::byte* in = static_cast<const std::byte*>(source) + std::size_t(row) * k * BytesOf(type);
    switch (type) {
      case DType::kBf16:  // the common case moves a pair at a time
        for (int pair = 0; pair < k / 2; ++pair)
          std::memcpy(out + std::size_t(pair) * kPanel * 2, in + pair * 4, 4);
        if (k % 2 != 0) {
          std::memcpy(out + (pairs - 1) * kPanel * 2, in + (k - 1) * 2, 2);
          out[(pairs - 1) * kPanel * 2 + 1] = 0;
        }
        break;
      case DType::kF16:
        PackRow<std::uint16_t>(
            in, k, [](std::uint16_t half) { return ToBf16(HalfToFloat(half)); }, out);
        break;
      case DType::kF32:
        PackRow<float>(in, k, ToBf16, out);
        break;
    }
  }
}

}  // namespace

void PackRows(const void* source, DType type, int row_begin, int rows, int k, void* packed,
              WeightFormat format) {
  if (format == WeightFormat::kBf16) {
    PackBf16Rows(source, type, row_begin, rows, k, static_cast<Bf16*>(packed));
    return;
  }
  std::vector<float> values(std::size_t{kGroup} * GroupsOf(k));
  for (int row = 0; row < rows; ++row) {
    const int output = row_begin + row;
    ConvertToFloat(static_cast<const std::byte*>(source) + std::size_t(row) * k * BytesOf(type), type, k,
                   values.data());
    std::byte* group = static_cast<std::byte*>(packed) + output / kPanel * PanelBytes(k, format);
    for (int i = 0; i < k; i += kGroup, group += GroupBytes(format))
      QuantizeGroup(values.data() + i, format, output % kPanel, group);
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
  const std::byte* panel = matrix.Panel(row / kPanel);
  if (matrix.format == WeightFormat::kBf16) {
    const Bf16* in = reinterpret_cast<const Bf16*>(panel) + (row % kPanel) * 2;
    for (int i = 0; i < matrix.k; ++i) out[i] = ToFloat(in[std::size_t(i / 2) * kPanel * 2 + i % 2]);
    return;
  }
  for (int begin = 0; begin < matrix.k; begin += kGroup, panel += GroupBytes(matrix.format))
    for (int i = 0; i < std::min(kGroup, matrix.k - begin); ++i)
      out[begin + i] = StoredGroup{panel, matrix.format, row % kPanel}.Weight(i);
}

}  // namespace elasticmoe::compute
