#include "compute/packed.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <vector>

#include "compute/quantize.h"
#include "model/numbers.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

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

// bf16 rows as they are, a pair of neighbouring inputs at a time.
void CopyPairs(const std::byte* in, int k, Bf16* out) {
  const std::size_t pairs = static_cast<std::size_t>((k + 1) / 2);
  for (int pair = 0; pair < k / 2; ++pair)
    std::memcpy(out + std::size_t(pair) * kPanel * 2, in + pair * 4, 4);
  if (k % 2 != 0) {
    std::memcpy(out + (pairs - 1) * kPanel * 2, in + (k - 1) * 2, 2);
    out[(pairs - 1) * kPanel * 2 + 1] = 0;
  }
}

#if defined(__SSE2__)
// A whole panel of bf16 rows. 32 pairs are two cache lines of each row, and 4 KiB of the panel that fill the
// L1 cache while the rows' lines come by four at a time: read whole, and once (rows of a power-of-two length
// would push each other out). They go on past the caches, which have no use for them before everything is
// packed. REQUIRES: `out` is a multiple of 16 bytes. The caller fences.
void CopyPanel(const std::byte* in, int k, Bf16* out) {
  constexpr int kPairs = 32;
  alignas(64) std::array<Bf16, kPairs * kPanel * 2> block;
  const std::size_t row_bytes = std::size_t(k) * sizeof(Bf16);
  const int whole = k / 2 / kPairs * kPairs;
  for (int pair = 0; pair < whole; pair += kPairs) {
    for (int row = 0; row < kPanel; row += 4) {
      for (int i = 0; i < kPairs; i += 4) {
        const auto load = [&](int r) {
          return _mm_loadu_si128(
              reinterpret_cast<const __m128i*>(in + (row + r) * row_bytes + std::size_t(pair + i) * 4));
        };
        const auto store = [&](int p, __m128i value) {
          _mm_store_si128(reinterpret_cast<__m128i*>(&block[(i + p) * kPanel * 2 + row * 2]), value);
        };
        const __m128i a = load(0), b = load(1), c = load(2), d = load(3);
        const __m128i ab_low = _mm_unpacklo_epi32(a, b), ab_high = _mm_unpackhi_epi32(a, b);
        const __m128i cd_low = _mm_unpacklo_epi32(c, d), cd_high = _mm_unpackhi_epi32(c, d);
        store(0, _mm_unpacklo_epi64(ab_low, cd_low));
        store(1, _mm_unpackhi_epi64(ab_low, cd_low));
        store(2, _mm_unpacklo_epi64(ab_high, cd_high));
        store(3, _mm_unpackhi_epi64(ab_high, cd_high));
      }
    }
    const auto* from = reinterpret_cast<const __m128i*>(block.data());
    auto* to = reinterpret_cast<__m128i*>(out + std::size_t(pair) * kPanel * 2);
    for (std::size_t i = 0; i < sizeof(block) / sizeof(__m128i); ++i)
      _mm_stream_si128(to + i, _mm_load_si128(from + i));
  }
  if (whole * 2 == k) return;
  for (int row = 0; row < kPanel; ++row)
    CopyPairs(in + row * row_bytes + std::size_t(whole) * 4, k - whole * 2,
              out + std::size_t(whole) * kPanel * 2 + row * 2);
}
#endif

void PackBf16Rows(const void* source, DType type, int row_begin, int rows, int k, Bf16* packed) {
  const std::size_t pairs = static_cast<std::size_t>((k + 1) / 2);
  for (int row = 0; row < rows; ++row) {
    const int output = row_begin + row;
    Bf16* out = packed + (output / kPanel) * pairs * kPanel * 2 + (output % kPanel) * 2;
    const std::byte* in = static_cast<const std::byte*>(source) + std::size_t(row) * k * BytesOf(type);
    switch (type) {
      case DType::kBf16:
#if defined(__SSE2__)
        if (output % kPanel == 0 && rows - row >= kPanel && reinterpret_cast<std::uintptr_t>(out) % 16 == 0) {
          CopyPanel(in, k, out);
          row += kPanel - 1;
          break;
        }
#endif
        CopyPairs(in, k, out);
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
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Outputs [lane, lane + count) of a packed group.
void CopyLanes(const std::byte* from, WeightFormat format, int lane, int count, std::byte* to) {
  std::memcpy(to + lane * sizeof(Bf16), from + lane * sizeof(Bf16), count * sizeof(Bf16));
  const int quads = kGroup / (format == WeightFormat::kInt4 ? 8 : 4);
  for (int quad = 0; quad < quads; ++quad) {
    const std::size_t at = kPanel * sizeof(Bf16) + (std::size_t(quad) * kPanel + lane) * 4;
    std::memcpy(to + at, from + at, count * std::size_t{4});
  }
}

void PackQuantizedRows(const void* source, DType type, int row_begin, int rows, int k, std::byte* packed,
                       WeightFormat format) {
  alignas(64) std::array<float, kGroup * kPackLanes> values;  // [kGroup, kPackLanes]
  std::array<float, kGroup> row_values;
  std::array<std::byte, GroupBytes(WeightFormat::kInt8)> aside;  // of a group whose lanes are not all written
  for (int row = 0; row < rows;) {
    const int output = row_begin + row, first = output % kPackLanes;
    const int count = std::min(rows - row, kPackLanes - first);
    const int first_lane = output % kPanel - first;
    std::byte* group = packed + output / kPanel * PanelBytes(k, format);
    for (int begin = 0; begin < k; begin += kGroup, group += GroupBytes(format)) {
      const int present = std::min(kGroup, k - begin);
      if (count < kPackLanes || present < kGroup) values.fill(0);
      for (int i = 0; i < count; ++i) {
        const std::size_t at = (std::size_t(row) + i) * k + begin;
        ConvertToFloat(static_cast<const std::byte*>(source) + at * BytesOf(type), type, present,
                       row_values.data());
        for (int j = 0; j < present; ++j) values[j * kPackLanes + first + i] = row_values[j];
      }
      if (count == kPackLanes) {
        QuantizeGroups(values.data(), format, first_lane, group);
      } else {
        QuantizeGroups(values.data(), format, first_lane, aside.data());
        CopyLanes(aside.data(), format, first_lane + first, count, group);
      }
    }
    row += count;
  }
}

}  // namespace

void PackRows(const void* source, DType type, int row_begin, int rows, int k, void* packed,
              WeightFormat format) {
  if (format == WeightFormat::kBf16)
    return PackBf16Rows(source, type, row_begin, rows, k, static_cast<Bf16*>(packed));
  PackQuantizedRows(source, type, row_begin, rows, k, static_cast<std::byte*>(packed), format);
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
