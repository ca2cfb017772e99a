// From checkpoint files straight into the pages where the weights stay: each tensor is read from disk once
// and packed on the way, in pieces of some hundred rows, by as many threads as are given. Blocking.
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
  // Called before a part of these is written for the first time, from any thread; may be called again.
  std::function<Status(const std::byte* data, std::size_t bytes)> back;
};

struct LoadReport {
  std::uint64_t cached_bytes = 0;  // came from the page cache
  std::uint64_t disk_bytes = 0;    // past it
};

// `loaded_bytes` counts checkpoint bytes as they are packed. kDataLoss / kUnavailable name the file.
Expected<LoadReport> LoadWeights(const model::Checkpoint& checkpoint, const compute::WeightLayout& layout,
                                 const LoadTarget& target, int threads,
                                 std::atomic<std::uint64_t>& loaded_bytes);

// Calls `work` with 0 to count - 1, on `threads` threads of which this is one, in about that order. After an
// error no more calls begin; the first is returned.
Status ForEach(std::size_t count, int threads, const std::function<Status(std::size_t)>& work);

// layer -> index among the MoE layers, -1 for a dense layer.
std::vector<int> MoeIndex(const core::ModelSpec& spec);
int MoeLayerCount(const core::ModelSpec& spec);

}  // namespace elasticmoe::runtime
