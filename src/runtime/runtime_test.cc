#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <thread>

#include "runtime/channel.h"
#include "runtime/exchange.h"
#include "runtime/futex.h"
#include "runtime/hmm/memory_map.h"
#include "runtime/hmm/memory_owner.h"
#include "runtime/vmm.h"

namespace elasticmoe::runtime {
namespace {

TEST(Channel, CarriesJsonAndDescriptors) {
  auto ends = Channel::Pair();
  ASSERT_TRUE(ends);
  Channel peer(std::move(ends->second));
  const Fd memory = *CreateMemory("channel-test", 4096, PageKind::kSmall);
  ASSERT_TRUE(ends->first.Send({{"op", "take"}}, {memory.get(), memory.get()}));
  auto message = peer.Receive(1000);
  ASSERT_TRUE(message) << message.error().message;
  EXPECT_EQ(message->body["op"], "take");
  EXPECT_EQ(message->fds.size(), 2u);
}

TEST(Channel, ErrorsTravelAndAGonePeerIsUnavailable) {
  auto ends = Channel::Pair();
  Channel peer(std::move(ends->second));
  ASSERT_TRUE(peer.Send(ErrorBody({ErrorCode::kNotFound, "no such domain"})));
  auto answer = ends->first.Call({{"op", "x"}}, 1000);
  ASSERT_FALSE(answer);
  EXPECT_EQ(answer.error().code, ErrorCode::kNotFound);
  EXPECT_EQ(answer.error().message, "no such domain");
  EXPECT_EQ(ends->first.Receive(0).error().code, ErrorCode::kDeadlineExceeded);
  peer.Close();
  EXPECT_EQ(ends->first.Receive(1000).error().code, ErrorCode::kUnavailable);
  EXPECT_FALSE(Channel::Connect("elasticmoe/test/nobody"));
}

TEST(Channel, AnAbstractNameIsTakenOnce) {
  auto first = Listener::Bind("elasticmoe/test/name");
  ASSERT_TRUE(first);
  auto second = Listener::Bind("elasticmoe/test/name");
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().code, ErrorCode::kAlreadyExists);
}

TEST(Channel, GarbageIsRefusedNotBelieved) {
  auto ends = Channel::Pair();
  const std::uint32_t head[2] = {0xffffffffu, 0};
  ASSERT_EQ(::write(ends->second.get(), head, sizeof(head)), static_cast<ssize_t>(sizeof(head)));
  EXPECT_EQ(ends->first.Receive(1000).error().code, ErrorCode::kDataLoss);
}

TEST(Vmm, TwoMappingsShareOneMemoryAndRemappingMovesNoByte) {
  const Fd memory = *CreateMemory("vmm-test", 4 * kHugePage, PageKind::kSmall);
  Mapping owner = *Map(memory.get(), 0, 4 * kHugePage, true);
  Mapping other = *Map(memory.get(), 0, 4 * kHugePage, false);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(owner.data()) % kHugePage, 0u);
  std::memset(owner.data() + kHugePage, 7, 16);
  EXPECT_EQ(other.data()[kHugePage + 5], std::byte{7});

  // A slot of a contiguous range shows another expert's pages.
  Mapping slots = *Reserve(2 * kHugePage);
  ASSERT_TRUE(MapInto(slots, 0, memory.get(), 0, kHugePage, false));
  EXPECT_EQ(slots.data()[5], std::byte{0});
  ASSERT_TRUE(MapInto(slots, 0, memory.get(), kHugePage, kHugePage, false));
  EXPECT_EQ(slots.data()[5], std::byte{7});
}

TEST(Vmm, DiscardedMemoryReadsAsZero) {
  const Fd memory = *CreateMemory("vmm-test", kHugePage, PageKind::kSmall);
  Mapping mapping = *Map(memory.get(), 0, kHugePage, true);
  ASSERT_TRUE(Populate(mapping.data(), kHugePage, PageKind::kSmall));
  std::memset(mapping.data(), 1, kHugePage);
  ASSERT_TRUE(Discard(memory.get(), 4096, 8192));
  EXPECT_EQ(mapping.data()[0], std::byte{1});
  EXPECT_EQ(mapping.data()[4096], std::byte{0});
}

