// Weights to int8 and int4, and back; the formats are packed.h's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "compute/packed.h"

namespace elasticmoe::compute {

inline constexpr int kPackLanes = 16;  // outputs that are quantized side by side

// Quantizes kGroup inputs of kPackLanes outputs, values [kGroup, kPackLanes], into their places in a packed
// group: outputs `first_lane` (0 or kPackLanes) and on of the panel. int8: scale = largest magnitude / 127.
// int4: of several scales near largest / 8 the one whose rounding loses least, by squares.
void QuantizeGroups(const float* values, WeightFormat format, int first_lane, std::byte* group);

// One output's part of a packed group.
struct StoredGroup {
  const std::byte* group;
  WeightFormat format;
  int lane;  // the output's, in [0, kPanel)

  float Scale() const {
    Bf16 scale;
    std::memcpy(&scale, group + lane * sizeof(Bf16), sizeof(scale));
    return ToFloat(scale);
  }
  // What kernels multiply by, in [0, 255]: the weight / Scale() + 128. `i` in [0, kGroup).
  int Unsigned(int i) const {
    const auto* quads = reinterpret_cast<const std::uint8_t*>(group + kPanel * sizeof(Bf16));
    if (format == WeightFormat::kInt8) return quads[(i / 4 * kPanel + lane) * 4 + i % 4];
    const unsigned both = quads[(i / 8 * kPanel + lane) * 4 + i % 4];
    return static_cast<int>(i / 4 % 2 == 0 ? both << 4 & 0xf0u : both & 0xf0u);
  }
  float Weight(int i) const { return Scale() * static_cast<float>(Unsigned(i) - 128); }
};

}  // namespace elasticmoe::compute
