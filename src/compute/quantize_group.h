// The body of QuantizeGroups (quantize.h) in plain C++, for the kernel tables to compile for their
// instruction sets: it is inlined where it is used, so that no copy of it can be linked into code for other
// machines. A lane is an output. Its sums run in kParts interleaved parts that are added in one order, and
// nothing is fused: the same bits whatever the compiler makes of the lanes.
#pragma once

#include <cstdint>
#include <cstring>

#include "compute/quantize.h"

namespace elasticmoe::compute {

inline constexpr int kParts = 16;
inline constexpr int kInt4Unit = 16;  // a stored int4 scale is this part of the weight's

// Lanes are passed by reference only: where a vector is wider than the machine's registers, there is no ABI
// for its value.
using FloatLanes = float __attribute__((vector_size(kPackLanes * 4)));
using IntLanes = std::int32_t __attribute__((vector_size(kPackLanes * 4)));

[[gnu::always_inline]] inline void LoadLanes(const float* from, FloatLanes& lanes) {
  std::memcpy(&lanes, from, sizeof(lanes));
}

[[gnu::always_inline]] inline void Magnitude(const FloatLanes& x, FloatLanes& magnitude) {
  magnitude = (FloatLanes)((IntLanes)x & 0x7fffffff);
}

// Rounded to the nearest integer, as a float, for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction.
[[gnu::always_inline]] inline void RoundInteger(FloatLanes& x) {
  constexpr float kShift = 12582912.0F;
  x = x + kShift;
  x = x - kShift;
}

[[gnu::always_inline]] inline void Clamp(float low, float high, FloatLanes& x) {
  const FloatLanes lows = low - FloatLanes{}, highs = high - FloatLanes{};
  x = x < lows ? lows : x;
  x = x > highs ? highs : x;
}

// The nearest bf16 (even of two), as the upper half of each lane; NaN stays NaN.
[[gnu::always_inline]] inline void ToBf16Lanes(const FloatLanes& x, IntLanes& bf16) {
  const IntLanes bits = (IntLanes)x;
  const IntLanes nan = (bits & 0x7fffffff) > 0x7f800000;
  // As unsigned numbers, which wrap.
  using Unsigned = std::uint32_t __attribute__((vector_size(kPackLanes * 4)));
  const Unsigned rounded = (Unsigned)bits + 0x7fffu + (((Unsigned)bits >> 16) & 1u);
  bf16 = (nan ? bits | 0x400000 : (IntLanes)rounded) & (std::int32_t)0xffff0000;
}

[[gnu::always_inline]] inline void StoreScales(const IntLanes& bf16, std::byte* group) {
  for (int lane = 0; lane < kPackLanes; ++lane) {
    const Bf16 scale = static_cast<Bf16>(static_cast<std::uint32_t>(bf16[lane]) >> 16);
    std::memcpy(group + lane * sizeof(Bf16), &scale, sizeof(scale));
  }
}

[[gnu::always_inline]] inline void LargestMagnitude(const float* values, FloatLanes& largest) {
  largest = FloatLanes{};
  for (int i = 0; i < kGroup; ++i) {
    FloatLanes x, magnitude;
    LoadLanes(values + i * kPackLanes, x);
    Magnitude(x, magnitude);
    largest = largest < magnitude ? magnitude : largest;
  }
}

// group: where the first of the lanes has its scale; quads: where it has its first quad.
[[gnu::always_inline]] inline void QuantizeInt8(const float* values, std::byte* scales, std::byte* quads) {
  FloatLanes largest;
  LargestMagnitude(values, largest);
  const FloatLanes wanted = largest / 127.0F;
  IntLanes scale;
  ToBf16Lanes(wanted, scale);
  scale = (FloatLanes)scale < wanted ? scale + 0x10000 : scale;  // no smaller: nothing is clipped
  const FloatLanes zeros = {};
  const FloatLanes inverse = largest > zeros ? 1.0F / (FloatLanes)scale : zeros;
  StoreScales(scale, scales);
  for (int quad = 0; quad < kGroup / 4; ++quad) {
    IntLanes four = {};
    for (int i = 0; i < 4; ++i) {
      FloatLanes x;
      LoadLanes(values + (quad * 4 + i) * kPackLanes, x);
      x = x * inverse;
      Clamp(-127.0F, 127.0F, x);
      RoundInteger(x);
      four |= (__builtin_convertvector(x, IntLanes) + 128) << (8 * i);
    }
    std::memcpy(quads + quad * kPanel * 4, &four, sizeof(four));
  }
}

[[gnu::always_inline]] inline void RoundInt4(const FloatLanes& inverse, FloatLanes& x) {
  x = x * inverse;
  RoundInteger(x);
  Clamp(-8.0F, 7.0F, x);
}

// With q fixed, sum x q / sum q^2 is the scale that loses least, and (sum x q)^2 / sum q^2 is what it keeps
// of sum x^2.
[[gnu::always_inline]] inline void FitInt4(const float* values, const FloatLanes& inverse,
                                           FloatLanes& product, FloatLanes& square) {
  product = square = FloatLanes{};
  for (int part = 0; part < kParts; ++part) {
    FloatLanes part_product = {}, part_square = {};
    for (int i = part; i < kGroup; i += kParts) {
      FloatLanes x, q;
      LoadLanes(values + i * kPackLanes, x);
      q = x;
      RoundInt4(inverse, q);
      part_product = part_product + x * q;
      part_square = part_square + q * q;
    }
    product = product + part_product;
    square = square + part_square;
  }
}

[[gnu::always_inline]] inline void QuantizeInt4(const float* values, std::byte* scales, std::byte* quads) {
  // The largest value takes the -8 that the other sign lacks, if it is worth that.
  FloatLanes largest;
  LargestMagnitude(values, largest);
  FloatLanes most = {};
  for (int i = kGroup - 1; i >= 0; --i) {
    FloatLanes x, magnitude;
    LoadLanes(values + i * kPackLanes, x);
    Magnitude(x, magnitude);
    most = magnitude == largest ? x : most;
  }
  const FloatLanes zeros = {};
  FloatLanes best_scale = {}, best_kept = {};
  for (int step = 0; step < 10; ++step) {
    const FloatLanes inverse = -(6.5F + 0.25F * static_cast<float>(step)) / most;
    FloatLanes product, square;
    FitInt4(values, inverse, product, square);
    const IntLanes better = (square > zeros) & (most != zeros) & (product * product > best_kept * square);
    best_kept = better ? product * product / square : best_kept;
    best_scale = better ? product / square : best_scale;
  }
  IntLanes scale;
  const FloatLanes wanted = best_scale / static_cast<float>(kInt4Unit);
  ToBf16Lanes(wanted, scale);
  const FloatLanes rounded = (FloatLanes)scale;
  const FloatLanes inverse =
      (scale & 0x7fffffff) == 0 ? zeros : 1.0F / (static_cast<float>(kInt4Unit) * rounded);
  StoreScales(scale, scales);
  for (int pair = 0; pair < kGroup / 8; ++pair) {
    IntLanes eight = {};
    for (int i = 0; i < 8; ++i) {
      FloatLanes x;
      LoadLanes(values + (pair * 8 + i) * kPackLanes, x);
      RoundInt4(inverse, x);
      eight |= (__builtin_convertvector(x, IntLanes) + 8) << (i < 4 ? 8 * i : 8 * (i - 4) + 4);
    }
    std::memcpy(quads + pair * kPanel * 4, &eight, sizeof(eight));
  }
}

// As QuantizeGroups.
[[gnu::always_inline]] inline void QuantizeGroupsBody(const float* values, WeightFormat format,
                                                      int first_lane, std::byte* group) {
  std::byte* const scales = group + first_lane * sizeof(Bf16);
  std::byte* const quads = group + kPanel * sizeof(Bf16) + first_lane * 4;
  if (format == WeightFormat::kInt4) {
    QuantizeInt4(values, scales, quads);
  } else {
    QuantizeInt8(values, scales, quads);
  }
}

}  // namespace elasticmoe::compute