TEST(SharedWord, AWaiterWakesAndMayGiveUp) {
  Mapping page = *Map(CreateMemory("word", 4096, PageKind::kSmall)->get(), 0, 4096, true);
  auto& word = *reinterpret_cast<SharedWord*>(page.data());
  std::jthread setter([&] { word.Set(3); });
  EXPECT_TRUE(WaitFor(
      word, {0}, [](std::uint32_t v) { return v == 3; }, [] { return false; }));
  EXPECT_FALSE(WaitFor(
      word, {10}, [](std::uint32_t v) { return v == 4; }, [] { return true; }));
}

TEST(Tags, OnlyGrowAndWrap) {
  EXPECT_TRUE(Reached(LayerTag(5, 3, 1), LayerTag(5, 3, 1)));
  EXPECT_FALSE(Reached(LayerTag(5, 3, 1), LayerTag(5, 3, 2)));
  EXPECT_FALSE(Reached(LayerTag(5, 3, 2), LayerTag(6, 3, 0)));
  EXPECT_TRUE(Reached(2u, 0xfffffffeu));
}

TEST(Exchange, AttachedAgainShowsTheSameTables) {
  ExchangeShape shape{3, 8, 4, 64, 16, 32, 100, 2, 2, 6, 2};
  auto exchange = Exchange::Create(shape);
  ASSERT_TRUE(exchange);
  core::Placement placement = core::EvenPlacement(Epoch(5), {DeviceId(0), DeviceId(2)}, 2, 6);
  placement.SetOwners(1, 3, {DeviceId(0), DeviceId(2)});
  exchange->WritePlacement(1, placement);
  exchange->BlockTable(3)[3] = 17;
  auto again = Exchange::Attach(::fcntl(exchange->fd(), F_DUPFD_CLOEXEC, 0));
  ASSERT_TRUE(again) << again.error().message;
  EXPECT_EQ(again->BlockTable(3)[3], 17u);
  for (int rank = 0; rank < 2; ++rank)
    for (int expert = 0; expert < 6; ++expert)
      EXPECT_EQ(again->OwnerFor(1, 1, expert, rank), placement.OwnerFor(1, expert, rank).value);
  const Fd other = *CreateMemory("other", 1 << 20, PageKind::kSmall);
  EXPECT_FALSE(Exchange::Attach(::fcntl(other.get(), F_DUPFD_CLOEXEC, 0)));
}

TEST(Exchange, AStepTakesItsSecondViewFromALayerThatNobodyHasEntered) {
  const auto exchange = Exchange::Create({3, 8, 4, 64, 16, 32, 100, 2, 4, 6, 2});
  ASSERT_TRUE(exchange);
  exchange->header().views[0] = {5, 1, 2, {0, 2}};
  exchange->header().views[1] = {6, 2, 2, {2, 1}};
  exchange->BeginProgress();
  EXPECT_EQ(exchange->EnterLayer(0), 0);
  EXPECT_EQ(exchange->EnterLayer(1), 0);
  EXPECT_EQ(exchange->Participants(), (std::vector<std::int32_t>{0, 2}));
  EXPECT_EQ(exchange->SwitchLayer(), 4);
  EXPECT_TRUE(exchange->SwitchView());
  EXPECT_EQ(exchange->SwitchLayer(), 2);
  EXPECT_FALSE(exchange->SwitchView()) << "once a step";
  EXPECT_EQ(exchange->EnterLayer(1), 0) << "who comes late sees what the first one saw";
  EXPECT_EQ(exchange->EnterLayer(2), 1);
  EXPECT_EQ(exchange->Participants(), (std::vector<std::int32_t>{0, 2, 1}));
  exchange->BeginProgress();
  EXPECT_EQ(exchange->EnterLayer(3), 0);
  EXPECT_FALSE(exchange->SwitchView()) << "too late";
}

