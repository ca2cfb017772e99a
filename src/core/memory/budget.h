// Does a model fit, and in what page size? Pure arithmetic, done before anything is loaded.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/error.h"

namespace elasticmoe::core {

// Largest power of two from 4 KiB to 2 MiB for which an expert rounded up to pages wastes less than 5 %
// (4 KiB where none does).
std::size_t ChoosePageBytes(std::size_t expert_bytes);

struct MemoryRequest {
  std::size_t shared_bytes = 0;  // non-expert weights
  std::size_t expert_bytes = 0;  // of one expert of one layer
  int moe_layers = 0;
  int experts = 0;
  std::size_t kv_block_bytes = 0;
  int devices = 1;
  bool domain_per_device = false;       // else all devices share one domain
  std::size_t kv_memory_bytes = 0;      // a device
  std::size_t device_memory_bytes = 0;  // budget a device, 0 = no limit but the machine's
  std::size_t available_bytes = 0;      // what the machine can give now
};

struct MemoryPlan {
  std::size_t page_bytes = 0;
  std::uint32_t pages_per_expert = 0;
  std::uint32_t shared_pages = 0;
  std::uint32_t kv_chunk_pages = 0;  // KV comes in chunks of whole pages
  std::uint32_t blocks_per_chunk = 0;
  std::uint32_t kv_chunks_per_device = 0;
  std::size_t bytes_per_device = 0;  // largest: weights + KV that are accounted to one device
  std::size_t total_bytes = 0;       // of all domains
};

// kResourceExhausted with the numbers and what to change; kInvalidArgument for a KV memory below one block.
Expected<MemoryPlan> PlanMemory(const MemoryRequest& request);

// What a server takes of the machine beyond what it has, when devices join.
struct GrowthRequest {
  int joining = 0;
  int devices = 1;  // after it
  std::size_t shared_bytes = 0;
  std::size_t all_expert_bytes = 0;  // of all layers together
  std::size_t kv_memory_bytes = 0;   // a device
  bool domain_per_device = false;
  std::size_t available_bytes = 0;  // what the machine can give now; 0 = not known
};

// At its peak: KV memory, and between domains the non-expert weights and each new device's experts, whose old
// copies go only after the commit.
std::size_t GrowthBytes(const GrowthRequest& request);

// kResourceExhausted with the numbers and what to change.
Status CheckGrowth(const GrowthRequest& request);

}  // namespace elasticmoe::core
