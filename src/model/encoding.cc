#include "model/encoding.h"

#include <array>
#include <bit>
#include <cstring>

#include "base/check.h"
#include "model/numbers.h"

namespace elasticmoe::model {
namespace {

struct Row {
  std::string_view name;
  int block_values;
  int block_bytes;
};

constexpr std::array<Row, 22> kRows = {
    {{"bf16", 1, 2},     {"f16", 1, 2},       {"f32", 1, 4},      {"f8_e4m3", 1, 1},  {"f4_e2m1", 2, 1},
     {"e8m0", 1, 1},     {"u4", 2, 1},        {"u8", 1, 1},       {"i8", 1, 1},       {"q4_0", 32, 18},
     {"q4_1", 32, 20},   {"q5_0", 32, 22},    {"q5_1", 32, 24},   {"q8_0", 32, 34},   {"iq4_nl", 32, 18},
     {"mxfp4", 32, 17},  {"q2_k", 256, 84},   {"q3_k", 256, 110}, {"q4_k", 256, 144}, {"q5_k", 256, 176},
     {"q6_k", 256, 210}, {"iq4_xs", 256, 136}}};

const Row& RowOf(Encoding encoding) {
  return kRows[static_cast<std::size_t>(encoding)];
}

// The 16 levels of the non-linear 4-bit formats.
constexpr std::array<std::int8_t, 16> kIq4Levels = {-127, -104, -83, -65, -49, -35, -22, -10,
                                                    1,    13,   25,  38,  53,  69,  89,  113};

unsigned Byte(const std::byte* at, int i = 0) {
  return std::to_integer<unsigned>(at[i]);
}
int Signed(const std::byte* at, int i = 0) {
  return static_cast<std::int8_t>(Byte(at, i));
}
unsigned Word(const std::byte* at) {
  return Byte(at) | Byte(at, 1) << 8;
}
float Half(const std::byte* at) {
  return HalfToFloat(static_cast<std::uint16_t>(Word(at)));
}

// Blocks of 32: d, perhaps an offset m, perhaps the fifth bits, then 16 bytes whose low halves are values 0
// to 15 and high halves 16 to 31.
template <class Value>
void DecodeNibbles(const std::byte* nibbles, Value value, float* out) {
  for (int i = 0; i < 16; ++i) {
    const unsigned byte = Byte(nibbles, i);
    out[i] = value(byte & 15, i);
    out[i + 16] = value(byte >> 4, i + 16);
  }
}

void DecodeQ5(const std::byte* high, const std::byte* nibbles, float d, float add, float* out) {
  const unsigned bits = Word(high) | Word(high + 2) << 16;
  DecodeNibbles(
      nibbles, [&](unsigned q, int i) { return d * static_cast<float>(q | (bits >> i & 1) << 4) + add; },
      out);
}

void DecodeQ5Signed(const std::byte* high, const std::byte* nibbles, float d, float* out) {
  const unsigned bits = Word(high) | Word(high + 2) << 16;
  DecodeNibbles(
      nibbles,
      [&](unsigned q, int i) {
        return d * static_cast<float>(static_cast<int>(q | (bits >> i & 1) << 4) - 16);
      },
      out);
}

void DecodeQ2K(const std::byte* block, float* out) {
  const std::byte* scales = block;
  const std::byte* quants = block + 16;
  const float d = Half(block + 80), m = Half(block + 82);
  for (int i = 0; i < 256; ++i) {
    const unsigned scale = Byte(scales, i / 16);
    const unsigned q = Byte(quants, i / 128 * 32 + i % 32) >> (i % 128 / 32 * 2) & 3;
    out[i] = d * static_cast<float>(scale & 15) * static_cast<float>(q) - m * static_cast<float>(scale >> 4);
  }
}

void DecodeQ3K(const std::byte* block, float* out) {
  const std::byte* high = block;
  const std::byte* quants = block + 32;
  const std::byte* scales = block + 96;
  const float d = Half(block + 108);
  std::array<float, 16> scale;
  for (int j = 0; j < 16; ++j) {  // 16 scales of 6 bits in 12 bytes
    const unsigned low = j < 8 ? Byte(scales, j) & 15 : Byte(scales, j - 8) >> 4;
    const unsigned top = Byte(scales, 8 + j % 4) >> (j / 4 * 2) & 3;
    scale[j] = d * static_cast<float>(static_cast<int>(low | top << 4) - 32);
  }
  for (int i = 0; i < 256; ++i) {
    const unsigned q = Byte(quants, i / 128 * 32 + i % 32) >> (i % 128 / 32 * 2) & 3;
    const bool set = Byte(high, i % 32) >> (i / 32) & 1;
    out[i] = scale[i / 16] * static_cast<float>(static_cast<int>(q) - (set ? 0 : 4));
  }
}

// Scale and offset number j of 8, 6 bits each, in 12 bytes.
void ScaleAndMin(const std::byte* packed, int j, float& scale, float& min) {
  if (j < 4) {
    scale = static_cast<float>(Byte(packed, j) & 63);
    min = static_cast<float>(Byte(packed, j + 4) & 63);
  } else {
    scale = static_cast<float>((Byte(packed, j + 4) & 15) | Byte(packed, j - 4) >> 6 << 4);
    min = static_cast<float>(Byte(packed, j + 4) >> 4 | Byte(packed, j) >> 6 << 4);
  }
}

// q4_k and q5_k: 8 groups of 32, two of them in the halves of 32 bytes.
void DecodeQ45K(const std::byte* block, bool five, float* out) {
  const float d = Half(block), m = Half(block + 2);
  const std::byte* high = block + 16;
  const std::byte* quants = block + (five ? 48 : 16);
  for (int group = 0; group < 8; ++group) {
    float scale = 0, min = 0;
    ScaleAndMin(block + 4, group, scale, min);
    for (int i = 0; i < 32; ++i) {
      unsigned q = Byte(quants, group / 2 * 32 + i) >> (group % 2 * 4) & 15;
      if (five) q |= (Byte(high, i) >> group & 1) << 4;
      out[group * 32 + i] = d * scale * static_cast<float>(q) - m * min;
    }
  }
}

void DecodeQ6K(const std::byte* block, float* out) {
  const std::byte* high = block + 128;
  const std::byte* scales = block + 192;
  const float d = Half(block + 208);
  for (int i = 0; i < 256; ++i) {
    const int half = i / 128, part = i % 128 / 32, at = i % 32;
    const unsigned low = Byte(block, half * 64 + part % 2 * 32 + at) >> (part / 2 * 4) & 15;
    const unsigned top = Byte(high, half * 32 + at) >> (part * 2) & 3;
    out[i] = d * static_cast<float>(Signed(scales, i / 16)) *
             static_cast<float>(static_cast<int>(low | top << 4) - 32);
  }
}

void DecodeIq4Xs(const std::byte* block, float* out) {
  const float d = Half(block);
  const unsigned high = Word(block + 2);
  for (int group = 0; group < 8; ++group) {
    const unsigned low = Byte(block + 4, group / 2) >> (group % 2 * 4) & 15;
    const float scale = d * static_cast<float>(static_cast<int>(low | (high >> (2 * group) & 3) << 4) - 32);
    DecodeNibbles(
        block + 8 + group * 16, [&](unsigned q, int) { return scale * static_cast<float>(kIq4Levels[q]); },
        out + group * 32);
  }
}

void DecodeBlock(Encoding encoding, const std::byte* block, float* out) {
  switch (encoding) {
    case Encoding::kQ4_0: {
      const float d = Half(block);
      return DecodeNibbles(
          block + 2, [&](unsigned q, int) { return d * static_cast<float>(static_cast<int>(q) - 8); }, out);
    }
    case Encoding::kQ4_1: {
      const float d = Half(block), m = Half(block + 2);
      return DecodeNibbles(
          block + 4, [&](unsigned q, int) { return d * static_cast<float>(q) + m; }, out);
    }
    case Encoding::kQ5_0:
      return DecodeQ5Signed(block + 2, block + 6, Half(block), out);
    case Encoding::kQ5_1:
      return DecodeQ5(block + 4, block + 8, Half(block), Half(block + 2), out);
    case Encoding::kQ8_0: {
      const float d = Half(block);
      std::array<std::int8_t, 32> levels;
      std::memcpy(levels.data(), block + 2, levels.size());
      for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(levels[i]);
      return;
    }
    case Encoding::kIq4Nl: {
      const float d = Half(block);
      return DecodeNibbles(
          block + 2, [&](unsigned q, int) { return d * static_cast<float>(kIq4Levels[q]); }, out);
    }
    case Encoding::kMxfp4: {
      const float scale = E8M0ToFloat(static_cast<std::uint8_t>(Byte(block)));
      return DecodeNibbles(
          block + 1, [&](unsigned q, int) { return scale * F4E2M1ToFloat(static_cast<std::uint8_t>(q)); },
          out);
    }
    case Encoding::kQ2K:
      return DecodeQ2K(block, out);
    case Encoding::kQ3K:
      return DecodeQ3K(block, out);
    case Encoding::kQ4K:
      return DecodeQ45K(block, false, out);
    case Encoding::kQ5K:
      return DecodeQ45K(block, true, out);
    case Encoding::kQ6K:
      return DecodeQ6K(block, out);
    case Encoding::kIq4Xs:
      return DecodeIq4Xs(block, out);
    case Encoding::kBf16:
      *out = std::bit_cast<float>(Word(block) << 16);
      return;
    case Encoding::kF16:
      *out = Half(block);
      return;
    case Encoding::kF32:
      std::memcpy(out, block, sizeof(float));
      return;
    case Encoding::kF8E4M3:
      *out = F8E4M3ToFloat(static_cast<std::uint8_t>(Byte(block)));
      return;
    case Encoding::kF4E2M1:
      out[0] = F4E2M1ToFloat(static_cast<std::uint8_t>(Byte(block) & 15));
      out[1] = F4E2M1ToFloat(static_cast<std::uint8_t>(Byte(block) >> 4));
      return;
    case Encoding::kU4:
      out[0] = static_cast<float>(Byte(block) & 15);
      out[1] = static_cast<float>(Byte(block) >> 4);
      return;
    case Encoding::kU8:
      *out = static_cast<float>(Byte(block));
      return;
    case Encoding::kI8:
      *out = static_cast<float>(Signed(block));
      return;
    case Encoding::kE8M0:
      *out = E8M0ToFloat(static_cast<std::uint8_t>(Byte(block)));
      return;
  }
}

}  // namespace

std::string_view NameOf(Encoding encoding) {
  return RowOf(encoding).name;
}
int BlockValues(Encoding encoding) {
  return RowOf(encoding).block_values;
}
int BlockBytes(Encoding encoding) {
  return RowOf(encoding).block_bytes;
}

std::optional<DType> PlainType(Encoding encoding) {
  switch (encoding) {
    case Encoding::kBf16:
      return DType::kBf16;
    case Encoding::kF16:
      return DType::kF16;
    case Encoding::kF32:
      return DType::kF32;
    default:
      return std::nullopt;
  }
}

void Decode(Encoding encoding, const std::byte* data, std::size_t values, float* out) {
  const auto block_values = static_cast<std::size_t>(BlockValues(encoding));
  const auto block_bytes = static_cast<std::size_t>(BlockBytes(encoding));
  EM_CHECK(values % block_values == 0, "values={} block={}", values, block_values);
  for (; values > 0; values -= block_values, data += block_bytes, out += block_values)
    DecodeBlock(encoding, data, out);
}

}  // namespace elasticmoe::model
