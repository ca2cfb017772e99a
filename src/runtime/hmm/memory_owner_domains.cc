// Memory that comes and goes by domains, and what is copied between them.
#include <pthread.h>
#include <sched.h>
#include <sys/stat.h>

#include <algorithm>

#include "base/check.h"
#include "base/clock.h"
#include "base/log.h"
#include "runtime/hmm/loader.h"
#include "runtime/hmm/memory_owner.h"

namespace elasticmoe::runtime {
namespace {

// What one thread copies at a time.
constexpr std::size_t kCopyBytes = std::size_t{1} << 20;
// A further thread costs as much as copying a part of this: the tails of sequences are less.
constexpr std::size_t kThreadBytes = std::size_t{4} << 20;
// A domain's KV memory comes for the most part after its device serves.
constexpr std::uint32_t kFirstKvPart = 4;
constexpr std::size_t kStandbyPiece = 2 * kHugePage;
constexpr std::size_t kLeastBackPages = 4;  // huge ones, by a thread

// This thread, and those that it starts, on these cores alone while it lives. Best effort; none: no change.
class OnCpus {
 public:
  explicit OnCpus(std::span<const int> cpus) {
    if (cpus.empty() || pthread_getaffinity_np(pthread_self(), sizeof(before_), &before_) != 0) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    for (const int cpu : cpus)
      if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_SET(cpu, &set);
    changed_ = pthread_setaffinity_np(pthread_self(), sizeof(set), &set) == 0;
  }
  ~OnCpus() {
    if (changed_) pthread_setaffinity_np(pthread_self(), sizeof(before_), &before_);
  }
  OnCpus(const OnCpus&) = delete;
  OnCpus& operator=(const OnCpus&) = delete;

