#include "runtime/hmm/memory_map.h"

namespace elasticmoe::runtime {

const DomainMap* MemoryMap::Find(DomainId domain) const {
  for (const DomainMap& map : domains)
    if (map.domain == domain) return &map;
  return nullptr;
}

Json ToJson(const MemoryMap& map) {
  Json domains = Json::array();
  for (const DomainMap& domain : map.domains)
    domains.push_back({{"domain", domain.domain.value},
                       {"bytes", domain.bytes},
                       {"shared_offset", domain.shared_offset},
                       {"expert_offsets", domain.expert_offsets},
                       {"kv_chunks", domain.kv_chunks}});
  return {{"fingerprint", map.fingerprint},
          {"page_bytes", map.page_bytes},
          {"pages_per_expert", map.pages_per_expert},
          {"blocks_per_chunk", map.blocks_per_chunk},
          {"kv_element_bytes", map.kv_element_bytes},
          {"domain_per_device", map.domain_per_device},
          {"huge_share", map.huge_share},
          {"domains", domains}};
}

Expected<MemoryMap> MemoryMapFromJson(const Json& json) {
  try {
    MemoryMap map;
    map.fingerprint = json.at("fingerprint").get<std::string>();
    map.page_bytes = json.at("page_bytes").get<std::uint64_t>();
    map.pages_per_expert = json.at("pages_per_expert").get<std::uint32_t>();
    map.blocks_per_chunk = json.at("blocks_per_chunk").get<std::uint32_t>();
    map.kv_element_bytes = json.at("kv_element_bytes").get<int>();
    map.domain_per_device = json.at("domain_per_device").get<bool>();
    map.huge_share = json.at("huge_share").get<double>();
    for (const Json& item : json.at("domains")) {
      DomainMap domain;
      domain.domain = DomainId(item.at("domain").get<int>());
      domain.bytes = item.at("bytes").get<std::uint64_t>();
      domain.shared_offset = item.at("shared_offset").get<std::uint64_t>();
      domain.expert_offsets = item.at("expert_offsets").get<std::vector<std::int64_t>>();
      domain.kv_chunks = item.at("kv_chunks").get<std::vector<std::uint64_t>>();
      map.domains.push_back(std::move(domain));
    }
    return map;
  } catch (const nlohmann::json::exception& e) {
    return Fail(ErrorCode::kDataLoss, "reading a memory map: {}", e.what());
  }
}

Json ToJson(const core::Placement& placement) {
  Json members = Json::array(), owners = Json::array();
  for (const DeviceId member : placement.members()) members.push_back(member.value);
  for (int layer = 0; layer < placement.layers(); ++layer) {
    Json row = Json::array();
    for (int expert = 0; expert < placement.experts(); ++expert) {
      Json devices = Json::array();
      for (const DeviceId owner : placement.Owners(layer, expert)) devices.push_back(owner.value);
      row.push_back(std::move(devices));
    }
    owners.push_back(std::move(row));
  }
  return {{"epoch", placement.epoch().value},
          {"experts", placement.experts()},
          {"members", members},
          {"owners", owners}};
}

Expected<core::Placement> PlacementFromJson(const Json& json) {
  try {
    std::vector<DeviceId> members;
    for (const int member : json.at("members").get<std::vector<int>>()) members.emplace_back(member);
    const Json& layers = json.at("owners");
    const int experts = json.at("experts").get<int>();
    core::Placement placement(Epoch(json.at("epoch").get<std::uint64_t>()), std::move(members),
                              static_cast<int>(layers.size()), experts);
    for (int layer = 0; layer < placement.layers(); ++layer)
      for (int expert = 0; expert < experts; ++expert) {
        std::vector<DeviceId> owners;
        for (const int owner : layers.at(layer).at(expert).get<std::vector<int>>()) {
          owners.emplace_back(owner);
          if (placement.RankOf(owners.back()) < 0)
            return Fail(ErrorCode::kDataLoss,
                        "reading a placement: layer={} expert={} is on device={}, no member", layer, expert,
                        owner);
        }
        if (owners.empty())
          return Fail(ErrorCode::kDataLoss, "reading a placement: layer={} expert={} has no owner", layer,
                      expert);
        placement.SetOwners(layer, expert, owners);
      }
    return placement;
  } catch (const nlohmann::json::exception& e) {
    return Fail(ErrorCode::kDataLoss, "reading a placement: {}", e.what());
  }
}

}  // namespace elasticmoe::runtime
