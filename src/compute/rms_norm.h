// RMSNorm of a row, and the one order in which its squares are added. Pure.
#pragma once

#include <cmath>

namespace elasticmoe::compute {

// Sum of squares in 16 lanes, then a tree: one order for every length, and the compiler may use registers.
inline float SquareSum(const float* x, int count) {
  constexpr int kLanes = 16;
  float lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane] * x[i + lane];
  for (int lane = 0; i < count; ++i, ++lane) lanes[lane] += x[i] * x[i];
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

// out may be in.
inline void RmsNorm(const float* weight, float eps, int count, const float* in, float* out) {
  const float scale = 1.0F / std::sqrt(SquareSum(in, count) / static_cast<float>(count) + eps);
  for (int i = 0; i < count; ++i) out[i] = in[i] * scale * weight[i];
}

}  // namespace elasticmoe::compute
