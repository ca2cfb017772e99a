// The body of QuantizeGroup (quantize.h) in plain C++, for the kernel tables to compile for their instruction
// sets: it is inlined where it is used, so that no copy of it can be linked into code for other machines.
// Sums run in kLanes interleaved parts that are added in one order, and nothing is fused: the same bits from
// every compiler's vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "compute/packed.h"

namespace elasticmoe::compute {

inline constexpr int kLanes = 16;
inline constexpr int kInt4Unit = 16;  // a stored int4 scale is this part of the weight's

// The nearest bf16 that is no smaller.
[[gnu::always_inline]] inline Bf16 RoundUp(float value) {
  const Bf16 rounded = ToBf16(value);
  return ToFloat(rounded) < value ? static_cast<Bf16>(rounded + 1) : rounded;
}

// Rounded to the nearest integer, as a float, for |x| < 2^22: adding 1.5 * 2^23 leaves no fraction.
[[gnu::always_inline]] inline float RoundInteger(float x) {
  constexpr float kShift = 12582912.0F;
  return x + kShift - kShift;
}

[[gnu::always_inline]] inline float LargestMagnitude(const float* values) {
  float lanes[kLanes] = {};
  for (int i = 0; i < kGroup; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lanes[j] = std::max(lanes[j], std::abs(values[i + j]));
  float largest = 0;
  for (const float lane : lanes) largest = std::max(largest, lane);
  return largest;
}

[[gnu::always_inline]] inline void QuantizeInt8(const float* values, int lane, std::byte* group) {
  const float largest = LargestMagnitude(values);
  const Bf16 scale = RoundUp(largest / 127.0F);
  const float inverse = largest > 0 ? 1.0F / ToFloat(scale) : 0.0F;
  std::uint8_t q[kGroup];
  for (int i = 0; i < kGroup; ++i)
    q[i] = static_cast<std::uint8_t>(
        static_cast<int>(RoundInteger(std::min(std::max(values[i] * inverse, -127.0F), 127.0F))) + 128);
  std::memcpy(group + lane * sizeof(Bf16), &scale, sizeof(scale));
  std::byte* out = group + kPanel * sizeof(Bf16) + lane * 4;
  for (int quad = 0; quad < kGroup / 4; ++quad) std::memcpy(out + quad * kPanel * 4, q + quad * 4, 4);
}

[[gnu::always_inline]] inline float RoundInt4(float x, float inverse) {
  return std::min(std::max(RoundInteger(x * inverse), -8.0F), 7.0F);
}

// With q fixed, sum x q / sum q^2 is the scale that loses least, and (sum x q)^2 / sum q^2 is what it keeps
// of sum x^2.
struct Int4Fit {
  float product = 0;  // sum x q
  float square = 0;   // sum q^2
};
[[gnu::always_inline]] inline Int4Fit FitInt4(const float* values, float inverse) {
  float product[kLanes] = {}, square[kLanes] = {};
  for (int i = 0; i < kGroup; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float q = RoundInt4(values[i + j], inverse);
      product[j] += values[i + j] * q;
      square[j] += q * q;
    }
  }
  Int4Fit fit;
  for (int j = 0; j < kLanes; ++j) {
    fit.product += product[j];
    fit.square += square[j];
  }
  return fit;
}

[[gnu::always_inline]] inline void QuantizeInt4(const float* values, int lane, std::byte* group) {
  // The largest value takes the -8 that the other sign lacks, if it is worth that.
  const float largest = LargestMagnitude(values);
  float most = 0;
  for (int i = kGroup - 1; i >= 0; --i) most = std::abs(values[i]) == largest ? values[i] : most;
  float best_scale = 0, best_kept = 0;
  if (most != 0) {
    for (int step = 0; step < 10; ++step) {
      const Int4Fit fit = FitInt4(values, -(6.5F + 0.25F * static_cast<float>(step)) / most);
      if (fit.square > 0 && fit.product * fit.product > best_kept * fit.square) {
        best_kept = fit.product * fit.product / fit.square;
        best_scale = fit.product / fit.square;
      }
    }
  }
  const Bf16 scale = ToBf16(best_scale / kInt4Unit);
  const float inverse = scale << 1 == 0 ? 0.0F : 1.0F / (kInt4Unit * ToFloat(scale));
  std::uint8_t q[kGroup];
  for (int i = 0; i < kGroup; ++i)
    q[i] = static_cast<std::uint8_t>(static_cast<int>(RoundInt4(values[i], inverse)) + 8);
  std::memcpy(group + lane * sizeof(Bf16), &scale, sizeof(scale));
  std::byte* out = group + kPanel * sizeof(Bf16) + lane * 4;
  for (int pair = 0; pair < kGroup / 8; ++pair) {
    std::uint8_t both[4];
    for (int i = 0; i < 4; ++i)
      both[i] = static_cast<std::uint8_t>(q[pair * 8 + i] | q[pair * 8 + 4 + i] << 4);
    std::memcpy(out + pair * kPanel * 4, both, 4);
  }
}

[[gnu::always_inline]] inline void QuantizeGroupBody(const float* values, WeightFormat format, int lane,
                                                     std::byte* group) {
  if (format == WeightFormat::kInt4) {
    QuantizeInt4(values, lane, group);
  } else {
    QuantizeInt8(values, lane, group);
  }
}

}  // namespace elasticmoe::compute