 private:
  cpu_set_t before_;
  bool changed_ = false;
};

}  // namespace

Status MemoryOwner::CopyLoaded(const std::function<Status(const std::byte*, std::size_t)>& back) {
  std::vector<Copy> copies;
  for (std::size_t i = 1; i < domains_.size(); ++i)
    AddCopy(At(*domains_[i], domains_[i]->shared), At(*domains_.front(), domains_.front()->shared),
            layout_.SharedBytes(), copies);
  for (std::size_t i = 0; i < domains_.front()->experts.size(); ++i) {
    const std::byte* loaded = nullptr;  // by the first owner; further ones get it from there
    for (const auto& domain : domains_) {
      if (domain->experts[i].count == 0) continue;
      std::byte* here = At(*domain, domain->experts[i]);
      if (loaded == nullptr) loaded = here;
      if (loaded != here) AddCopy(here, loaded, layout_.ExpertBytes(), copies);
    }
  }
  return ForEach(copies.size(), threads_, [&](std::size_t i) -> Status {
    EM_RETURN_IF_ERROR(back(copies[i].to, copies[i].bytes));
    CopyPastCaches(copies[i].to, copies[i].from, copies[i].bytes);
    return {};
  });
}

void MemoryOwner::AddCopy(std::byte* to, const std::byte* from, std::size_t bytes,
                          std::vector<Copy>& copies) {
  for (std::size_t at = 0; at < bytes; at += kCopyBytes)
    copies.push_back({to + at, from + at, std::min(kCopyBytes, bytes - at)});
}

void MemoryOwner::CopyAll(std::span<const Copy> copies, std::span<const int> cpus) const {
  const OnCpus on_cpus(cpus);
  const auto copy = [&](std::size_t i) -> Status {
    CopyPastCaches(copies[i].to, copies[i].from, copies[i].bytes);
    return {};
  };
  std::size_t bytes = 0;
  for (const Copy& one : copies) bytes += one.bytes;
  const auto most = static_cast<int>(std::min<std::size_t>(bytes / kThreadBytes + 1, copies.size()));
  const int cores = cpus.empty() ? threads_ : static_cast<int>(cpus.size());
  EM_CHECK(ForEach(copies.size(), std::clamp(most, 1, cores), copy));
}

Status MemoryOwner::Back(const Domain& domain, core::PageRun run) const {
  const std::size_t end = OffsetOf(run) + std::size_t(run.count) * plan_.page_bytes;
  const std::size_t begin = std::min(std::max<std::size_t>(OffsetOf(run), domain.backed), end);
  // Few calls: each has the kernel visit all cores. They begin with whole huge pages, but for the first.
  const std::size_t part =
      std::max((end - begin) / static_cast<std::size_t>(threads_) / kHugePage + 1, kLeastBackPages) *
      kHugePage;
  std::vector<std::size_t> cuts;
  for (std::size_t at = begin; at < end; at = (at / kHugePage) * kHugePage + part) cuts.push_back(at);
  cuts.push_back(end);
  return ForEach(cuts.size() - 1, threads_, [&](std::size_t i) {
    return Populate(domain.mapping.data() + cuts[i], cuts[i + 1] - cuts[i], options_.pages);
  });
}

Status MemoryOwner::OpenDomain(DomainId id) {
  if (!options_.domain_per_device)
    return Fail(ErrorCode::kFailedPrecondition, "opening a domain: all devices share one");
  if (FindDomain(id) != nullptr) return Fail(ErrorCode::kAlreadyExists, "opening domain={}: it is open", id);
  EM_ASSIGN_OR_RETURN(auto domain, TakeStandby(id));
  EM_ASSIGN_OR_RETURN(domain->shared,
                      domain->pool.Allocate(plan_.shared_pages, core::PageTag::kShared, DeviceId(id.value)));
  domains_.push_back(std::move(domain));
  return {};
}

Expected<CopyReport> MemoryOwner::CopyShared(DomainId to, std::uint64_t offset, std::uint64_t bytes,
                                             std::span<const int> cpus) {
  Domain* target = FindDomain(to);
  const auto source = std::find_if(domains_.begin(), domains_.end(), [&](const auto& domain) {
    return domain->has_shared && domain->id != to;
  });
  if (target == nullptr || source == domains_.end())
    return Fail(ErrorCode::kNotFound, "copying shared weights: domain={} is not open, or no other has them",
                to);
  if (offset > SharedBytes() || bytes > SharedBytes() - offset)
    return Fail(ErrorCode::kInvalidArgument, "copying shared weights: offset={} bytes={} (limit={})", offset,
                bytes, SharedBytes());
  CopyReport report;
  std::byte* here = At(*target, target->shared) + offset;
  if (offset == 0) EM_RETURN_IF_ERROR(Back(*target, target->shared));
  const std::int64_t start = Now();
  std::vector<Copy> copies;
  AddCopy(here, At(**source, (*source)->shared) + offset, bytes, copies);
  CopyAll(copies, cpus);
  report.bytes = bytes;
  report.duration_ns = Now() - start;
  if (offset + bytes == SharedBytes()) target->has_shared = true;
  return report;
}

Status MemoryOwner::CloseDomain(DomainId id) {
  const auto at =
      std::find_if(domains_.begin(), domains_.end(), [&](const auto& domain) { return domain->id == id; });
  if (at == domains_.end()) return Fail(ErrorCode::kNotFound, "closing domain={}: it does not exist", id);
  for (std::size_t i = 0; i < (*at)->experts.size(); ++i) {
    if ((*at)->experts[i].count == 0) continue;
    const bool elsewhere = std::any_of(domains_.begin(), domains_.end(), [&](const auto& domain) {
      return domain->id != id && domain->experts[i].count > 0;
    });
    if (!elsewhere)
      return Fail(ErrorCode::kFailedPrecondition,
                  "closing domain={}: layer={} expert={} is nowhere else; move it first", id,
                  i / checkpoint_.spec.moe.experts, i % checkpoint_.spec.moe.experts);
  }
  std::unique_ptr<Domain> closed = std::move(*at);
  domains_.erase(at);
  if (!options_.standby_memory || standby_) return {};
  // Its memory waits for the next, as far as that needs it.
  const std::size_t kept = std::min(StandbyTarget(), closed->mapping.size());
  if (!Discard(closed->memory.get(), kept, closed->mapping.size() - kept)) return {};
  closed->pool = core::PagePool(closed->pool.Pages());
  closed->shared = {};
  closed->experts.assign(closed->experts.size(), {});
  closed->kv_chunks.clear();
  closed->kv_accounts.clear();
  closed->has_shared = false;
  closed->backed = 0;
  standby_ = std::move(closed);
  standby_backed_ = 0;
  return {};
}

Expected<std::unique_ptr<MemoryOwner::Domain>> MemoryOwner::TakeStandby(DomainId id) {
  if (!standby_) return MakeDomain(id);
  std::unique_ptr<Domain> domain = std::move(standby_);
  domain->id = id;
  domain->backed = std::min(standby_backed_, domain->mapping.size());
  return domain;
}

std::size_t MemoryOwner::StandbyTarget() const {
  const std::uint64_t experts =
      std::uint64_t(moe_layers_) * checkpoint_.spec.moe.experts / (domains_.size() + 1) + 1;
  const std::uint64_t kv_chunks = plan_.kv_chunks_per_device / kFirstKvPart + 1;
  const std::size_t bytes =
      (plan_.shared_pages + experts * plan_.pages_per_expert + kv_chunks * plan_.kv_chunk_pages) *
      plan_.page_bytes;
  return options_.device_memory_bytes == 0 ? bytes : std::min(bytes, options_.device_memory_bytes);
}

bool MemoryOwner::BackStandby() {
  if (!options_.standby_memory || !options_.domain_per_device ||
      domains_.size() >= static_cast<std::size_t>(options_.max_devices))
    return false;
  const std::size_t target = StandbyTarget();
  if (standby_ && standby_backed_ >= target) return false;
  // The rest of the machine must not come to miss it.
  if (AvailableMemory() < target + (target - (standby_ ? standby_backed_ : 0))) return false;
  if (!standby_) {
    auto made = MakeDomain(DomainId(options_.max_devices));
    if (!made) return false;
    standby_ = std::move(*made);
    standby_backed_ = 0;
  }
  const std::size_t end = std::min(standby_->mapping.size(), target);
  const std::size_t bytes = std::min(kStandbyPiece, end - std::min(end, standby_backed_));
  if (!Populate(standby_->mapping.data() + standby_backed_, bytes, options_.pages)) return false;
  standby_backed_ += bytes;
  if (bytes > 0 && standby_backed_ < end) return true;
  standby_backed_ = std::max(standby_backed_, target);
  LogInfo("{:.1f} MiB are held ready for the next device", static_cast<double>(end) / (1 << 20));
  return false;
}

std::uint64_t MemoryOwner::StandbyBytes() const {
  struct stat info = {};
  if (!standby_ || ::fstat(standby_->memory.get(), &info) != 0) return 0;
  return static_cast<std::uint64_t>(info.st_blocks) * 512;
}

Expected<CopyReport> MemoryOwner::CopyExperts(DomainId from, DomainId to, std::span<const ExpertId> experts,
                                              std::span<const int> cpus) {
  EM_RETURN_IF_ERROR(CheckExperts(experts));
  Domain* source = FindDomain(from);
  Domain* target = FindDomain(to);
  if (source == nullptr || target == nullptr || source == target)
    return Fail(ErrorCode::kNotFound, "copying experts: from={} to={} are no two open domains", from, to);
  for (const ExpertId id : experts)
    if (source->experts[IndexOf(id)].count == 0)
      return Fail(ErrorCode::kNotFound, "copying experts: layer={} expert={} is not in domain={}", id.layer,
                  id.expert, from);
  CopyReport report;
  std::vector<std::pair<ExpertId, core::PageRun>> taken;
  const auto undo = [&] {
    for (const auto& [id, run] : taken) Release(*target, run);
  };
  for (const ExpertId id : experts) {
    if (target->experts[IndexOf(id)].count > 0) continue;  // there already: the answer is the same
    auto run = target->pool.Allocate(plan_.pages_per_expert, core::PageTag::kExpert, DeviceId(to.value));
    if (!run) {
      undo();
      return tl::unexpected<Error>(std::move(run.error()));
    }
    taken.emplace_back(id, *run);
  }
  // Neighbours are backed together: an expert alone may hold no whole huge page.
  for (std::size_t i = 0; i < taken.size();) {
    core::PageRun span = taken[i].second;
    for (++i; i < taken.size() && taken[i].second.first == span.first + span.count; ++i)
      span.count += taken[i].second.count;
    if (Status backed = Back(*target, span); !backed) {
      undo();
      return tl::unexpected<Error>(std::move(backed.error()));
    }
  }
  const std::int64_t start = Now();
  std::vector<Copy> copies;
  for (const auto& [id, run] : taken) {
    AddCopy(At(*target, run), At(*source, source->experts[IndexOf(id)]), layout_.ExpertBytes(), copies);
    report.bytes += layout_.ExpertBytes();
  }
  CopyAll(copies, cpus);
  report.duration_ns = Now() - start;
  for (const auto& [id, run] : taken) target->experts[IndexOf(id)] = run;
  for (const ExpertId id : experts)
    report.offsets.push_back(static_cast<std::int64_t>(OffsetOf(target->experts[IndexOf(id)])));
  return report;
}

Expected<int> MemoryOwner::DropExperts(DomainId id, std::span<const ExpertId> experts) {
  EM_RETURN_IF_ERROR(CheckExperts(experts));
  Domain* domain = FindDomain(id);
  if (domain == nullptr) return Fail(ErrorCode::kNotFound, "dropping experts: domain={} does not exist", id);
  for (const ExpertId expert : experts) {
    const bool elsewhere = std::any_of(domains_.begin(), domains_.end(), [&](const auto& other) {
      return other.get() != domain && other->experts[IndexOf(expert)].count > 0;
    });
    if (domain->experts[IndexOf(expert)].count > 0 && !elsewhere)
      return Fail(ErrorCode::kFailedPrecondition, "dropping experts: layer={} expert={} is nowhere else",
                  expert.layer, expert.expert);
  }
  // When the domain shrinks back it will want that memory again, and machines may take milliseconds for a
  // huge page: kept, where the rest of the machine does not miss it.
  const bool keep = options_.standby_memory && AvailableMemory() >= StandbyTarget();
  int pages = 0;
  for (const ExpertId expert : experts) {
    core::PageRun& run = domain->experts[IndexOf(expert)];
    if (run.count == 0) continue;
    pages += static_cast<int>(run.count);
    if (keep)
      domain->pool.Free(run);
    else
      Release(*domain, run);
    run = core::PageRun{};
  }
  return pages;
}

}  // namespace elasticmoe::runtime