TEST(Exchange, AllDevicesAgreeOnTheViewOfALayer) {
  constexpr int kLayers = 500, kDevices = 3;
  const auto exchange = Exchange::Create({kDevices, 8, 4, 64, 16, 32, 100, 2, kLayers, 6, 2});
  ASSERT_TRUE(exchange);
  int switched = 0;
  for (int round = 0; round < 50; ++round) {
    exchange->BeginProgress();
    std::vector<std::vector<int>> seen(kDevices);
    bool done = false;
    // In every other round nobody enters the last layer before the switch was tried: it cannot come too late.
    std::atomic<bool> tried = round % 2 == 0;
    {
      std::vector<std::jthread> devices;
      for (int device = 0; device < kDevices; ++device)
        devices.emplace_back([&, device] {
          for (int layer = 0; layer < kLayers; ++layer) {
            while (layer == kLayers - 1 && !tried) std::this_thread::yield();
            seen[device].push_back(exchange->EnterLayer(layer));
          }
        });
      done = exchange->SwitchView();
      tried = true;
    }
    switched += done;
    const int first = exchange->SwitchLayer();
    EXPECT_EQ(first < kLayers, done);
    for (const std::vector<int>& views : seen)
      for (int layer = 0; layer < kLayers; ++layer) ASSERT_EQ(views[layer], layer >= first) << layer;
  }
  EXPECT_GE(switched, 25);
}

TEST(Exchange, SamplingSurvivesTheTrip) {
  core::GenerationRequest request;
  request.prompt = {1, 2, 3};
  request.min_tokens = 4;
  request.stop_token_ids = {9};
  request.sampling.temperature = 0.5F;
  request.sampling.seed = 77;
  request.sampling.logit_bias = {{5, -1.5F}};
  auto slot = std::make_unique<SlotSampling>();
  const TokenId eos[] = {2};
  WriteSampling(request, eos, *slot);
  const core::SamplingParams back = ReadSampling(*slot);
  EXPECT_EQ(back.temperature, 0.5F);
  EXPECT_EQ(back.seed, 77u);
  EXPECT_EQ(back.logit_bias, request.sampling.logit_bias);
  EXPECT_EQ(slot->prompt_tokens, 3);
  EXPECT_EQ(slot->banned_count, 2);
}

class MemoryOwnerTest : public ::testing::Test {
 protected:
  static Expected<std::unique_ptr<MemoryOwner>> Create(int devices, bool apart, bool standby_memory = false) {
    HmmOptions options;
    options.model = ELASTICMOE_MODELS "/demo";
    options.max_devices = 4;
    options.domain_per_device = apart;
    options.standby_memory = standby_memory;
    options.kv_memory_bytes = 2 << 20;
    options.pages = PageKind::kSmall;
    std::vector<DeviceId> members;
    for (int i = 0; i < devices; ++i) members.emplace_back(i);
    return MemoryOwner::Create(options, core::EvenPlacement(Epoch(1), members, 5, 16));
  }
};

TEST_F(MemoryOwnerTest, GivesEveryExpertAPlaceAndTheMapSurvivesJson) {
  auto owner = Create(3, false);
  ASSERT_TRUE(owner) << owner.error().message;
  ASSERT_TRUE((*owner)->Load());
  EXPECT_EQ((*owner)->LoadedBytes(), (*owner)->TotalBytes());
  const MemoryMap map = (*owner)->Describe();
  ASSERT_EQ(map.domains.size(), 1u);
  EXPECT_EQ(map.domains[0].expert_offsets.size(), 5u * 16);
  for (const std::int64_t offset : map.domains[0].expert_offsets) EXPECT_GE(offset, 0);
  const auto back = MemoryMapFromJson(ToJson(map));
  ASSERT_TRUE(back);
  EXPECT_EQ(back->domains[0].expert_offsets, map.domains[0].expert_offsets);
  EXPECT_FALSE(MemoryMapFromJson(Json::object()));
}

