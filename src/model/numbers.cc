#include "model/numbers.h"

#include <array>
#include <bit>
#include <cmath>
#include <limits>

namespace elasticmoe::model {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::array<float, 256> MakeF8E4M3() {
  std::array<float, 256> table{};
  for (unsigned bits = 0; bits < table.size(); ++bits) {
    const int exponent = static_cast<int>(bits >> 3 & 15);
    const int mantissa = static_cast<int>(bits & 7);
    const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                     : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
    table[bits] = (bits & 0x7f) == 0x7f ? kNan : bits >= 0x80 ? -size : size;
  }
  return table;
}

}  // namespace

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

std::uint16_t FloatToHalf(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  if (std::isnan(value)) return sign | 0x7e00u;
  const float size = std::fabs(value);
  if (size >= 65520.0F) return sign | 0x7c00u;  // halfway between the largest half and the next
  // In units of the result's last place, which is exact; rint rounds to nearest even.
  if (size < 0x1p-14F)
    return static_cast<std::uint16_t>(sign | static_cast<unsigned>(std::rint(size * 0x1p24F)));
  int exponent = 0;
  std::frexp(size, &exponent);
  const auto units = static_cast<unsigned>(std::rint(std::ldexp(size, 11 - exponent)));
  // The leading bit of 1024 to 2048 units carries into the exponent by itself.
  return static_cast<std::uint16_t>(sign | ((static_cast<unsigned>(exponent + 13) << 10) + units));
}

std::uint16_t FloatToBf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (std::isnan(value)) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

float F8E4M3ToFloat(std::uint8_t bits) {
  static const std::array<float, 256> table = MakeF8E4M3();
  return table[bits];
}

float F4E2M1ToFloat(std::uint8_t bits) {
  constexpr std::array<float, 16> kTable = {0.0F,  0.5F,  1.0F,  1.5F,  2.0F,  3.0F,  4.0F,  6.0F,
                                            -0.0F, -0.5F, -1.0F, -1.5F, -2.0F, -3.0F, -4.0F, -6.0F};
  return kTable[bits & 15];
}

float E8M0ToFloat(std::uint8_t bits) {
  return bits == 0xff ? kNan : std::ldexp(1.0F, bits - 127);
}

}  // namespace elasticmoe::model
