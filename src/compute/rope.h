// Rotary position embedding: frequencies of every scaling, a table that grows with the positions seen, and
// the turn itself. Not thread-safe while it grows.
#pragma once

#include <vector>

#include "core/spec.h"

namespace elasticmoe::compute {

// Angle per position of each pair, float32 as the reference implementations have them. [RopeDim / 2]
std::vector<float> RopeFrequencies(const core::AttentionSpec& attention);

class Rope {
 public:
  explicit Rope(const core::AttentionSpec& attention);

  // Makes positions [0, positions) ready, no further than `limit` in advance.
  void Grow(int positions, int limit);

  // Turns `x` [RopeDim] in place. REQUIRES: position was grown to.
  void Turn(float* x, int position) const;

 private:
  bool interleaved_;
  float amplitude_;
  std::vector<float> frequencies_;
  std::vector<float> cos_, sin_;  // [position, RopeDim / 2]
};

}  // namespace elasticmoe::compute
