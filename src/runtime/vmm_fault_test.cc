// Every call that takes memory, mappings or descriptors fails once: the operation says so, has changed
// nothing, and works when it is tried again.
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>

#include "core/placement/placement.h"
#include "runtime/hmm/memory_owner.h"
#include "runtime/vmm_calls.h"
#include "runtime/worker/expert_table.h"

namespace elasticmoe::runtime {
namespace {

// What a failure must leave as it was. The C library's own anonymous memory comes and goes: only mappings of
// shared memory are counted.
struct Held {
  std::ptrdiff_t descriptors = 0;
  int mappings = 0;
  std::uint64_t mapped_bytes = 0;
  std::string accounts;  // of the owner, with the memory behind each of its domains
  friend bool operator==(const Held&, const Held&) = default;
};

void PrintTo(const Held& held, std::ostream* out) {
  *out << held.descriptors << " descriptors, " << held.mappings << " mappings of " << held.mapped_bytes
       << " bytes, " << held.accounts;
}

Held Hold(const MemoryOwner* owner = nullptr) {
  Held held;
  const std::filesystem::directory_iterator fds("/proc/self/fd");
  held.descriptors = std::distance(begin(fds), end(fds));
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    unsigned long first = 0, last = 0;
    if (line.find("/memfd:") == line.npos || std::sscanf(line.c_str(), "%lx-%lx", &first, &last) != 2)
      continue;
    ++held.mappings;
    held.mapped_bytes += last - first;
  }
  if (owner == nullptr) return held;
  held.accounts = owner->Accounts().dump() + ToJson(owner->Describe()).dump();
  for (const DomainMap& domain : owner->Describe().domains) {
    struct stat memory = {};
    EXPECT_EQ(::fstat(owner->DomainFd(domain.domain), &memory), 0);
    held.accounts += " blocks " + std::to_string(memory.st_blocks);
  }
  return held;
}

// Runs `operation` with its first call failing, then its second, until it makes no more. Whatever fails
// must leave `held` as it was; what succeeds in spite of the failure is taken back by `undo`. The last run
// has no failure and stays done. Returns the failures that became errors.
int WalkFaults(
    const std::function<Held()>& held, const std::function<Status()>& operation,
    const std::function<void()>& undo = [] {}) {
  int errors = 0;
  const Held before = held();
  for (int n = 0; n < 10'000; ++n) {
    const int error = std::array{ENOMEM, EMFILE, ENOSPC}[n % 3];
    bool hit = false;
    Status done;
    {
      VmmFault fault(n, error);
      done = operation();
      hit = fault.hit();
    }
    if (!hit) {
      EXPECT_TRUE(done) << done.error().message;
      return errors;
    }
    if (done) {
      undo();
    } else {
      ++errors;
      EXPECT_EQ(done.error().code, ErrorCode::kResourceExhausted);
      EXPECT_NE(done.error().message.find(std::strerror(error)), std::string::npos) << done.error().message;
    }
    EXPECT_EQ(held(), before) << "call " << n;
  }
  ADD_FAILURE() << "the operation never ended";
  return errors;
}

Status Ignore(const auto& result) {
  return result ? Status{} : Status(tl::unexpected<Error>(result.error()));
}

class MemoryOwnerFaultTest : public ::testing::Test {
 protected:
  static Expected<std::unique_ptr<MemoryOwner>> Create() {
    HmmOptions options;
    options.model = ELASTICMOE_MODELS "/demo";
    options.max_devices = 4;
    options.domain_per_device = true;
    options.kv_memory_bytes = 2 << 20;
    options.kv_room_bytes = 8 << 20;
    options.pages = PageKind::kSmall;  // what is given back, is given back to the byte
    options.load_threads = 1;          // faults are a thread's own
    return MemoryOwner::Create(options,
                               core::EvenPlacement(Epoch(1), std::vector{DeviceId(0), DeviceId(1)}, 5, 16));
  }
};

TEST_F(MemoryOwnerFaultTest, CreateLeavesNothingBehind) {
  std::unique_ptr<MemoryOwner> owner;
  const int errors = WalkFaults([] { return Hold(); },
                                [&] {
                                  auto created = Create();
                                  if (created) owner = std::move(*created);
                                  return Ignore(created);
                                },
                                [&] { owner.reset(); });
  EXPECT_EQ(errors, 2 * 4);  // a domain: make, size, reserve, map
}

TEST_F(MemoryOwnerFaultTest, LoadWorksWhenTriedAgain) {
  auto owner = Create();
  ASSERT_TRUE(owner) << owner.error().message;
  // An attempt that failed may have backed memory that is the domains' own: only that is not compared.
  EXPECT_GT(WalkFaults([] { return Hold(); }, [&] { return (*owner)->Load(); }), 2);
  EXPECT_EQ((*owner)->LoadedBytes(), (*owner)->TotalBytes());
}

TEST_F(MemoryOwnerFaultTest, OperationsChangeNothingWhenTheyFail) {
  auto created = Create();
  ASSERT_TRUE(created) << created.error().message;
  MemoryOwner& owner = **created;
  ASSERT_TRUE(owner.Load());
  const auto held = [&] { return Hold(&owner); };

  EXPECT_EQ(WalkFaults(held, [&] { return owner.OpenDomain(DomainId(2)); }), 4);
  EXPECT_EQ(WalkFaults(held, [&] { return Ignore(owner.CopyShared(DomainId(2), 0, owner.SharedBytes())); }),
            1);

  std::vector<ExpertId> here;
  const std::vector<std::int64_t> offsets = owner.Describe().Find(DomainId(0))->expert_offsets;
  for (std::size_t i = 0; i < offsets.size(); ++i)
    if (offsets[i] >= 0) here.push_back({static_cast<int>(i) / 16, static_cast<int>(i) % 16});
  ASSERT_GE(here.size(), 4u);
  const std::span<const ExpertId> first(here.data(), 3), hole(here.data() + 1, 1), more(here.data() + 1, 3);
  EXPECT_EQ(WalkFaults(held, [&] { return Ignore(owner.CopyExperts(DomainId(0), DomainId(2), first)); }), 1);
  ASSERT_TRUE(owner.DropExperts(DomainId(2), hole));
  // One expert into the hole and one behind: two pieces to back, the second fails after the first is there.
  EXPECT_EQ(WalkFaults(held, [&] { return Ignore(owner.CopyExperts(DomainId(0), DomainId(2), more)); }), 2);

  EXPECT_EQ(WalkFaults(held, [&] { return Ignore(owner.SetKvChunks(DomainId(2), DeviceId(2), 2)); }), 2);
}

// Giving memory back cannot fail: the pages are free even where the machine keeps the memory.
TEST_F(MemoryOwnerFaultTest, PagesAreFreeThoughTheMachineKeepsTheirMemory) {
  auto created = Create();
  ASSERT_TRUE(created) << created.error().message;
  MemoryOwner& owner = **created;
  ASSERT_TRUE(owner.Load());
  const std::string accounts = owner.Accounts().dump();
  const std::size_t chunks = owner.Describe().Find(DomainId(0))->kv_chunks.size();
  for (int n = 0; n < 2; ++n) {
    ASSERT_TRUE(owner.SetKvChunks(DomainId(0), DeviceId(0), static_cast<int>(chunks) + 2));
    VmmFault fault(n, ENOMEM);
    const auto shrunk = owner.SetKvChunks(DomainId(0), DeviceId(0), static_cast<int>(chunks));
    ASSERT_TRUE(shrunk) << shrunk.error().message;
    EXPECT_TRUE(fault.hit());
    EXPECT_EQ(owner.Accounts().dump(), accounts);
    EXPECT_EQ(shrunk->size(), chunks);
  }
}

class TableFaultTest : public ::testing::TestWithParam<ExpertTableKind> {};

TEST_P(TableFaultTest, AFailureKeepsTheEpochsBeforeAndMapsNothing) {
  constexpr std::uint64_t kStride = 8192;
  constexpr int kLayers = 2, kExperts = 4;
  const Fd fd = *CreateMemory("test", kLayers * kExperts * kStride, PageKind::kSmall);
  const Mapping domain = *Map(fd.get(), 0, kLayers * kExperts * kStride, true);
  for (int i = 0; i < kLayers * kExperts; ++i) domain.data()[i * kStride] = std::byte(i);
  const ExpertTableShape shape{kLayers, kExperts, kStride, kStride, 2};
  const auto table = MakeExpertTable(GetParam(), shape, domain, fd.get());
  const auto owned = [](std::initializer_list<int> experts) {
    std::vector<OwnedExpert> list;
    for (const int i : experts) list.push_back({i / kExperts, i % kExperts, i * kStride});
    return list;
  };
  const auto first = table->Prepare(0, owned({0, 2, 5}));
  ASSERT_TRUE(first) << first.error().message;
  std::vector<std::byte*> second;
  const auto prepare = [&] {
    auto prepared = table->Prepare(1, owned({2, 3, 7}));
    if (prepared) second = *prepared;
    return Ignore(prepared);
  };
  // A table without its ring's ranges: what succeeds is taken back by a table that failed.
  const int errors = WalkFaults([] { return Hold(); }, prepare,
                                [&] {
                                  if (GetParam() == ExpertTableKind::kPointer) return;
                                  VmmFault fault(0, ENOMEM);
                                  (void)table->Prepare(1, owned({1, 4, 6}));
                                });
  EXPECT_EQ(errors, GetParam() == ExpertTableKind::kRemap ? kLayers + 3 : 0);
  const auto value = [](const std::byte* at) { return std::to_integer<int>(*at); };
  EXPECT_EQ(value((*first)[0]), 0);
  EXPECT_EQ(value((*first)[1]), 2);
  EXPECT_EQ(value((*first)[2]), 5);
  ASSERT_EQ(second.size(), 3u);
  EXPECT_EQ(value(second[0]), 2);
  EXPECT_EQ(value(second[1]), 3);
  EXPECT_EQ(value(second[2]), 7);
}

INSTANTIATE_TEST_SUITE_P(Kinds, TableFaultTest,
                         ::testing::Values(ExpertTableKind::kPointer, ExpertTableKind::kRemap),
                         [](const auto& info) { return std::string(ToString(info.param)); });

}  // namespace
}  // namespace elasticmoe::runtime
