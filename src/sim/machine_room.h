// The simulated machines: memory of each domain (expert pages, KV blocks) and the workers that map it. It
// does what it is told and says where that was wrong. Pure, no time.
#pragma once

#include <map>
#include <set>
#include <string>
#include <vector>

#include "core/placement/planner.h"
#include "core/schedule/scheduler.h"

namespace elasticmoe::sim {

// The toy model: the token after `context`.
std::uint64_t FoldToken(std::uint64_t fold, TokenId token);
TokenId NextToken(std::uint64_t fold, int vocab);

struct Domain {
  std::set<int> experts;    // layer * experts + expert
  std::vector<TokenId> kv;  // [block * block_tokens + offset]
};

struct Worker {
  int incarnation = 0;  // which process; answers of earlier ones are void
  bool alive = false;
  std::set<Epoch> mapped;
};

class MachineRoom {
 public:
  MachineRoom(const core::PlanFacts& facts, int block_tokens, int max_running);

  bool MemoryAlive() const { return memory_alive_; }
  int memory_incarnation() const { return memory_incarnation_; }
  Worker& worker(DeviceId device) { return workers_[device]; }
  DomainId DomainOf(DeviceId device) const { return domain_of_.at(device); }
  int ExpertKey(int layer, int expert) const { return layer * facts_.experts + expert; }

  void StartWorker(DeviceId device);
  void KillWorker(DeviceId device);
  void KillMemory();
  // From the checkpoint: what `placement` wants.
  void LoadMemory(const core::Placement& placement);
  void ResizeKv(DomainId domain, std::uint32_t blocks);

  // The first `count` moves of a stage. Empty, or what was wrong.
  std::string Move(const core::PlanStage& stage, std::size_t count);
  // Everything that `placement` does not want goes: pages, domains.
  void Trim(const core::Placement& placement);
  std::string CheckHolds(const core::Placement& placement) const;         // at least
  std::string CheckHoldsExactly(const core::Placement& placement) const;  // and nothing else

  void WriteTable(const core::TableWrite& write) { tables_[write.table_slot][write.index] = write.block; }
  void CopyKv(const core::KvCopy& copy);
  // Rows of one sequence: writes those of `tokens` that the step names, then reads all context back and folds
  // it. `tokens` reaches to the end of the step. Empty, or what was wrong.
  std::string Compute(DeviceId device, const core::SequenceStep& step, const std::vector<TokenId>& tokens,
                      std::uint64_t& fold);

  std::size_t PagesIn(DomainId domain) const;

 private:
  const core::PlanFacts& facts_;
  int block_tokens_;
  bool memory_alive_ = true;
  int memory_incarnation_ = 1;
  std::map<DeviceId, DomainId> domain_of_;
  std::map<DomainId, Domain> domains_;
  std::map<DeviceId, Worker> workers_;
  std::vector<std::map<int, BlockId>> tables_;  // shared memory of the coordinator: survives workers
};

}  // namespace elasticmoe::sim
