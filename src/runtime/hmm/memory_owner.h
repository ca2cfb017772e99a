// The HMM's memory itself: domains, page pools, weight blobs, KV chunks, and the operations on them. No
// sockets here. Not thread-safe, but for `loaded_bytes`.
//
// Invariants: a page has one owner; every offset given out lies in pages of the pool; memory of freed pages
// goes back to the machine.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "compute/kv.h"
#include "compute/layout.h"
#include "core/memory/budget.h"
#include "core/memory/page_pool.h"
#include "core/placement/placement.h"
#include "model/checkpoint.h"
#include "runtime/hmm/hmm.h"
#include "runtime/hmm/memory_map.h"

namespace elasticmoe::runtime {

struct ExpertId {
  int layer = 0;  // MoE layer
  int expert = 0;
};

struct CopyReport {
  std::uint64_t bytes = 0;
  std::int64_t duration_ns = 0;       // of the copying, without backing the target with memory
  std::vector<std::int64_t> offsets;  // new offset of each expert
};

struct KvPair {
  DomainId from_domain;
  BlockId from;
  DomainId to_domain;
  BlockId to;
};

class MemoryOwner {
 public:
  // Makes the pools and maps them: with --domain-per-device a domain a member of `placement`, else one for
  // all. Reads headers, no weights. Refuses what cannot fit.
  static Expected<std::unique_ptr<MemoryOwner>> Create(const HmmOptions& options,
                                                       const core::Placement& placement);

  // Loads all weights by that placement. Blocking.
  Status Load();
  std::uint64_t LoadedBytes() const { return loaded_bytes_.load(std::memory_order_relaxed); }
  std::uint64_t TotalBytes() const { return total_bytes_; }

  MemoryMap Describe() const;
  int DomainFd(DomainId domain) const;  // -1 if there is no such domain
  Json Accounts() const;

  // All of them: on error nothing has changed.
  Expected<std::vector<std::uint64_t>> SetKvChunks(DomainId domain, DeviceId device, int chunks);
  // A new domain has no weights; the shared ones are copied piece by piece from a domain that has them. It
  // holds them once the last piece, the one that ends at SharedBytes, is there.
  Status OpenDomain(DomainId domain);
  // `cpus`: of devices that compute nothing yet, by whom it is copied; empty = on all cores.
  Expected<CopyReport> CopyShared(DomainId to, std::uint64_t offset, std::uint64_t bytes,
                                  std::span<const int> cpus = {});
  std::uint64_t SharedBytes() const { return layout_.SharedBytes(); }
  Status CloseDomain(DomainId domain);  // kFailedPrecondition where it holds the only copy of an expert
  // With HmmOptions::standby_memory: what the next domain to be opened will need (its share of the experts
  // and the first part of its KV) is backed ahead, a piece a call, since the machine may take milliseconds
  // for a huge page. No more than a device may have; nothing where the machine is short of memory. False when
  // nothing is left to do. A domain that closes leaves its memory for this.
  bool BackStandby();
  std::uint64_t StandbyBytes() const;  // held so
  Expected<CopyReport> CopyExperts(DomainId from, DomainId to, std::span<const ExpertId> experts,
                                   std::span<const int> cpus = {});  // as CopyShared's
  Expected<int> DropExperts(DomainId domain, std::span<const ExpertId> experts);
  Status MoveExperts(DeviceId device, std::span<const ExpertId> experts);
  Expected<CopyReport> CopyKv(std::span<const KvPair> pairs);

 private:
  struct Domain {
    DomainId id;
    Fd memory;
    Mapping mapping;
    core::PagePool pool{0};
    core::PageRun shared;
    std::vector<core::PageRun> experts;  // count 0 = not here
    std::vector<core::PageRun> kv_chunks;
    std::vector<DeviceId> kv_accounts;  // who each chunk is charged to
    bool has_shared = false;
    std::size_t backed = 0;  // so much from its start has memory, whoever owns it
  };

  MemoryOwner(HmmOptions options, model::Checkpoint checkpoint, core::MemoryPlan plan);
  Expected<std::unique_ptr<Domain>> MakeDomain(DomainId id);
  Domain* FindDomain(DomainId id) const;
  DomainId DomainOf(DeviceId device) const { return DomainId(options_.domain_per_device ? device.value : 0); }
  std::byte* At(const Domain& domain, core::PageRun run) const;
  std::uint64_t OffsetOf(core::PageRun run) const { return std::uint64_t(run.first) * plan_.page_bytes; }
  std::size_t IndexOf(ExpertId id) const {
    return std::size_t(id.layer) * checkpoint_.spec.moe.experts + id.expert;
  }
  Expected<std::unique_ptr<Domain>> TakeStandby(DomainId id);
  std::size_t StandbyTarget() const;
  struct Copy {
    std::byte* to;
    const std::byte* from;
    std::size_t bytes;
  };
  static void AddCopy(std::byte* to, const std::byte* from, std::size_t bytes, std::vector<Copy>& copies);
  // Backs pages that were allocated, on all cores, without those that are backed from before.
  Status Back(const Domain& domain, core::PageRun run) const;
  // Past the caches, on all cores: whoever computes meanwhile waits for its slowest core anyway.
  void CopyAll(std::span<const Copy> copies, std::span<const int> cpus = {}) const;
  // What is loaded once and belongs in further domains too, copied there.
  Status CopyLoaded(const std::function<Status(const std::byte*, std::size_t)>& back);
  Status CheckExperts(std::span<const ExpertId> experts) const;
  void Release(Domain& domain, core::PageRun run);

  HmmOptions options_;
  model::Checkpoint checkpoint_;
  compute::WeightLayout layout_;
  compute::KvLayout kv_layout_;
  core::MemoryPlan plan_;
  int moe_layers_ = 0;
  std::string fingerprint_;
  double huge_share_ = 0.0;
  int threads_ = 1;
  std::uint64_t total_bytes_ = 0;
  std::atomic<std::uint64_t> loaded_bytes_{0};
  std::vector<std::unique_ptr<Domain>> domains_;
  std::unique_ptr<Domain> standby_;  // holds nothing yet
  std::size_t standby_backed_ = 0;   // bytes from its start that were gone through
};

}  // namespace elasticmoe::runtime
