// Activations as int8: what int8 and int4 weights are multiplied by. Groups of kGroup values share a scale
// (largest magnitude / 127); the last group is filled up with zeros.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "compute/packed.h"

namespace elasticmoe::compute {

// A row in memory: values [groups * kGroup] int8, scales [groups] float32, offsets [groups] int32. An offset
// is -128 times the sum of its group: sum of (w + 128) x + offset = sum of w x, so that weights may be
// unsigned.
struct QuantizedRow {
  const std::int8_t* values;
  const float* scales;
  const std::int32_t* offsets;

  [[gnu::always_inline]] static QuantizedRow At(const void* row, int groups) {
    const auto* values = static_cast<const std::int8_t*>(row);
    const auto* scales = reinterpret_cast<const float*>(values + std::size_t(groups) * kGroup);
    return {values, scales, reinterpret_cast<const std::int32_t*>(scales + groups)};
  }
  static constexpr std::size_t Bytes(int k) {
    return GroupsOf(k) * (kGroup + sizeof(float) + sizeof(std::int32_t));
  }
};

// Where a kernel writes one.
struct QuantizedRowOut {
  std::int8_t* values;
  float* scales;
  std::int32_t* offsets;

  [[gnu::always_inline]] static QuantizedRowOut At(void* row, int groups) {
    auto* values = static_cast<std::int8_t*>(row);
    auto* scales = reinterpret_cast<float*>(values + std::size_t(groups) * kGroup);
    return {values, scales, reinterpret_cast<std::int32_t*>(scales + groups)};
  }
};

}  // namespace elasticmoe::compute
