// The coordinator of the simulated world dies and another adopts what it left; KV memory that a domain gives
// away and takes back.
#include <algorithm>

#include "sim/cluster.h"

namespace elasticmoe::sim {
namespace {

constexpr TimeNs kVacatePatience = 1'500'000'000;

}  // namespace

void Cluster::Later(TimeNs delay, const EventHeap::Event& event) {
  heap_.After(delay, [this, event, coordinator = coordinator_] {
    if (coordinator == coordinator_) event();
  });
}

// Its workers end with it; memory and what was recorded there do not.
void Cluster::CrashCoordinator() {
  if (coordinator_down_) return;
  ++report_.coordinator_deaths;
  Say("the coordinator dies: epoch {} serves, epoch {} is recorded", placement_.epoch(), recorded_.epoch());
  ++coordinator_;
  coordinator_down_ = true;
  GiveUpStep();
  for (const core::PlanDevice& device : facts_.devices) room_.KillWorker(device.device);
  allocated_.clear();
  down_.clear();
  fresh_.clear();
  copying_.clear();
  moving_ = {};
  device_ticket_.clear();
  device_failed_.clear();
  stage_ticket_ = {};
  preparing_ = false;
  prepared_.reset();
  commit_ = {};
  vacating_.reset();
  memory_down_ = false;
  last_step_ = 0;
  accepted_ = ended_;  // the operation that ran is forgotten with it
  Later(Milliseconds(20, 600), [this] { Adopt(); });
}

void Cluster::Adopt() {
  placement_ = recorded_;
  if (!room_.MemoryAlive()) {
    Say("the memory is gone, too: it is loaded");
    room_.LoadMemory(placement_);
  } else if (const std::string wrong = room_.CheckHolds(placement_); !wrong.empty()) {
    return Broken("adopting epoch={}: {}", placement_.epoch(), wrong);
  }
  room_.Trim(placement_);
  for (const DeviceId member : placement_.members()) {
    allocated_.insert(member);
    room_.StartWorker(member);
    room_.worker(member).mapped.insert(placement_.epoch());
  }
  coordinator_down_ = false;
  scheduler_ = std::make_unique<core::Scheduler>(MakeSchedulerOptions());
  machine_ = core::ResizeMachine(MachineOptions(), placement_);
  UpdateSchedulerDevices();
  UpdateKv();
  Say("another coordinator adopts epoch {}", placement_.epoch());
  Resubmit();
  Pump();
}

// Clients saw their connections reset and ask again, from the beginning.
void Cluster::Resubmit() {
  for (auto& [id, client] : clients_) {
    if (client.ended) continue;
    ++report_.requests_again;
    client.received = 0;
    client.fold = 0;
    for (const TokenId token : client.request.prompt) client.fold = FoldToken(client.fold, token);
    if (const Status status = scheduler_->Add(client.request, heap_.now()); !status)
      return Broken("request {} is refused: {}", id, status.error().message);
  }
}

// ---------------------------------------------------------------- KV memory

// Less: all that is above what a full sequence, and one that moves beside it, need.
std::uint32_t Cluster::BlocksOf(DomainId domain, bool less) const {
  std::uint32_t count = 0;
  for (const core::PlanDevice& device : facts_.devices)
    if (device.domain == domain && placement_.RankOf(device.device) >= 0) count += blocks_per_device_;
  return less ? std::min(count, least_blocks_) : count;
}

void Cluster::ShrinkKv() {
  if (coordinator_down_ || vacating_) return;
  const DomainId domain = facts_.devices[rng_.Below(facts_.devices.size())].domain;
  if (kv_less_.count(domain) > 0 || BlocksOf(domain, true) == BlocksOf(domain, false)) return;
  Say("domain {} is to give KV memory away: {} of {} blocks stay", domain, BlocksOf(domain, true),
      BlocksOf(domain, false));
  vacating_ = Vacating{domain, heap_.now()};
  Pump();
}

// At a step boundary: a round of moves, until nobody uses the blocks or patience ends.
void Cluster::ApplyVacate() {
  if (!vacating_ || step_) return;
  const DomainId domain = vacating_->domain;
  const std::uint32_t blocks = BlocksOf(domain, true);
  if (blocks == 0) return vacating_.reset();  // its members left
  for (const core::Scheduler::Move& move : scheduler_->VacateBlocks(domain, blocks)) {
    Say("request {} moves down in domain {}: {} blocks to copy", move.request, domain, move.copies.size());
    if (!move.copies.empty()) StartCopy(move);
  }
  const bool stuck = heap_.now() - vacating_->since > kVacatePatience;
  if (!copying_.empty() || (!stuck && !scheduler_->Vacated(domain, blocks))) return;
  ++report_.kv_shrinks;
  Say("domain {} has given KV memory away{}", domain, stuck ? ", though some was in use" : "");
  kv_less_.insert(domain);
  vacating_.reset();
  UpdateKv();
  heap_.After(Milliseconds(300, 2500), [this, domain] {
    kv_less_.erase(domain);
    kv_changed_ = true;
    Pump();
  });
}

}  // namespace elasticmoe::sim
