// From checkpoint files straight into the pages where the weights stay: each tensor is read from disk once
// and packed on the way. Blocking; uses its own threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>

#include "base/error.h"
#include "compute/layout.h"
#include "model/checkpoint.h"

namespace elasticmoe::runtime {

struct LoadTarget {
  std::byte* shared = nullptr;                                  // zeroed memory of SharedBytes()
  std::function<std::byte*(int moe_layer, int expert)> expert;  // zeroed memory of ExpertBytes()
};

// `loaded_bytes` counts checkpoint bytes as they are packed. kDataLoss / kUnavailable name the file.
Status LoadWeights(const model::Checkpoint& checkpoint, const compute::WeightLayout& layout,
                   const LoadTarget& target, int threads, std::atomic<std::uint64_t>& loaded_bytes);

// layer -> index among the MoE layers, -1 for a dense layer.
std::vector<int> MoeIndex(const core::ModelSpec& spec);
int MoeLayerCount(const core::ModelSpec& spec);

}  // namespace elasticmoe::runtime
