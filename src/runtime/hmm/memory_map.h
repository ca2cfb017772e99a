// Where a model's weights and KV chunks lie in the memory of each domain: what the HMM tells those who
// attach. Offsets are bytes into the domain's memory. Pure values, with their JSON form.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/ids.h"
#include "base/json.h"
#include "core/placement/placement.h"

namespace elasticmoe::runtime {

struct DomainMap {
  DomainId domain;
  std::uint64_t bytes = 0;                   // size of the memory object
  std::uint64_t shared_offset = 0;           // of the shared weight blob
  std::vector<std::int64_t> expert_offsets;  // [moe layer * experts + expert], -1 = not in this domain
  std::vector<std::uint64_t> kv_chunks;      // offsets; block b is in chunk b / blocks_per_chunk
};

struct MemoryMap {
  std::string fingerprint;  // of the model files and every option that shapes the memory
  std::uint64_t page_bytes = 0;
  std::uint32_t pages_per_expert = 0;
  std::uint32_t blocks_per_chunk = 0;
  int kv_element_bytes = 0;
  bool domain_per_device = false;
  double huge_share = 0.0;  // share of weight bytes in 2 MiB pages
  std::vector<DomainMap> domains;

  const DomainMap* Find(DomainId domain) const;
  // The domain of a device.
  DomainId DomainOf(DeviceId device) const { return DomainId(domain_per_device ? device.value : 0); }
};

Json ToJson(const MemoryMap& map);
Expected<MemoryMap> MemoryMapFromJson(const Json& json);

// {"epoch", "members": [device...], "owners": [layer][expert] = [device...]}
Json ToJson(const core::Placement& placement);
Expected<core::Placement> PlacementFromJson(const Json& json);

}  // namespace elasticmoe::runtime