TEST_F(MemoryOwnerTest, CopiesExpertsBetweenDomainsAndRefusesToLoseOne) {
  auto created = Create(2, true);
  ASSERT_TRUE(created) << created.error().message;
  MemoryOwner& owner = **created;
  ASSERT_TRUE(owner.Load());
  ASSERT_TRUE(owner.OpenDomain(DomainId(2)));
  EXPECT_FALSE(owner.OpenDomain(DomainId(2)));
  const std::uint64_t half = owner.SharedBytes() / 2;
  EXPECT_TRUE(owner.CopyShared(DomainId(2), 0, half));
  EXPECT_TRUE(owner.CopyShared(DomainId(2), half, owner.SharedBytes() - half));
  EXPECT_FALSE(owner.CopyShared(DomainId(2), half, owner.SharedBytes()));  // beyond the end
  EXPECT_FALSE(owner.CopyShared(DomainId(3), 0, half));                    // not open
  const ExpertId moved[] = {{0, 0}, {1, 1}};
  EXPECT_FALSE(owner.DropExperts(DomainId(0), moved));  // nowhere else
  const auto report = owner.CopyExperts(DomainId(0), DomainId(2), moved);
  ASSERT_TRUE(report) << report.error().message;
  EXPECT_EQ(report->bytes, 2 * 196'608u);
  EXPECT_TRUE(owner.DropExperts(DomainId(0), moved));
  EXPECT_EQ(owner.Describe().Find(DomainId(0))->expert_offsets[0], -1);
  EXPECT_FALSE(owner.CloseDomain(DomainId(2)));  // it now holds the only ones
  EXPECT_TRUE(owner.CopyExperts(DomainId(2), DomainId(1), moved));
  EXPECT_TRUE(owner.CloseDomain(DomainId(2)));
}

TEST_F(MemoryOwnerTest, MemoryIsHeldReadyForTheNextDomain) {
  auto created = Create(2, true, true);
  ASSERT_TRUE(created) << created.error().message;
  MemoryOwner& owner = **created;
  ASSERT_TRUE(owner.Load());
  const auto held = [&](int domain) {
    struct stat info = {};
    EXPECT_EQ(::fstat(owner.DomainFd(DomainId(domain)), &info), 0);
    return static_cast<std::uint64_t>(info.st_blocks) * 512;
  };
  const auto back_all = [&] {
    while (owner.BackStandby()) {
    }
    return owner.StandbyBytes();
  };
  EXPECT_EQ(owner.StandbyBytes(), 0u);
  const std::uint64_t first = back_all();
  EXPECT_GT(first, owner.SharedBytes() + 5 * 16 / 3 * 196'608);
  EXPECT_LT(first, held(0));  // a third of the experts, and the first part of the KV
  EXPECT_EQ(back_all(), first);
  ASSERT_TRUE(owner.OpenDomain(DomainId(2)));
  EXPECT_EQ(owner.StandbyBytes(), 0u);
  EXPECT_EQ(held(2), first);
  ASSERT_TRUE(owner.CopyShared(DomainId(2), 0, owner.SharedBytes()));
  const ExpertId copied[] = {{0, 0}, {1, 1}};
  ASSERT_TRUE(owner.CopyExperts(DomainId(0), DomainId(2), copied));
  EXPECT_EQ(held(2), first);
  // What a domain gives up it keeps, for when it comes back.
  const std::uint64_t full = held(0);
  ASSERT_TRUE(owner.DropExperts(DomainId(0), copied));
  EXPECT_EQ(held(0), full);
  ASSERT_TRUE(owner.CopyExperts(DomainId(2), DomainId(0), copied));
  EXPECT_EQ(held(0), full);
  // The closed domain's memory waits for the next; one beyond the last device's is not asked for.
  ASSERT_TRUE(owner.CloseDomain(DomainId(2)));
  EXPECT_EQ(owner.StandbyBytes(), first);
  ASSERT_TRUE(owner.OpenDomain(DomainId(3)));
  EXPECT_EQ(held(3), first);
  EXPECT_EQ(owner.Describe().Find(DomainId(3))->expert_offsets[0], -1);
  EXPECT_LT(back_all(), first);  // for one of four domains
  ASSERT_TRUE(owner.OpenDomain(DomainId(2)));
  EXPECT_EQ(back_all(), 0u);
}

TEST_F(MemoryOwnerTest, KvGrowsAndShrinksByDevice) {
  auto owner = Create(2, false);
  ASSERT_TRUE(owner);
  const std::size_t before = (*owner)->Describe().domains[0].kv_chunks.size();
  auto grown = (*owner)->SetKvChunks(DomainId(0), DeviceId(2), 1);
  ASSERT_TRUE(grown) << grown.error().message;
  EXPECT_EQ(grown->size(), before + 1);
  auto shrunk = (*owner)->SetKvChunks(DomainId(0), DeviceId(2), 0);
  ASSERT_TRUE(shrunk);
  EXPECT_EQ(shrunk->size(), before);
  EXPECT_FALSE((*owner)->SetKvChunks(DomainId(0), DeviceId(2), 10'000));
  EXPECT_EQ((*owner)->Describe().domains[0].kv_chunks.size(), before);
}

}  // namespace
}  // namespace elasticmoe::runtime
