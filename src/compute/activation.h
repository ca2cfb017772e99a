// What stands between the two products of a gated MLP: out = f(gate + gate_bias) * h(up + up_bias). Every
// table's gate_up takes one of these beside its two matrices, whatever format their weights have, and applies
// it to the float32 sums, biases first, before the result is rounded to the activation format. The outputs'
// bias (down) is no part of it: RunExperts adds that where an expert's outputs are written. Pure.
#pragma once

#include <algorithm>
#include <cmath>

#include "core/spec.h"

namespace elasticmoe::compute {

struct Activation {
  using Kind = core::ActivationSpec::Kind;

  core::ActivationSpec spec;
  const float* gate_bias = nullptr;  // [outputs of gate], float32, not owned; null = none
  const float* up_bias = nullptr;    // [outputs of up]; null where gate_bias is
};

// One value, in plain float32: what the tables are held against. `gate` and `up` have their biases.
[[gnu::always_inline]] inline float Activate(const core::ActivationSpec& spec, float gate, float up) {
  if (spec.kind == core::ActivationSpec::Kind::kSilu) return gate / (1.0F + std::exp(-gate)) * up;
  gate = std::min(gate, spec.limit);
  up = std::clamp(up, -spec.limit, spec.limit);
  return gate / (1.0F + std::exp(-spec.alpha * gate)) * (up + 1.0F);
}

}  // namespace elasticmoe::compute
