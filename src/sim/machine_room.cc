#include "sim/machine_room.h"

#include <algorithm>

#include "base/check.h"
#include "base/hash.h"

namespace elasticmoe::sim {

constexpr TokenId kGarbage = -7;  // what fresh memory holds: no token

std::uint64_t FoldToken(std::uint64_t fold, TokenId token) {
  return HashCombine(fold, static_cast<std::uint64_t>(token));
}
TokenId NextToken(std::uint64_t fold, int vocab) {
  return static_cast<TokenId>(fold % static_cast<std::uint64_t>(vocab));
}

MachineRoom::MachineRoom(const core::PlanFacts& facts, int block_tokens, int max_running)
    : facts_(facts), block_tokens_(block_tokens), tables_(max_running) {
  for (const core::PlanDevice& device : facts.devices) domain_of_[device.device] = device.domain;
}

void MachineRoom::StartWorker(DeviceId device) {
  Worker& worker = workers_[device];
  ++worker.incarnation;
  worker.alive = true;
  worker.mapped.clear();
}

void MachineRoom::KillWorker(DeviceId device) {
  workers_[device].alive = false;
  workers_[device].mapped.clear();
}

void MachineRoom::KillMemory() {
  memory_alive_ = false;
  ++memory_incarnation_;
  domains_.clear();
}

void MachineRoom::LoadMemory(const core::Placement& placement) {
  memory_alive_ = true;
  for (const DeviceId member : placement.members()) domains_[DomainOf(member)];
  for (int layer = 0; layer < placement.layers(); ++layer)
    for (int expert = 0; expert < placement.experts(); ++expert)
      for (const DeviceId owner : placement.Owners(layer, expert))
        domains_[DomainOf(owner)].experts.insert(ExpertKey(layer, expert));
}

void MachineRoom::ResizeKv(DomainId domain, std::uint32_t blocks) {
  if (const auto at = domains_.find(domain); at != domains_.end())
    at->second.kv.resize(static_cast<std::size_t>(blocks) * block_tokens_, kGarbage);
}

std::string MachineRoom::Move(const core::PlanStage& stage, std::size_t count) {
  for (const DeviceId member : stage.placement.members()) domains_[DomainOf(member)];
  for (std::size_t i = 0; i < count; ++i) {
    const core::ExpertMove& move = stage.moves[i];
    const int key = ExpertKey(move.layer, move.expert);
    const auto source = domains_.find(DomainOf(move.from));
    if (source == domains_.end() || source->second.experts.count(key) == 0)
      return fmt::format("layer={} expert={} is read from device={}, whose domain has it not", move.layer,
                         move.expert, move.from);
    const bool same_domain = DomainOf(move.from) == DomainOf(move.to);
    if ((move.kind == core::MoveKind::kRemap) != same_domain)
      return fmt::format("layer={} expert={}: a remap between domains", move.layer, move.expert);
    domains_[DomainOf(move.to)].experts.insert(key);
  }
  return {};
}

void MachineRoom::Trim(const core::Placement& placement) {
  for (auto at = domains_.begin(); at != domains_.end();) {
    std::set<int> wanted;
    bool member = false;
    for (const DeviceId device : placement.members())
      if (DomainOf(device) == at->first) member = true;
    for (int layer = 0; layer < placement.layers(); ++layer)
      for (int expert = 0; expert < placement.experts(); ++expert)
        for (const DeviceId owner : placement.Owners(layer, expert))
          if (DomainOf(owner) == at->first) wanted.insert(ExpertKey(layer, expert));
    std::erase_if(at->second.experts, [&](int key) { return wanted.count(key) == 0; });
    at = member ? std::next(at) : domains_.erase(at);
  }
}

std::string MachineRoom::CheckHolds(const core::Placement& placement) const {
  for (int layer = 0; layer < placement.layers(); ++layer)
    for (int expert = 0; expert < placement.experts(); ++expert) {
      if (placement.Owners(layer, expert).empty())
        return fmt::format("layer={} expert={} is served by nobody", layer, expert);
      for (const DeviceId owner : placement.Owners(layer, expert)) {
        if (placement.RankOf(owner) < 0)
          return fmt::format("layer={} expert={} is served by device={}, no member", layer, expert, owner);
        const auto at = domains_.find(DomainOf(owner));
        if (at == domains_.end() || at->second.experts.count(ExpertKey(layer, expert)) == 0)
          return fmt::format("layer={} expert={} is not in the memory of device={}", layer, expert, owner);
      }
    }
  return {};
}

std::string MachineRoom::CheckHoldsExactly(const core::Placement& placement) const {
  if (std::string wrong = CheckHolds(placement); !wrong.empty()) return wrong;
  std::map<DomainId, std::set<int>> wanted;
  for (const DeviceId member : placement.members()) wanted[DomainOf(member)];
  for (int layer = 0; layer < placement.layers(); ++layer)
    for (int expert = 0; expert < placement.experts(); ++expert)
      for (const DeviceId owner : placement.Owners(layer, expert))
        wanted[DomainOf(owner)].insert(ExpertKey(layer, expert));
  if (wanted.size() != domains_.size())
    return fmt::format("{} domains are open, {} have members", domains_.size(), wanted.size());
  for (const auto& [id, domain] : domains_)
    if (domain.experts != wanted[id])
      return fmt::format("domain={} holds {} experts, {} are wanted", id, domain.experts.size(),
                         wanted[id].size());
  return {};
}

void MachineRoom::CopyKv(const core::KvCopy& copy) {
  const auto from = domains_.find(copy.from_domain), to = domains_.find(copy.to_domain);
  if (from == domains_.end() || to == domains_.end()) return;
  const auto at = [&](BlockId block) { return static_cast<std::size_t>(block.value) * block_tokens_; };
  // Source blocks may be gone with their sequence: then nobody reads the copy.
  if (at(copy.from) + block_tokens_ > from->second.kv.size()) return;
  EM_CHECK(at(copy.to) + block_tokens_ <= to->second.kv.size(), "domain={} block={}", copy.to_domain,
           copy.to);
  std::copy_n(from->second.kv.begin() + static_cast<std::ptrdiff_t>(at(copy.from)), block_tokens_,
              to->second.kv.begin() + static_cast<std::ptrdiff_t>(at(copy.to)));
}

std::string MachineRoom::Compute(DeviceId device, const core::SequenceStep& step,
                                 const std::vector<TokenId>& tokens, std::uint64_t& fold) {
  Domain& domain = domains_[DomainOf(device)];
  const auto place = [&](int position) -> TokenId* {
    const auto block = tables_[step.table_slot].find(position / block_tokens_);
    if (block == tables_[step.table_slot].end()) return nullptr;
    const std::size_t index =
        static_cast<std::size_t>(block->second.value) * block_tokens_ + position % block_tokens_;
    return index < domain.kv.size() ? &domain.kv[index] : nullptr;
  };
  for (int i = 0; i < step.rows; ++i) {
    TokenId* token = place(step.start_position + i);
    if (token == nullptr)
      return fmt::format("request={} writes position={} outside of its blocks", step.request,
                         step.start_position + i);
    *token = tokens[step.start_position + i];
  }
  fold = 0;
  for (int position = 0; position < step.start_position + step.rows; ++position) {
    const TokenId* token = place(position);
    if (token == nullptr)
      return fmt::format("request={} reads position={} outside of its blocks", step.request, position);
    if (*token != tokens[position])
      return fmt::format("request={} reads {} at position={} of {}, not {} (rows from {})", step.request,
                         *token, position, tokens.size(), tokens[position], step.start_position);
    fold = FoldToken(fold, *token);
  }
  return {};
}

std::size_t MachineRoom::PagesIn(DomainId domain) const {
  const auto at = domains_.find(domain);
  return at == domains_.end() ? 0 : at->second.experts.size();
}

}  // namespace elasticmoe::sim
