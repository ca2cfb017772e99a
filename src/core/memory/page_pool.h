// Bookkeeping of one domain's physical pages: who has which, for what, within which budget. Pure: it moves no
// memory, it only says where.
//
// Invariants (CheckIntegrity):
//  1. Every page is free or in exactly one run that was given out.
//  2. Pages of a device <= its budget.
//  3. Neighbouring free runs are one run.
#pragma once

#include <array>
#include <cstdint>
#include <map>

#include "base/error.h"
#include "base/ids.h"

namespace elasticmoe::core {

struct PageRun {
  std::uint32_t first = 0;
  std::uint32_t count = 0;
  friend bool operator==(const PageRun&, const PageRun&) = default;
};

enum class PageTag { kShared, kExpert, kKv };
inline constexpr int kPageTags = 3;

class PagePool {
 public:
  explicit PagePool(std::uint32_t pages);

  // The lowest free run of `count` pages, charged to `account`. kResourceExhausted with the numbers, if there
  // is none or the account's budget is short; nothing has changed then. REQUIRES: count > 0.
  Expected<PageRun> Allocate(std::uint32_t count, PageTag tag, DeviceId account);

  // REQUIRES: the run was given out, whole.
  void Free(PageRun run);

  // Charges a run to another device: no page moves. Same errors as Allocate.
  Status Reaccount(PageRun run, DeviceId account);

  // 0 pages = no budget (the default). kFailedPrecondition if the device has more already.
  Status SetBudget(DeviceId device, std::uint32_t pages);

  std::uint32_t Pages() const { return pages_; }
  std::uint32_t FreePages() const { return free_pages_; }
  std::uint32_t UsedBy(PageTag tag) const { return by_tag_[static_cast<int>(tag)]; }
  std::uint32_t UsedBy(DeviceId device) const;
  void CheckIntegrity() const;

 private:
  struct Owned {
    std::uint32_t count;
    PageTag tag;
    DeviceId account;
  };
  Status CheckBudget(DeviceId account, std::uint32_t more) const;

  std::uint32_t pages_;
  std::uint32_t free_pages_;
  std::map<std::uint32_t, std::uint32_t> free_;  // first -> count
  std::map<std::uint32_t, Owned> owned_;         // first -> run
  std::array<std::uint32_t, kPageTags> by_tag_{};
  std::map<DeviceId, std::uint32_t> by_device_;
  std::map<DeviceId, std::uint32_t> budgets_;
};

}  // namespace elasticmoe::core
