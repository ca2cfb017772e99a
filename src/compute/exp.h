// e^x in float32 for code that is compiled for all machines: the same bits everywhere (libm's differ between
// versions and instruction sets), and plain enough for the compiler to vectorise. Pure.
#pragma once

#include <bit>
#include <cstdint>

namespace elasticmoe::compute {

// 2^n * p(r), Cephes' polynomial on [-ln2/2, ln2/2]; error below 2 ulp. 0 below -87; e^88 above 88; NaN gives
// 0.
[[gnu::always_inline]] inline float Exp(float x) {
  constexpr float kMagic = 0x1.8p23F;  // adding it rounds to an integer, which lands in the low mantissa bits
  const bool some = x >= -87.0F;
  x = some ? x : -87.0F;
  x = x < 88.0F ? x : 88.0F;
  const float shifted = x * 1.44269504F + kMagic;
  const float n = shifted - kMagic;
  float r = x - n * 0.693359375F;  // ln 2 in two parts, the first exact times n
  r = r - n * -2.12194440e-4F;
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * (r * r) + (r + 1.0F);
  const std::int32_t power = std::bit_cast<std::int32_t>(shifted) - std::bit_cast<std::int32_t>(kMagic) + 127;
  return some ? p * std::bit_cast<float>(power << 23) : 0.0F;
}

// 8 at once, each with the bits of its own; for loops that the compiler does not vectorise by itself. By
// reference: how such types are passed by value depends on the instruction set.
inline constexpr int kExpLanes = 8;
using FloatLanes [[gnu::vector_size(kExpLanes * sizeof(float))]] = float;
using IntLanes [[gnu::vector_size(kExpLanes * sizeof(std::int32_t))]] = std::int32_t;

[[gnu::always_inline]] inline void Exp(const FloatLanes& in, FloatLanes& out) {
  constexpr float kMagic = 0x1.8p23F;
  const IntLanes some = in >= -87.0F;
  FloatLanes x = some ? in : FloatLanes{} - 87.0F;
  x = x < 88.0F ? x : FloatLanes{} + 88.0F;
  const FloatLanes shifted = x * 1.44269504F + kMagic;
  const FloatLanes n = shifted - kMagic;
  FloatLanes r = x - n * 0.693359375F;
  r = r - n * -2.12194440e-4F;
  FloatLanes p = r * 1.9875691500e-4F + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * (r * r) + (r + 1.0F);
  const IntLanes power = (IntLanes)shifted - std::bit_cast<std::int32_t>(kMagic) + 127;
  out = (FloatLanes)(some & (IntLanes)(p * (FloatLanes)(power << 23)));
}

}  // namespace elasticmoe::compute
