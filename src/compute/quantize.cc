#include "compute/quantize.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace elasticmoe::compute {
namespace {

constexpr int kInt4Unit = 16;  // a stored int4 scale is this part of the weight's

void StoreScale(std::byte* group, int lane, Bf16 scale) {
  std::memcpy(group + lane * sizeof(Bf16), &scale, sizeof(scale));
}

std::byte* Quads(std::byte* group) {
  return group + kPanel * sizeof(Bf16);
}

// The nearest bf16 that is no smaller.
Bf16 RoundUp(float value) {
  const Bf16 rounded = ToBf16(value);
  return ToFloat(rounded) < value ? static_cast<Bf16>(rounded + 1) : rounded;
}

void QuantizeInt8(const float* values, int lane, std::byte* group) {
  float largest = 0;
  for (int i = 0; i < kGroup; ++i) largest = std::max(largest, std::abs(values[i]));
  const Bf16 scale = RoundUp(largest / 127.0F);
  const float inverse = largest > 0 ? 1.0F / ToFloat(scale) : 0.0F;
  StoreScale(group, lane, scale);
  auto* out = reinterpret_cast<std::uint8_t*>(Quads(group));
  for (int i = 0; i < kGroup; ++i) {
    const float q = std::clamp(values[i] * inverse, -127.0F, 127.0F);
    out[(i / 4 * kPanel + lane) * 4 + i % 4] = static_cast<std::uint8_t>(std::lrint(q) + 128);
  }
}

// x * inverse rounded to the nearest integer in [-8, 7], as a float: adding 1.5 * 2^23 leaves no fraction.
inline float RoundInt4(float x, float inverse) {
  constexpr float kShift = 12582912.0F;
  return std::min(std::max(x * inverse + kShift - kShift, -8.0F), 7.0F);
}

void QuantizeInt4(const float* values, int lane, std::byte* group) {
  float most = 0;  // the value of the largest magnitude
  for (int i = 0; i < kGroup; ++i) most = std::abs(values[i]) > std::abs(most) ? values[i] : most;
  // The largest value may use the -8 that the other sign lacks. With q fixed, sum x q / sum q^2 is the scale
  // that loses least; (sum x q)^2 / sum q^2 is what it keeps of sum x^2.
  float best_scale = 0, best_kept = 0;
  if (most != 0) {
    for (float steps = 6.4F; steps <= 9.0F; steps += 0.2F) {
      const float inverse = -steps / most;
      float product = 0, square = 0;
      for (int i = 0; i < kGroup; ++i) {
        const float q = RoundInt4(values[i], inverse);
        product += values[i] * q;
        square += q * q;
      }
      if (square > 0 && product * product > best_kept * square) {
        best_kept = product * product / square;
        best_scale = product / square;
      }
    }
  }
  const Bf16 scale = ToBf16(best_scale / kInt4Unit);
  StoreScale(group, lane, scale);
  const float inverse = scale << 1 == 0 ? 0.0F : 1.0F / (kInt4Unit * ToFloat(scale));
  auto* out = reinterpret_cast<std::uint8_t*>(Quads(group));
  for (int i = 0; i < kGroup; ++i) {
    const int quad = i / 4;
    std::uint8_t& both = out[(quad / 2 * kPanel + lane) * 4 + i % 4];
    const auto q = static_cast<unsigned>(static_cast<int>(RoundInt4(values[i], inverse)) + 8);
    both = static_cast<std::uint8_t>(quad % 2 == 0 ? (both & 0xf0u) | q : (both & 0x0fu) | q << 4);
  }
}

}  // namespace

void QuantizeGroup(const float* values, WeightFormat format, int lane, std::byte* group) {
  if (format == WeightFormat::kInt4) {
    QuantizeInt4(values, lane, group);
  } else {
    QuantizeInt8(values, lane, group);
  }
}

}  // namespace elasticmoe::compute
