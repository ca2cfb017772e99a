#include "core/memory/page_pool.h"

#include <algorithm>

#include "base/check.h"

namespace elasticmoe::core {

PagePool::PagePool(std::uint32_t pages) : pages_(pages), free_pages_(pages) {
  if (pages > 0) free_.emplace(0, pages);
}

Status PagePool::CheckBudget(DeviceId account, std::uint32_t more) const {
  const auto budget = budgets_.find(account);
  if (budget == budgets_.end() || UsedBy(account) + more <= budget->second) return {};
  return Fail(ErrorCode::kResourceExhausted, "taking pages for device {}: used={} wanted={} (budget={})",
              account, UsedBy(account), more, budget->second);
}

Expected<PageRun> PagePool::Allocate(std::uint32_t count, PageTag tag, DeviceId account) {
  EM_CHECK(count > 0);
  EM_RETURN_IF_ERROR(CheckBudget(account, count));
  const auto at =
      std::find_if(free_.begin(), free_.end(), [&](const auto& run) { return run.second >= count; });
  if (at == free_.end())
    return Fail(ErrorCode::kResourceExhausted, "taking {} pages in one run: free={} of {} in {} runs", count,
                free_pages_, pages_, free_.size());
  const PageRun run{at->first, count};
  const std::uint32_t rest = at->second - count;
  free_.erase(at);
  if (rest > 0) free_.emplace(run.first + count, rest);
  owned_.emplace(run.first, Owned{count, tag, account});
  free_pages_ -= count;
  by_tag_[static_cast<int>(tag)] += count;
  by_device_[account] += count;
  return run;
}

void PagePool::Free(PageRun run) {
  const auto at = owned_.find(run.first);
  EM_CHECK(at != owned_.end() && at->second.count == run.count, "first={} count={}", run.first, run.count);
  by_tag_[static_cast<int>(at->second.tag)] -= run.count;
  by_device_[at->second.account] -= run.count;
  owned_.erase(at);
  free_pages_ += run.count;
  auto inserted = free_.emplace(run.first, run.count).first;
  if (const auto next = std::next(inserted);
      next != free_.end() && inserted->first + inserted->second == next->first) {
    inserted->second += next->second;
    free_.erase(next);
  }
  if (inserted != free_.begin()) {
    const auto before = std::prev(inserted);
    if (before->first + before->second == inserted->first) {
      before->second += inserted->second;
      free_.erase(inserted);
    }
  }
}

Status PagePool::Reaccount(PageRun run, DeviceId account) {
  const auto at = owned_.find(run.first);
  EM_CHECK(at != owned_.end() && at->second.count == run.count, "first={} count={}", run.first, run.count);
  if (at->second.account == account) return {};
  EM_RETURN_IF_ERROR(CheckBudget(account, run.count));
  by_device_[at->second.account] -= run.count;
  by_device_[account] += run.count;
  at->second.account = account;
  return {};
}

Status PagePool::SetBudget(DeviceId device, std::uint32_t pages) {
  if (pages == 0) {
    budgets_.erase(device);
    return {};
  }
  if (UsedBy(device) > pages)
    return Fail(ErrorCode::kFailedPrecondition, "setting the budget of device {}: used={} (budget={})",
                device, UsedBy(device), pages);
  budgets_[device] = pages;
  return {};
}

std::uint32_t PagePool::UsedBy(DeviceId device) const {
  const auto at = by_device_.find(device);
  return at == by_device_.end() ? 0 : at->second;
}

void PagePool::CheckIntegrity() const {
  std::map<std::uint32_t, std::uint32_t> all = free_;
  std::uint32_t free_pages = 0;
  for (const auto& [first, count] : free_) free_pages += count;
  EM_CHECK(free_pages == free_pages_);
  std::map<DeviceId, std::uint32_t> by_device;
  for (const auto& [first, owned] : owned_) {
    EM_CHECK(all.emplace(first, owned.count).second);
    by_device[owned.account] += owned.count;
  }
  std::uint32_t next = 0;
  for (const auto& [first, count] : all) {
    EM_CHECK(first == next && count > 0, "page {} has no or two owners", next);
    next = first + count;
  }
  EM_CHECK(next == pages_);
  for (const auto& [device, count] : by_device) EM_CHECK(UsedBy(device) == count);
  for (const auto& [device, budget] : budgets_) EM_CHECK(UsedBy(device) <= budget);
  std::uint32_t before = 0;
  bool first_run = true;
  for (const auto& [first, count] : free_) {
    EM_CHECK(first_run || before < first, "free runs touch at page {}", first);
    before = first + count;
    first_run = false;
  }
}

}  // namespace elasticmoe::core
