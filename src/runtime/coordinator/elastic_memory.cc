// What a plan is made from (experts, budgets, measured load), and the memory that follows it: KV pools that
// grow and shrink with the devices, and waiting for the HMM.
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <thread>

#include "compute/layout.h"
#include "core/memory/budget.h"
#include "runtime/coordinator/elastic_engine.h"

namespace elasticmoe::runtime {
namespace {

constexpr std::chrono::milliseconds kPoll{2};
constexpr std::chrono::seconds kMovePatience{2};  // without any sequence that leaves
// Between domains a commit may have to wait for a step's end: a stage copies for a good part of one, where
// there is so much to copy.
constexpr std::uint64_t kLeastStageBytes = std::uint64_t{512} << 20;
constexpr std::uint64_t kStagesPerSecond = 32;  // about the same at a limited rate
constexpr std::uint64_t kMostStages = 8;
// So much is copied in a tenth of a second by a core that computes nothing yet; once its device serves, it
// shares it with that.
constexpr std::uint64_t kAtOnceBytes = std::uint64_t{2} << 30;

}  // namespace

// ---------------------------------------------------------------- facts

core::PlanFacts ElasticEngine::BaseFacts() const {
  const core::ModelSpec& spec = checkpoint_.spec;
  const compute::WeightLayout layout(spec);
  core::PlanFacts facts;
  facts.layers = moe_layers_;
  facts.experts = spec.moe.experts;
  facts.expert_bytes = layout.ExpertBytes();
  facts.shared_bytes = layout.SharedBytes();
  facts.at_once_bytes = 0;
  for (int i = 0; i < options_.max_devices; ++i)
    facts.devices.push_back(
        {DeviceId(i), DomainId(options_.domain_per_device ? i : 0), WeightOf(DeviceId(i))});
  return facts;
}

core::PlanFacts ElasticEngine::Facts(int devices) const {
  core::PlanFacts facts = BaseFacts();
  if (options_.device_memory_bytes > 0) {
    // In one domain the shared weights are charged to the devices in equal parts, as when the server starts.
    const std::uint64_t shared =
        options_.domain_per_device ? facts.shared_bytes : facts.shared_bytes / std::max(devices, 1);
    const std::uint64_t others = shared + options_.kv_memory_bytes;
    const std::uint64_t left =
        options_.device_memory_bytes > others ? options_.device_memory_bytes - others : 0;
    for (core::PlanDevice& device : facts.devices)
      device.expert_budget_bytes = std::max<std::uint64_t>(left, 1);  // 0 would mean no limit
  }
  const int present = static_cast<int>(PlacementNow().members().size());
  if (options_.domain_per_device && devices != present) {
    const std::uint64_t moved = std::uint64_t(facts.layers) * facts.experts *
                                static_cast<std::uint64_t>(std::abs(devices - present)) /
                                static_cast<std::uint64_t>(std::max(devices, present));
    std::uint64_t least = kLeastStageBytes;
    if (options_.copy_bytes_per_second == 0)
      facts.at_once_bytes = kAtOnceBytes;
    else
      least = std::min(least, options_.copy_bytes_per_second / kStagesPerSecond);
    facts.stage_experts = static_cast<int>(std::max((moved + kMostStages - 1) / kMostStages,
                                                    least / std::max<std::uint64_t>(facts.expert_bytes, 1)));
  }
  facts.redundancy = std::min(options_.redundant_experts, facts.experts * std::max(devices - 1, 0));
  const std::scoped_lock lock(rows_mutex_);
  for (int layer = 0; layer < facts.layers; ++layer)
    for (int expert = 0; expert < facts.experts; ++expert) {
      const std::size_t index = facts.load.size();
      const std::uint64_t rows = exchange_->ExpertRows(layer, expert).load(std::memory_order_relaxed);
      facts.load.push_back(
          static_cast<double>(rows - (index < rows_at_resize_.size() ? rows_at_resize_[index] : 0)));
    }
  return facts;
}

// On a connection of its own: any thread may ask.
std::uint64_t ElasticEngine::StandbyBytes() const {
  auto hmm = HmmClient::Connect(options_.hmm_socket);
  if (!hmm) return 0;
  const auto answer = (*hmm)->Call({{"op", "accounts"}});
  return answer ? answer->body.value("standby_bytes", std::uint64_t{0}) : 0;
}

Status ElasticEngine::CheckGrowth(int devices) const {
  const core::PlanFacts facts = BaseFacts();
  core::GrowthRequest request;
  request.devices = devices;
  request.joining = devices - static_cast<int>(PlacementNow().members().size());
  request.shared_bytes = facts.shared_bytes;
  request.all_expert_bytes = facts.expert_bytes * facts.layers * facts.experts;
  request.kv_memory_bytes = kv_memory_bytes_;
  request.domain_per_device = options_.domain_per_device;
  request.available_bytes = AvailableMemory() + (options_.domain_per_device ? StandbyBytes() : 0);
  return core::CheckGrowth(request);
}

Expected<core::Placement> ElasticEngine::FirstPlacement() const {
  core::PlanInput input;
  input.facts = BaseFacts();
  for (int i = 0; i < options_.devices; ++i) input.target.emplace_back(i);
  EM_ASSIGN_OR_RETURN(core::ResizePlan plan, core::PlanResize(input));
  return plan.Final();
}

// ---------------------------------------------------------------- memory

std::uint64_t ElasticEngine::KvChunksWanted(std::uint64_t experts) const {
  const compute::WeightLayout layout(checkpoint_.spec);
  const std::uint64_t chunk_bytes =
      memory_.map.blocks_per_chunk *
      compute::KvLayout::Of(checkpoint_.spec, memory_.map.kv_element_bytes).BlockBytes();
  const std::uint64_t least = kv_memory_bytes_ / chunk_bytes;
  if (options_.device_memory_bytes == 0) return least;
  // With a budget, KV has what the weights leave: it grows where experts go and gives way where they come.
  const std::size_t sharers = options_.domain_per_device ? 1 : placement_.members().size();
  const std::uint64_t weights =
      layout.SharedBytes() / sharers + experts * memory_.map.pages_per_expert * memory_.map.page_bytes;
  if (weights >= options_.device_memory_bytes) return least;
  const std::uint64_t rounded =
      (chunk_bytes + memory_.map.page_bytes - 1) / memory_.map.page_bytes * memory_.map.page_bytes;
  return std::max(least, (options_.device_memory_bytes - weights) / rounded);
}

Status ElasticEngine::SetKv(DeviceId device, std::uint64_t chunks) {
  const DomainId id = memory_.map.DomainOf(device);
  EM_ASSIGN_OR_RETURN(
      const Message answer,
      hmm_->Call({{"op", "set_kv"}, {"domain", id.value}, {"device", device.value}, {"chunks", chunks}}));
  for (DomainMap& domain : memory_.map.domains)
    if (domain.domain == id) domain.kv_chunks = answer.body.at("kv_chunks").get<std::vector<std::uint64_t>>();
  kv_chunks_of_[device] = chunks;
  EM_RETURN_IF_ERROR(instances_->SetKvChunks(memory_.map, id));
  PublishKvBlocks();
  return {};
}

Status ElasticEngine::FitMemory(HmmClient& hmm, const core::Placement& placement) {
  EM_ASSIGN_OR_RETURN(const AttachedMemory found, hmm.Describe());
  PeerCopies peers(options_.hmm_socket, 0);
  EM_RETURN_IF_ERROR(peers.Restore(found.map, placement));
  kv_chunks_of_.clear();
  for (int i = 0; i < options_.max_devices; ++i) {
    const DeviceId device(i);
    const bool member = placement.RankOf(device) >= 0;
    if (!member && options_.domain_per_device) continue;  // its domain is closed
    const std::uint64_t chunks = member ? KvChunksWanted(placement.ExpertsOn(device)) : 0;
    EM_RETURN_IF_ERROR(hmm.Call({{"op", "set_kv"},
                                 {"domain", found.map.DomainOf(device).value},
                                 {"device", device.value},
                                 {"chunks", chunks}}));
    if (member) kv_chunks_of_[device] = chunks;
  }
  return hmm.Record(placement);
}

// Nobody uses the domain's last blocks any more: a round of moves, until it is so or nothing helps.
Expected<bool> ElasticEngine::VacateKv(DomainId domain, std::uint32_t blocks) {
  const auto now = std::chrono::steady_clock::now();
  if (vacating_ != std::pair(domain, blocks)) vacating_ = {domain, blocks}, vacating_since_ = now;
  const bool stuck = now - vacating_since_ > kMovePatience;
  bool vacated = false;
  EM_RETURN_IF_ERROR(BetweenSteps([&]() -> Status {
    TakeMoved();
    UpdateKvBlocks();
    if (!next_hmm_) StartMoves(scheduler_->VacateBlocks(domain, blocks));  // it copies them
    // Without room for them elsewhere, those that are left run again from their tokens.
    if (stuck && mover_->Pending() == 0) scheduler_->SetBlocks(domain, blocks);
    vacated = scheduler_->Vacated(domain, blocks) && mover_->Pending() == 0;
    if (vacated) scheduler_->SetBlocks(domain, blocks);
    PublishSettled();
    return {};
  }));
  if (vacated) vacating_.reset();
  return vacated;
}

Expected<bool> ElasticEngine::ShrinkKv(DeviceId device, std::uint64_t chunks) {
  DomainId domain;
  std::uint64_t left = 0;
  {
    const std::scoped_lock lock(instances_mutex_);
    domain = memory_.map.DomainOf(device);
    const DomainMap* map = memory_.map.Find(domain);
    if (map == nullptr || kv_chunks_of_[device] <= chunks) return true;
    left = map->kv_chunks.size() - (kv_chunks_of_[device] - chunks);
  }
  EM_ASSIGN_OR_RETURN(const bool vacated,
                      VacateKv(domain, static_cast<std::uint32_t>(left * memory_.map.blocks_per_chunk)));
  if (!vacated) return false;
  const std::scoped_lock lock(instances_mutex_);
  EM_RETURN_IF_ERROR(SetKv(device, chunks));
  if (chunks == 0) kv_chunks_of_.erase(device);
  return true;
}

Expected<bool> ElasticEngine::FitKv() {
  EM_ASSIGN_OR_RETURN(const bool dropped, DropReleased(false));
  if (!dropped) {
    std::this_thread::sleep_for(kPoll);
    return true;
  }
  // One at a time: pieces that are added, devices that have too much.
  std::optional<DeviceId> too_much;
  std::uint64_t wanted = 0;
  {
    const std::scoped_lock lock(instances_mutex_);
    for (const auto& [device, chunks] : kv_chunks_of_) {
      const bool member = placement_.RankOf(device) >= 0;
      wanted = member ? KvChunksWanted(placement_.ExpertsOn(device)) : 0;
      if (chunks < wanted) {
        EM_RETURN_IF_ERROR(SetKv(device, chunks + 1));
        return true;
      }
      if (chunks > wanted && (member || !options_.domain_per_device)) {
        too_much = device;
        break;
      }
    }
  }
  if (!too_much) return false;
  EM_ASSIGN_OR_RETURN(const bool done, ShrinkKv(*too_much, wanted));
  if (!done) std::this_thread::sleep_for(kPoll);
  return true;
}

Status ElasticEngine::AwaitHmm(const std::stop_token& stop) {
  while (!stop.stop_requested()) {
    {
      const std::scoped_lock lock(mutex_);
      if (stopping_) break;
      if (!hmm_down_) return {};
      if (hmm_failure_) return tl::unexpected<Error>(*hmm_failure_);
    }
    std::this_thread::sleep_for(kPoll);
  }
  return Fail(ErrorCode::kUnavailable, "the server is stopping");
}

// Its socket refuses before its end can be seen: memory is given back in between.
bool ElasticEngine::LostHmm() const {
  return HmmDown() || !HmmClient::Connect(options_.hmm_socket);
}

}  // namespace elasticmoe::runtime
