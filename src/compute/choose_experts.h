// How a row's router logits become its experts and their weights. Pure.
#pragma once

#include <cstdint>
#include <span>

#include "core/spec.h"

namespace elasticmoe::compute {

// logits [experts], used up; correction [experts] or null. Writes experts and mix [top_k], best first.
// `choice` [experts + groups] is scratch. Top-any: logits are the cosines; where fewer than top_k experts are
// chosen the rest is expert -1 of weight 0.
void ChooseExperts(const core::MoeSpec& moe, const float* correction, std::span<float> logits,
                   std::span<float> choice, std::int32_t* experts, float* mix);

}  // namespace elasticmoe::compute
