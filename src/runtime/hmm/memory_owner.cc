#include "runtime/hmm/memory_owner.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "base/clock.h"
#include "base/log.h"
#include "core/placement/placement.h"
#include "runtime/hmm/backing.h"
#include "runtime/hmm/loader.h"
#include "runtime/process.h"

namespace elasticmoe::runtime {
namespace {

// The machine's memory is busy long before more threads than this.
constexpr int kMostLoadThreads = 32;

}  // namespace

MemoryOwner::MemoryOwner(HmmOptions options, model::Checkpoint checkpoint, core::MemoryPlan plan)
    : options_(std::move(options)),
      checkpoint_(std::move(checkpoint)),
      layout_(checkpoint_.spec),
      kv_layout_(compute::KvLayout::Of(checkpoint_.spec, options_.kv_element_bytes)),
      plan_(plan),
      moe_layers_(MoeLayerCount(checkpoint_.spec)),
      fingerprint_(HmmFingerprint(options_)),
      threads_(options_.load_threads > 0 ? options_.load_threads
                                         : std::min(UsableCores(), kMostLoadThreads)) {
  for (const auto& tensor : checkpoint_.tensors) total_bytes_ += tensor.bytes;
}

Expected<std::unique_ptr<MemoryOwner>> MemoryOwner::Create(const HmmOptions& options,
                                                           const core::Placement& placement) {
  EM_ASSIGN_OR_RETURN(model::Checkpoint checkpoint, model::Checkpoint::Open(options.model));
  checkpoint.spec.weights = options.weights;
  const compute::WeightLayout layout(checkpoint.spec);
  core::MemoryRequest request;
  request.shared_bytes = layout.SharedBytes();
  request.expert_bytes = layout.ExpertBytes();
  request.moe_layers = MoeLayerCount(checkpoint.spec);
  request.experts = checkpoint.spec.moe.experts;
  request.kv_block_bytes = compute::KvLayout::Of(checkpoint.spec, options.kv_element_bytes).BlockBytes();
  request.devices = static_cast<int>(placement.members().size());
  request.domain_per_device = options.domain_per_device;
  request.kv_memory_bytes = options.kv_memory_bytes;
  request.device_memory_bytes = options.device_memory_bytes;
  request.available_bytes = AvailableMemory();
  EM_ASSIGN_OR_RETURN(const core::MemoryPlan plan, core::PlanMemory(request));

  if (placement.members().empty() || placement.layers() != request.moe_layers ||
      placement.experts() != request.experts)
    return Fail(ErrorCode::kInvalidArgument,
                "loading: the placement is for {} layers of {} experts, the model has {} of {}",
                placement.layers(), placement.experts(), request.moe_layers, request.experts);

  std::unique_ptr<MemoryOwner> owner(new MemoryOwner(options, std::move(checkpoint), plan));
  for (const DeviceId member : placement.members()) {
    const DomainId id = owner->DomainOf(member);
    if (owner->FindDomain(id) != nullptr) continue;
    EM_ASSIGN_OR_RETURN(auto domain, owner->MakeDomain(id));
    EM_ASSIGN_OR_RETURN(domain->shared,
                        domain->pool.Allocate(plan.shared_pages, core::PageTag::kShared, member));
    owner->domains_.push_back(std::move(domain));
  }
  for (int layer = 0; layer < owner->moe_layers_; ++layer)
    for (int expert = 0; expert < request.experts; ++expert)
      for (const DeviceId device : placement.Owners(layer, expert)) {
        Domain& domain = *owner->FindDomain(owner->DomainOf(device));
        core::PageRun& run = domain.experts[owner->IndexOf({layer, expert})];
        if (run.count > 0) continue;  // another owner in the domain has it
        EM_ASSIGN_OR_RETURN(run, domain.pool.Allocate(plan.pages_per_expert, core::PageTag::kExpert, device));
      }
  for (const DeviceId member : placement.members())
    EM_RETURN_IF_ERROR(
        owner->SetKvChunks(owner->DomainOf(member), member, static_cast<int>(plan.kv_chunks_per_device)));
  return owner;
}

Expected<std::unique_ptr<MemoryOwner::Domain>> MemoryOwner::MakeDomain(DomainId id) {
  // Addresses for the largest size that this domain can come to; memory is taken page by page.
  const std::uint64_t experts =
      std::uint64_t(moe_layers_) * checkpoint_.spec.moe.experts * plan_.pages_per_expert;
  const std::uint64_t most_kv_pages = std::max<std::uint64_t>(
      std::uint64_t(plan_.kv_chunks_per_device) * plan_.kv_chunk_pages,
      std::max(options_.device_memory_bytes, options_.kv_room_bytes) / plan_.page_bytes);
  const std::uint64_t kv = most_kv_pages * (options_.domain_per_device ? 1 : options_.max_devices);
  const std::uint64_t pages = plan_.shared_pages + experts + kv;
  if (pages > UINT32_MAX)
    return Fail(ErrorCode::kResourceExhausted, "making a domain: pages={} (limit={})", pages, UINT32_MAX);
  auto domain = std::make_unique<Domain>();
  domain->id = id;
  domain->pool = core::PagePool(static_cast<std::uint32_t>(pages));
  domain->experts.resize(std::size_t(moe_layers_) * checkpoint_.spec.moe.experts);
  EM_ASSIGN_OR_RETURN(domain->memory, CreateMemory(fmt::format("elasticmoe-domain-{}", id),
                                                   pages * plan_.page_bytes, options_.pages));
  EM_ASSIGN_OR_RETURN(domain->mapping, Map(domain->memory.get(), 0, pages * plan_.page_bytes, true));
  return domain;
}

std::byte* MemoryOwner::At(const Domain& domain, core::PageRun run) const {
  return domain.mapping.data() + OffsetOf(run);
}

MemoryOwner::Domain* MemoryOwner::FindDomain(DomainId id) const {
  for (const auto& domain : domains_)
    if (domain->id == id) return domain.get();
  return nullptr;
}

Status MemoryOwner::Load() {
  loaded_bytes_ = 0;  // of an attempt that failed
  // Shared weights, experts and KV chunks of a new pool are one run from its start.
  std::vector<Backing> backings;
  for (const auto& domain : domains_) {
    std::uint32_t end = domain->shared.first + domain->shared.count;
    for (const core::PageRun run : domain->experts) end = std::max(end, run.first + run.count);
    for (const core::PageRun run : domain->kv_chunks) end = std::max(end, run.first + run.count);
    backings.emplace_back(domain->mapping.data(), std::size_t(end) * plan_.page_bytes, options_.pages);
  }

  LoadTarget target;
  target.shared = At(*domains_.front(), domains_.front()->shared);
  target.expert = [this](int layer, int expert) {
    for (const auto& domain : domains_)
      if (const core::PageRun run = domain->experts[IndexOf({layer, expert})]; run.count > 0)
        return At(*domain, run);
    EM_CHECK(false, "layer={} expert={} has no pages", layer, expert);
  };
  target.back = [&](const std::byte* data, std::size_t bytes) -> Status {
    for (Backing& backing : backings)
      if (backing.Holds(data)) return backing.Back(data, bytes);
    EM_CHECK(false, "bytes={} are in no domain", bytes);
  };
  const std::int64_t start = Now();
  EM_ASSIGN_OR_RETURN(const LoadReport report,
                      LoadWeights(checkpoint_, layout_, target, threads_, loaded_bytes_));
  const double mebibytes = 1.0 / (1 << 20), seconds = static_cast<double>(Now() - start) * 1e-9;
  LogInfo("read and packed {:.1f} MiB from the page cache and {:.1f} MiB past it in {:.2f} s, {} threads",
          static_cast<double>(report.cached_bytes) * mebibytes,
          static_cast<double>(report.disk_bytes) * mebibytes, seconds, threads_);
  EM_RETURN_IF_ERROR(CopyLoaded(target.back));
  for (Backing& backing : backings)
    EM_RETURN_IF_ERROR(ForEach((backing.bytes() + kHugePage - 1) / kHugePage, threads_, [&](std::size_t i) {
      return backing.Back(backing.data() + i * kHugePage, 1);
    }));
  for (const auto& domain : domains_) domain->has_shared = true;

  std::uint64_t bytes = 0, huge_bytes = 0;
  for (const Backing& backing : backings) {
    bytes += backing.bytes();
    huge_bytes += std::min(backing.bytes(), HugeMapped(backing.data()));
  }
  huge_share_ = static_cast<double>(huge_bytes) / static_cast<double>(bytes);
  if (options_.pages != PageKind::kSmall && huge_share_ < 0.5)
    LogWarn(
        "{:.0f} % of the weights are in huge pages: attaching and remapping will be slow; set "
        "/sys/kernel/mm/transparent_hugepage/shmem_enabled to advise",
        huge_share_ * 100);
  return {};
}

MemoryMap MemoryOwner::Describe() const {
  MemoryMap map;
  map.fingerprint = fingerprint_;
  map.page_bytes = plan_.page_bytes;
  map.pages_per_expert = plan_.pages_per_expert;
  map.blocks_per_chunk = plan_.blocks_per_chunk;
  map.kv_element_bytes = options_.kv_element_bytes;
  map.domain_per_device = options_.domain_per_device;
  map.huge_share = huge_share_;
  for (const auto& domain : domains_) {
    DomainMap entry;
    entry.domain = domain->id;
    entry.bytes = domain->mapping.size();
    entry.shared_offset = OffsetOf(domain->shared);
    for (const core::PageRun run : domain->experts)
      entry.expert_offsets.push_back(run.count > 0 ? static_cast<std::int64_t>(OffsetOf(run)) : -1);
    for (const core::PageRun run : domain->kv_chunks) entry.kv_chunks.push_back(OffsetOf(run));
    map.domains.push_back(std::move(entry));
  }
  return map;
}

int MemoryOwner::DomainFd(DomainId id) const {
  const Domain* domain = FindDomain(id);
  return domain == nullptr ? -1 : domain->memory.get();
}

Json MemoryOwner::Accounts() const {
  Json domains = Json::array();
  for (const auto& domain : domains_) {
    const core::PagePool& pool = domain->pool;
    domains.push_back({{"domain", domain->id.value},
                       {"page_bytes", plan_.page_bytes},
                       {"pages", pool.Pages()},
                       {"free_pages", pool.FreePages()},
                       {"shared_pages", pool.UsedBy(core::PageTag::kShared)},
                       {"expert_pages", pool.UsedBy(core::PageTag::kExpert)},
                       {"kv_pages", pool.UsedBy(core::PageTag::kKv)},
                       {"kv_chunks", domain->kv_chunks.size()}});
  }
  return domains;
}

void MemoryOwner::Release(Domain& domain, core::PageRun run) {
  // Freed memory goes back to the machine. Where it does not, the pages are free all the same: their next
  // owner writes them before it reads them.
  if (Status given = Discard(domain.memory.get(), OffsetOf(run), std::size_t(run.count) * plan_.page_bytes);
      !given)
    LogWarn("{}; the pages are free, their memory stays taken", given.error().message);
  domain.pool.Free(run);
  domain.backed = std::min<std::size_t>(domain.backed, OffsetOf(run));
}

Expected<std::vector<std::uint64_t>> MemoryOwner::SetKvChunks(DomainId id, DeviceId device, int chunks) {
  Domain* domain = FindDomain(id);
  if (domain == nullptr) return Fail(ErrorCode::kNotFound, "sizing KV: domain={} does not exist", id);
  if (chunks < 0) return Fail(ErrorCode::kInvalidArgument, "sizing KV: chunks={} is negative", chunks);
  const auto owned =
      static_cast<int>(std::count(domain->kv_accounts.begin(), domain->kv_accounts.end(), device));
  std::vector<core::PageRun> added;
  for (int i = owned; i < chunks; ++i) {
    auto run = domain->pool.Allocate(plan_.kv_chunk_pages, core::PageTag::kKv, device);
    Status backed = run ? Status{} : tl::unexpected<Error>(run.error());
    if (run) {
      added.push_back(*run);
      // Before the weights are there, Load backs everything.
      if (domain->has_shared) backed = Back(*domain, *run);
    }
    if (!backed) {
      for (const core::PageRun taken : added) Release(*domain, taken);
      return tl::unexpected<Error>(std::move(backed.error()));
    }
  }
  for (const core::PageRun run : added) {
    domain->kv_chunks.push_back(run);
    domain->kv_accounts.push_back(device);
  }
  // Chunks leave from the end of the table, whoever they were charged to: the others' ids must not change.
  for (int i = owned; i > chunks; --i) {
    const auto last_owned = std::find(domain->kv_accounts.rbegin(), domain->kv_accounts.rend(), device);
    const DeviceId last = domain->kv_accounts.back();
    Release(*domain, domain->kv_chunks.back());
    *last_owned = last;
    domain->kv_chunks.pop_back();
    domain->kv_accounts.pop_back();
  }
  std::vector<std::uint64_t> offsets;
  for (const core::PageRun run : domain->kv_chunks) offsets.push_back(OffsetOf(run));
  return offsets;
}

Status MemoryOwner::CheckExperts(std::span<const ExpertId> experts) const {
  for (const ExpertId id : experts)
    if (id.layer < 0 || id.layer >= moe_layers_ || id.expert < 0 || id.expert >= checkpoint_.spec.moe.experts)
      return Fail(ErrorCode::kInvalidArgument, "naming an expert: layer={} expert={} (limits={}, {})",
                  id.layer, id.expert, moe_layers_, checkpoint_.spec.moe.experts);
  return {};
}

Status MemoryOwner::MoveExperts(DeviceId device, std::span<const ExpertId> experts) {
  EM_RETURN_IF_ERROR(CheckExperts(experts));
  if (options_.domain_per_device)
    return Fail(ErrorCode::kFailedPrecondition, "moving experts: domains are apart; copy them");
  for (const ExpertId id : experts)
    EM_RETURN_IF_ERROR(domains_.front()->pool.Reaccount(domains_.front()->experts[IndexOf(id)], device));
  return {};
}

Expected<CopyReport> MemoryOwner::CopyKv(std::span<const KvPair> pairs) {
  const auto address = [&](DomainId id, BlockId block) -> std::byte* {
    const Domain* domain = FindDomain(id);
    if (domain == nullptr || block.value < 0) return nullptr;
    const auto chunk = static_cast<std::uint32_t>(block.value) / plan_.blocks_per_chunk;
    if (chunk >= domain->kv_chunks.size()) return nullptr;
    return At(*domain, domain->kv_chunks[chunk]) +
           (static_cast<std::uint32_t>(block.value) % plan_.blocks_per_chunk) * kv_layout_.BlockBytes();
  };
  for (const KvPair& pair : pairs)
    if (address(pair.from_domain, pair.from) == nullptr || address(pair.to_domain, pair.to) == nullptr)
      return Fail(ErrorCode::kNotFound,
                  "copying KV: block {} of domain {} or block {} of domain {} does not exist", pair.from,
                  pair.from_domain, pair.to, pair.to_domain);
  CopyReport report;
  const std::int64_t start = Now();
  std::vector<Copy> copies;
  for (const KvPair& pair : pairs)
    AddCopy(address(pair.to_domain, pair.to), address(pair.from_domain, pair.from), kv_layout_.BlockBytes(),
            copies);
  CopyAll(copies);
  report.bytes = pairs.size() * kv_layout_.BlockBytes();
  report.duration_ns = Now() - start;
  return report;
}

}  // namespace elasticmoe::runtime
