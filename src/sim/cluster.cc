#include "sim/cluster.h"

#include <algorithm>

#include "base/check.h"

namespace elasticmoe::sim {
namespace {

constexpr int kVocab = 1000;
constexpr int kBlockTokens = 4;  // small: many block borders in short sequences
constexpr int kMaxModelLen = 48;
constexpr int kMaxRunning = 8;
constexpr TimeNs kSecond = 1'000'000'000;
constexpr TimeNs kTick = kSecond / 10;
constexpr TimeNs kEnd = 300 * kSecond;  // far beyond the resends and recoveries after the last fault

}  // namespace

core::ResizeOptions Cluster::MachineOptions() {
  core::ResizeOptions options;
  options.resend_ns = kSecond;
  return options;
}

const Cluster::Faults Cluster::kNoFaults;

core::PlanFacts Cluster::MakeFacts(Rng& rng) {
  core::PlanFacts facts;
  facts.layers = 1 + static_cast<int>(rng.Below(3));
  facts.experts = 2 + static_cast<int>(rng.Below(8));
  facts.expert_bytes = 1000;
  facts.shared_bytes = 5000;
  facts.stage_experts = 1 + static_cast<int>(rng.Below(8));
  if (rng.Below(3) == 0) facts.at_once_bytes = rng.Below(8) * facts.expert_bytes;
  if (rng.Below(3) == 0) facts.redundancy = 1 + static_cast<int>(rng.Below(facts.experts));
  const int devices = 2 + static_cast<int>(rng.Below(4));
  const int devices_a_domain = rng.Below(3) == 0 ? devices : 1 + static_cast<int>(rng.Below(2));
  const bool unequal = rng.Below(3) == 0, tight = rng.Below(4) == 0;
  for (int i = 0; i < devices; ++i) {
    core::PlanDevice device{DeviceId(i), DomainId(i / devices_a_domain)};
    if (unequal) device.weight = 0.5 + rng.Uniform();
    if (tight)
      device.expert_budget_bytes =
          facts.expert_bytes * (1 + facts.layers * facts.experts * (2 + rng.Below(3)) / 4);
    facts.devices.push_back(device);
  }
  if (rng.Below(2) == 0)
    for (int i = 0; i < facts.layers * facts.experts; ++i)
      facts.load.push_back(static_cast<double>(rng.Below(100)));
  return facts;
}

// As the server's: no more copies than the members can hold.
core::PlanFacts Cluster::FactsFor(int devices) const {
  core::PlanFacts facts = facts_;
  facts.redundancy = std::min(facts_.redundancy, facts_.experts * std::max(devices - 1, 0));
  return facts;
}

core::SchedulerOptions Cluster::MakeSchedulerOptions() {
  core::SchedulerOptions options;
  options.vocab = kVocab;
  options.max_model_len = kMaxModelLen;
  options.block_tokens = kBlockTokens;
  options.max_running = kMaxRunning;
  options.max_step_rows = 16;
  options.max_chunk_rows = 8;
  return options;
}

core::Placement Cluster::MakePlacement(Rng& rng, const core::PlanFacts& facts) {
  core::PlanInput input;
  input.facts = facts;
  const int count = 1 + static_cast<int>(rng.Below(facts.devices.size()));
  for (int i = 0; i < count; ++i) input.target.emplace_back(i);
  input.facts.redundancy = std::min(facts.redundancy, facts.experts * (count - 1));
  auto plan = core::PlanResize(input);
  if (!plan) {  // the budgets want all of them, and none twice
    input.target.clear();
    input.facts.redundancy = 0;
    for (const core::PlanDevice& device : facts.devices) input.target.push_back(device.device);
    plan = core::PlanResize(input);
  }
  EM_CHECK(plan.has_value(), "{}", plan.error().message);
  return plan->Final();
}

Cluster::Cluster(std::uint64_t seed, Trace& trace, SimulationReport& report)
    : rng_(seed),
      trace_(trace),
      report_(report),
      facts_(MakeFacts(rng_)),
      room_(facts_, kBlockTokens, kMaxRunning),
      placement_(MakePlacement(rng_, facts_)),
      recorded_(placement_),
      scheduler_(std::make_unique<core::Scheduler>(MakeSchedulerOptions())),
      machine_(MachineOptions(), placement_) {
  // One sequence of full length and one that moves beside it must fit any domain.
  least_blocks_ = 2 * kMaxModelLen / kBlockTokens;
  blocks_per_device_ = least_blocks_ + static_cast<std::uint32_t>(rng_.Below(24));
  if (rng_.Below(5) != 0) {
    const auto rate = [&](double most) { return rng_.Below(2) == 0 ? most * rng_.Uniform() : 0.0; };
    faults_ = {rate(0.2), rate(0.2), rate(0.2), rate(0.2), rate(0.08)};
  }
  quiet_at_ = 8 * kSecond;
  Say("{} devices, {} layers of {} experts, members={}", facts_.devices.size(), facts_.layers, facts_.experts,
      placement_.members().size());
  for (const DeviceId member : placement_.members()) {
    allocated_.insert(member);
    room_.StartWorker(member);
    room_.worker(member).mapped.insert(placement_.epoch());
  }
  room_.LoadMemory(placement_);
  UpdateSchedulerDevices();
  UpdateKv();
}

std::string Cluster::Run() {
  ScheduleLife();
  while (failure_.empty() && !heap_.Empty()) {
    heap_.RunNext();
    ++report_.events;
    Check();
    if (heap_.now() > kEnd) {
      const core::ResizeReport* resize = machine_.Last();
      Broken("it does not end: requests running={} waiting={}, resize={} {}", scheduler_->Stats().running,
             scheduler_->Stats().waiting, machine_.Running() ? resize->operation : "none",
             machine_.Running() ? ToString(resize->state) : "");
    }
  }
  if (failure_.empty()) FinalCheck();
  report_.preemptions += scheduler_->Stats().preemptions;
  return failure_;
}

void Cluster::ScheduleLife() {
  arrivals_left_ = 5 + static_cast<int>(rng_.Below(12));
  for (int i = 0; i < 8; ++i) shared_prefix_.push_back(static_cast<TokenId>(rng_.Below(kVocab)));
  for (int i = 0; i < arrivals_left_; ++i) {
    const int prompt = 1 + static_cast<int>(rng_.Below(24)), tokens = 1 + static_cast<int>(rng_.Below(20));
    const bool shared = rng_.Below(3) == 0;
    heap_.After(Milliseconds(0, 4000), [this, prompt, tokens, shared] { Arrive(prompt, tokens, shared); });
  }
  operations_left_ = 1 + static_cast<int>(rng_.Below(4));
  for (int i = 0; i < operations_left_; ++i) heap_.After(Milliseconds(50, 5000), [this] { Operate(); });
  if (faults_.crash > 0)
    for (int i = static_cast<int>(rng_.Below(4)); i > 0; --i)
      heap_.After(Milliseconds(0, 8000), [this] {
        std::vector<DeviceId> devices(allocated_.begin(), allocated_.end());
        if (!devices.empty()) CrashWorker(devices[rng_.Below(devices.size())]);
      });
  if (faults_.crash > 0 && rng_.Below(4) == 0) heap_.After(Milliseconds(0, 8000), [this] { CrashMemory(); });
  if (faults_.crash > 0 && rng_.Below(3) == 0)
    heap_.After(Milliseconds(0, 8000), [this] { CrashCoordinator(); });
  if (rng_.Below(2) == 0)
    for (int i = 0; i < 2; ++i) heap_.After(Milliseconds(100, 6000), [this] { ShrinkKv(); });
  heap_.After(kTick, [this] { Tick(); });
  heap_.After(0, [this] { Pump(); });
}

// ---------------------------------------------------------------- clients

void Cluster::Arrive(int prompt_tokens, int max_tokens, bool shared_prefix) {
  if (coordinator_down_) {  // nobody listens: the client tries again
    heap_.After(Milliseconds(20, 200), [=, this] { Arrive(prompt_tokens, max_tokens, shared_prefix); });
    return;
  }
  --arrivals_left_;
  core::GenerationRequest request;
  request.id = RequestId(clients_.size() + 1);
  if (shared_prefix) request.prompt = shared_prefix_;
  while (static_cast<int>(request.prompt.size()) < prompt_tokens)
    request.prompt.push_back(static_cast<TokenId>(rng_.Below(kVocab)));
  request.max_tokens = max_tokens;
  request.priority = static_cast<int>(rng_.Below(2));
  Client& client = clients_[request.id];
  client.request = request;
  for (const TokenId token : request.prompt) client.fold = FoldToken(client.fold, token);
  ++report_.requests;
  Say("request {} comes: prompt={} max_tokens={}", request.id, request.prompt.size(), max_tokens);
  if (const Status status = scheduler_->Add(request, heap_.now()); !status)
    return Broken("request {} is refused: {}", request.id, status.error().message);
  if (rng_.Below(10) == 0)
    heap_.After(Milliseconds(0, 1500), [this, id = request.id] {
      if (clients_.at(id).ended) return;
      Say("client cancels request {}", id);
      clients_.at(id).cancelled = true;
      if (coordinator_down_) {
        clients_.at(id).ended = true;
        return;
      }
      std::vector<core::TokenEvent> events;
      scheduler_->Cancel(id, events);
      Deliver(events);
      Pump();
    });
  Pump();
}

void Cluster::Deliver(const std::vector<core::TokenEvent>& events) {
  for (const core::TokenEvent& event : events) {
    Client& client = clients_.at(event.request);
    if (client.ended) return Broken("request {} gets an event after its end", event.request);
    for (const TokenId token : event.tokens) {
      const TokenId expected = NextToken(client.fold, kVocab);
      if (token != expected)
        return Broken("request {}: token {} is {}, should be {}", event.request, client.received, token,
                      expected);
      client.fold = FoldToken(client.fold, token);
      ++client.received;
      ++report_.tokens;
    }
    if (!event.finish) continue;
    client.ended = true;
    const int wanted =
        std::min(client.request.max_tokens, kMaxModelLen - static_cast<int>(client.request.prompt.size()));
    Say("request {} ends: tokens={}", event.request, client.received);
    if (*event.finish == core::FinishReason::kAbort && client.cancelled) continue;
    if (*event.finish != core::FinishReason::kLength)
      return Broken("request {} ends wrongly: {}", event.request, event.error);
    if (client.received != wanted)
      return Broken("request {} ends with {} tokens of {}", event.request, client.received, wanted);
  }
}

// ---------------------------------------------------------------- the operator

void Cluster::Operate() {
  --operations_left_;
  StartResize(30);
}

// Tries again while another operation runs.
void Cluster::StartResize(int tries) {
  if (coordinator_down_) {
    ++operations_left_;
    heap_.After(Milliseconds(100, 500), [this, tries] {
      --operations_left_;
      StartResize(tries);
    });
    return;
  }
  core::ResizeCommand command;
  command.operation = fmt::format("resize-{}", ++operations_);
  command.count = static_cast<int>(rng_.Below(facts_.devices.size() + (rng_.Below(5) == 0 ? 2 : 1)));
  if (rng_.Below(3) == 0)
    command.victims.push_back(DeviceId(static_cast<int>(rng_.Below(facts_.devices.size()))));
  if (rng_.Below(4) == 0) command.deadline = heap_.now() + Milliseconds(20, 3000);
  Say("operator: {} to {} devices", command.operation, command.count);
  const bool busy = machine_.Running();
  const core::PlanFacts facts = FactsFor(command.count);
  StepMachine(core::CommandEvent{command, facts});
  if (rng_.Below(4) == 0) StepMachine(core::CommandEvent{command, facts});  // he presses the key twice
  if (busy) {
    if (tries > 0) {
      ++operations_left_;
      heap_.After(Milliseconds(100, 500), [this, tries] {
        --operations_left_;
        StartResize(tries - 1);
      });
    }
    return;
  }
  if (rng_.Below(3) != 0) return;
  ++operations_left_;
  const bool change = rng_.Below(2) == 0;  // he wants another target now
  heap_.After(Milliseconds(0, 1500), [this, change, operation = command.operation] {
    --operations_left_;
    Say("operator: cancels {}", operation);
    if (!coordinator_down_) StepMachine(core::CancelEvent{operation});
    if (change) StartResize(30);
  });
}

void Cluster::Tick() {
  if (Finished()) return;
  if (!coordinator_down_) StepMachine(core::TickEvent{});
  heap_.After(kTick, [this] { Tick(); });
}

bool Cluster::Finished() const {
  return arrivals_left_ == 0 && operations_left_ == 0 && scheduler_->Idle() && !machine_.Running() &&
         down_.empty() && !memory_down_ && !coordinator_down_ && room_.MemoryAlive() &&
         heap_.now() >= quiet_at_;
}

// ---------------------------------------------------------------- checks

void Cluster::Check() {
  if (coordinator_down_) return;
  scheduler_->CheckIntegrity();
  machine_.CheckIntegrity();
  const std::uint64_t known = machine_.placement().epoch().value, serving = placement_.epoch().value;
  if (known > serving || known + 1 < serving)
    Broken("the machine believes in epoch={}, epoch={} serves", known, serving);
  if (known == serving && machine_.placement() != placement_)
    Broken("the machine believes in another epoch={} than serves", serving);
  for (const DeviceId member : placement_.members())
    if (allocated_.count(member) == 0) Broken("member device={} is not allocated", member);
}

void Cluster::FinalCheck() {
  for (const auto& [id, client] : clients_)
    if (!client.ended) Broken("request {} never ended", id);
  if (accepted_ != ended_) Broken("{} resizes were accepted, {} have ended", accepted_.size(), ended_.size());
  if (machine_.placement() != placement_) Broken("the machine and the engine disagree at the end");
  if (allocated_ != std::set<DeviceId>(placement_.members().begin(), placement_.members().end()))
    Broken("{} devices are allocated for {} members", allocated_.size(), placement_.members().size());
  for (const core::PlanDevice& device : facts_.devices)
    if (room_.worker(device.device).alive != (allocated_.count(device.device) > 0))
      Broken("device={}: its worker is not as it should be", device.device);
  if (const std::string wrong = room_.CheckHoldsExactly(placement_); !wrong.empty())
    Broken("at the end {}", wrong);
  if (scheduler_->Stats().blocks_used != 0)
    Broken("{} KV blocks are held by nobody", scheduler_->Stats().blocks_used);
  if (!copying_.empty()) Broken("a KV copy has not ended");
}

}  // namespace elasticmoe::sim
