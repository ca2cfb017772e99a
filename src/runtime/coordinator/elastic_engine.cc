#include "runtime/coordinator/elastic_engine.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "base/check.h"
#include "base/clock.h"
#include "base/log.h"
#include "compute/kernels.h"
#include "compute/layout.h"
#include "runtime/hmm/loader.h"

namespace elasticmoe::runtime {
namespace {

constexpr int kSpins = 1000;  // ~40 us: a few layers' wait, far below a scheduler slice

}  // namespace

ElasticEngine::ElasticEngine(EngineOptions options, model::Checkpoint checkpoint)
    : options_(std::move(options)),
      kv_memory_bytes_(options_.kv_memory_bytes),
      checkpoint_(std::move(checkpoint)),
      moe_layers_(MoeLayerCount(checkpoint_.spec)) {}

Expected<std::unique_ptr<ElasticEngine>> ElasticEngine::Start(
    const EngineOptions& options, const std::function<void(std::uint64_t, std::uint64_t)>& progress) {
  EM_ASSIGN_OR_RETURN(model::Checkpoint checkpoint, model::Checkpoint::Open(options.model));
  checkpoint.spec.weights = options.weights;
  std::unique_ptr<ElasticEngine> engine(new ElasticEngine(options, std::move(checkpoint)));
  EM_RETURN_IF_ERROR(engine->Begin(progress));
  return engine;
}

HmmOptions ElasticEngine::HmmOptionsFor() const {
  HmmOptions options;
  options.socket = options_.hmm_socket;
  options.model = options_.model;
  options.max_devices = options_.max_devices;
  options.domain_per_device = options_.domain_per_device;
  options.weights = options_.weights;
  options.kv_element_bytes = (*compute::FindKernels(options_.kernels))->kv_element_bytes;
  options.kv_memory_bytes = options_.kv_memory_bytes;
  options.kv_room_bytes = options_.kv_room_bytes;
  options.device_memory_bytes = options_.device_memory_bytes;
  options.pages = options_.pages;
  options.standby_memory = options_.domain_per_device && options_.standby > 0;
  options.linger_seconds = options_.linger_seconds;
  options.log_level = options_.log_level;
  return options;
}

Status ElasticEngine::Begin(const std::function<void(std::uint64_t, std::uint64_t)>& progress) {
  const core::ModelSpec& spec = checkpoint_.spec;
  EM_ASSIGN_OR_RETURN(const compute::Kernels* kernels, compute::FindKernels(options_.kernels));
  options_.kernels = std::string(kernels->name);
  kv_token_bytes_ = static_cast<double>(compute::KvLayout::Of(spec, kernels->kv_element_bytes).BlockBytes()) /
                    compute::kBlockTokens;
  if (options_.max_model_len <= 0 || options_.max_model_len > spec.max_positions)
    options_.max_model_len = spec.max_positions;
  if (options_.devices < 1 || options_.devices > options_.max_devices || options_.max_devices > kMaxDevices)
    return Fail(ErrorCode::kInvalidArgument, "starting the engine: devices={} max-devices={} (limit={})",
                options_.devices, options_.max_devices, kMaxDevices);

  ExchangeShape shape;
  shape.max_devices = options_.max_devices;
  shape.max_rows = options_.max_step_rows;
  shape.max_slots = options_.max_running;
  shape.max_model_len = options_.max_model_len;
  shape.block_tokens = compute::kBlockTokens;
  shape.hidden = spec.hidden;
  shape.vocab = spec.vocab;
  shape.top_k = spec.moe.top_k;
  shape.moe_layers = moe_layers_;
  shape.experts = spec.moe.experts;
  shape.activation_bytes = kernels->activation_bytes;
  EM_ASSIGN_OR_RETURN(exchange_, Exchange::Create(shape));

  EM_ASSIGN_OR_RETURN(placement_, FirstPlacement());
  // Workers start up while the weights are loaded.
  EM_ASSIGN_OR_RETURN(hmm_, HmmClient::StartOrAdopt(HmmOptionsFor(), placement_));
  adopted_ = hmm_->adopted();
  if (adopted_) {
    EM_ASSIGN_OR_RETURN(placement_, hmm_->Recorded());
  }
  InstanceOptions instance_options;
  instance_options.config = checkpoint_.config;
  instance_options.kernels = options_.kernels;
  instance_options.weights = options_.weights;
  instance_options.threads_per_device = options_.threads_per_device;
  instance_options.first_cpu = options_.first_cpu;
  instance_options.expert_table = options_.expert_table;
  instance_options.standby = static_cast<int>(placement_.members().size());
  instance_options.worker_attempts = options_.worker_attempts;
  instance_options.answer_timeout_seconds = options_.answer_timeout_seconds;
  instance_options.log_level = options_.log_level;
  instances_ = std::make_unique<InstanceManager>(instance_options, *exchange_);
  EM_RETURN_IF_ERROR(instances_->FillStandby());
  EM_RETURN_IF_ERROR(hmm_->AwaitReady(progress));
  EM_ASSIGN_OR_RETURN(memory_, hmm_->Describe());
  EM_RETURN_IF_ERROR(FitMemory(*hmm_, placement_));
  EM_ASSIGN_OR_RETURN(memory_, hmm_->Describe());

  core::SchedulerOptions schedule;
  schedule.vocab = spec.vocab;
  schedule.max_model_len = options_.max_model_len;
  schedule.block_tokens = compute::kBlockTokens;
  schedule.max_running = options_.max_running;
  schedule.max_waiting = options_.max_waiting;
  schedule.max_step_rows = options_.max_step_rows;
  schedule.max_chunk_rows = std::min(options_.max_chunk_rows, options_.max_step_rows);
  schedule.prefix_cache = options_.prefix_cache;
  schedule.eos_ids = spec.eos_ids;
  scheduler_ = std::make_unique<core::Scheduler>(schedule);
  slots_.resize(options_.max_running);

  EM_RETURN_IF_ERROR(AttachAll());
  scheduler_->SetDevices(SchedulerDevices());
  PublishKvBlocks();
  UpdateKvBlocks();
  UpdatePids();
  instances_->SetStandby(options_.standby, options_.standby_limit);
  EM_RETURN_IF_ERROR(instances_->FillStandby());
  peers_.emplace(options_.hmm_socket, options_.copy_bytes_per_second);
  mover_ = std::make_unique<KvMover>(options_.hmm_socket, [this] {
    const std::scoped_lock lock(mutex_);
    work_.notify_one();
  });
  PublishStats();
  Rewatch();
  watcher_ = std::jthread([this](const std::stop_token& stop) { Watch(stop); });
  thread_ = std::jthread([this] { Loop(); });
  return {};
}

ElasticEngine::~ElasticEngine() {
  {
    const std::scoped_lock lock(mutex_);
    accepting_ = false;
    stopping_ = true;
    work_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
  if (watcher_.joinable()) {
    watcher_.request_stop();
    watcher_.join();
  }
  mover_.reset();
  instances_.reset();
  if (hmm_) hmm_->Shutdown();
  if (next_hmm_) next_hmm_->Shutdown();
}

double ElasticEngine::WeightOf(DeviceId device) const {
  const auto index = static_cast<std::size_t>(device.value);
  return index < options_.device_weights.size() ? options_.device_weights[index] : 1.0;
}

std::vector<core::SchedulerDevice> ElasticEngine::SchedulerDevices() const {
  std::vector<core::SchedulerDevice> devices;
  for (const DeviceId member : placement_.members())
    devices.push_back({member, memory_.map.DomainOf(member), WeightOf(member), leaving_.count(member) == 0});
  return devices;
}

// Waiters spin only where each has a core of its own.
void ElasticEngine::UpdateSpin() {
  const auto threads = static_cast<int>(placement_.members().size()) * options_.threads_per_device;
  exchange_->header().spin = threads <= cpus_ ? kSpins : 0;
}

Status ElasticEngine::AttachAll() {
  exchange_->WritePlacement(static_cast<int>(placement_.epoch().value % kPlacementRing), placement_);
  for (const DeviceId member : placement_.members()) EM_RETURN_IF_ERROR(instances_->Attach(member, memory_));
  return instances_->Prepare(placement_.members(), placement_.epoch().value, memory_.map);
}

void ElasticEngine::PublishKvBlocks() {
  const std::scoped_lock lock(mutex_);
  for (auto& [domain, blocks] : kv_blocks_) blocks = 0;  // closed, unless it is in the map
  for (const DomainMap& domain : memory_.map.domains)
    kv_blocks_[domain.domain] =
        static_cast<std::uint32_t>(domain.kv_chunks.size() * memory_.map.blocks_per_chunk);
  kv_changed_ = true;
  domains_.clear();
  const std::uint64_t chunk_bytes =
      memory_.map.blocks_per_chunk *
      compute::KvLayout::Of(checkpoint_.spec, memory_.map.kv_element_bytes).BlockBytes();
  for (const DomainMap& domain : memory_.map.domains) {
    const auto experts =
        std::ranges::count_if(domain.expert_offsets, [](std::int64_t at) { return at >= 0; });
    domains_.push_back(
        {domain.domain, compute::WeightLayout(checkpoint_.spec).SharedBytes(),
         static_cast<std::uint64_t>(experts) * memory_.map.pages_per_expert * memory_.map.page_bytes,
         domain.kv_chunks.size() * chunk_bytes});
  }
  work_.notify_one();
}

void ElasticEngine::UpdateKvBlocks() {
  std::map<DomainId, std::uint32_t> blocks;
  {
    const std::scoped_lock lock(mutex_);
    if (!kv_changed_) return;
    kv_changed_ = false;
    blocks = kv_blocks_;
  }
  for (const auto& [domain, count] : blocks) scheduler_->SetBlocks(domain, count);
}

void ElasticEngine::UpdatePids() {
  pids_.clear();
  for (const DeviceId member : placement_.members()) pids_[member] = instances_->PidOf(member);
}

// ---------------------------------------------------------------- requests

Status ElasticEngine::Submit(core::GenerationRequest request, Sink sink) {
  if (request.stop_token_ids.size() + checkpoint_.spec.eos_ids.size() > kMaxBanned)
    return Fail(ErrorCode::kInvalidArgument, "stop_token_ids: {} ids (limit={})",
                request.stop_token_ids.size(), kMaxBanned - checkpoint_.spec.eos_ids.size());
  if (request.sampling.logit_bias.size() > kMaxBias)
    return Fail(ErrorCode::kInvalidArgument, "logit_bias: {} entries (limit={})",
                request.sampling.logit_bias.size(), kMaxBias);
  // Refused here and not only by the scheduler, so that the caller hears it before a stream is opened.
  EM_RETURN_IF_ERROR(core::CheckRequest(
      request, {.vocab = checkpoint_.spec.vocab, .max_model_len = options_.max_model_len}));
  const std::scoped_lock lock(mutex_);
  if (!accepting_) return Fail(ErrorCode::kUnavailable, "the server is stopping");
  if (submitted_.size() + queued_ >= static_cast<std::size_t>(options_.max_waiting))
    return Fail(ErrorCode::kResourceExhausted, "the queue is full: waiting={} (limit={}); try again later",
                submitted_.size() + queued_, options_.max_waiting);
  submitted_.emplace_back(std::move(request), std::move(sink));
  busy_ = true;
  work_.notify_one();
  return {};
}

void ElasticEngine::Cancel(RequestId request) {
  const std::scoped_lock lock(mutex_);
  cancelled_.push_back(request);
  work_.notify_one();
}

void ElasticEngine::StopAccepting() {
  const std::scoped_lock lock(mutex_);
  accepting_ = false;
}

void ElasticEngine::FailAll(const std::string& error) {
  StopAccepting();
  (void)BetweenSteps([&]() -> Status {
    TakeInbox();
    GiveUp({ErrorCode::kUnavailable, error});
    return {};
  });
}

void ElasticEngine::FailWaiting(const std::string& error) {
  (void)BetweenSteps([&]() -> Status {
    TakeInbox();
    GiveUp({ErrorCode::kUnavailable, error});
    return {};
  });
}

bool ElasticEngine::Idle() const {
  const std::scoped_lock lock(mutex_);
  return !busy_ && submitted_.empty();
}

EngineStats ElasticEngine::Stats() const {
  const std::scoped_lock lock(mutex_);
  EngineStats stats = stats_;
  stats.domains = domains_;
  stats.standby = standby_count_;
  stats.waiting += static_cast<int>(submitted_.size());
  return stats;
}

void ElasticEngine::TakeInbox() {
  taken_submitted_.clear();
  taken_cancelled_.clear();
  {
    const std::scoped_lock lock(mutex_);
    taken_submitted_.swap(submitted_);
    taken_cancelled_.swap(cancelled_);
    queued_ += taken_submitted_.size();
  }
  for (auto& [request, sink] : taken_submitted_) {
    const RequestId id = request.id;
    sinks_[id] = std::move(sink);
    if (Status status = scheduler_->Add(std::move(request), Now()); !status) {
      core::TokenEvent event;
      event.request = id;
      event.finish = core::FinishReason::kError;
      event.error = status.error().message;
      events_.push_back(std::move(event));
    }
  }
  for (const RequestId id : taken_cancelled_) scheduler_->Cancel(id, events_);
}

void ElasticEngine::Deliver() {
  for (const core::TokenEvent& event : events_) {
    const auto at = sinks_.find(event.request);
    if (at == sinks_.end()) continue;
    at->second(event);
    if (event.finish) sinks_.erase(at);
  }
  events_.clear();
}

// ---------------------------------------------------------------- steps

void ElasticEngine::Loop() {
  for (;;) {
    TakeInbox();
    TakeMoved();
    RunTasks(true);
    UpdateKvBlocks();
    if (std::exchange(rebalance_, false)) {
      StartMoves(scheduler_->Rebalance());
      PublishSettled();
    }
    const bool in_steps = death_.exchange(false), other = other_death_.exchange(false);
    if (in_steps || other) {
      Status status = RecoverWorkers();
      if (status) status = ReplaceHmm();
      if (!status) GiveUp(status.error());
    }
    if (next_hmm_)
      if (Status status = SwitchToNextHmm(); !status) GiveUp(status.error());
    core::StepPlan plan = asleep_ ? core::StepPlan{} : scheduler_->Plan(Now());
    std::move(plan.failed.begin(), plan.failed.end(), std::back_inserter(events_));
    if (!plan.Empty()) {
      if (const TimeNs now = Now(); last_step_end_ != 0 && now - last_step_end_ > longest_gap_)
        longest_gap_ = now - last_step_end_;
      RunStep(plan);
      last_step_end_ = Now();
      const std::scoped_lock lock(mutex_);
      if (stopping_) break;
      continue;
    }
    Deliver();
    PublishStats();
    last_step_end_ = 0;
    devices_ended_ = 0;
    std::unique_lock lock(mutex_);
    busy_ = !scheduler_->Idle() || !submitted_.empty();
    if (stopping_) break;
    const auto anything = [&] {
      return stopping_ || death_ || other_death_ || kv_changed_ || !submitted_.empty() ||
             !cancelled_.empty() || !tasks_.empty() || mover_->AnythingDone();
    };
    if (next_hmm_)
      work_.wait_for(lock, kHmmPoll, anything);
    else
      work_.wait(lock, anything);
    if (stopping_) break;
  }
  RunTasks(false);
  TakeInbox();
  std::vector<RequestId> left;
  for (const auto& [id, sink] : sinks_) left.push_back(id);
  for (const RequestId id : left) scheduler_->Cancel(id, events_);
  Deliver();
}

void ElasticEngine::WriteView(const core::Placement& placement, StepView& view) const {
  view.epoch = placement.epoch().value;
  view.placement_index = static_cast<std::int32_t>(view.epoch % kPlacementRing);
  view.member_count = static_cast<std::int32_t>(placement.members().size());
  for (int rank = 0; rank < view.member_count; ++rank) view.members[rank] = placement.members()[rank].value;
}

void ElasticEngine::BeginDevice(DeviceId id, std::uint32_t step) const {
  DeviceHeader& device = exchange_->device(id.value);
  device.entry_count = 0;
  device.row_count = 0;
  // Nobody may take the words of an earlier life of this device for this step's.
  const std::uint32_t before = LayerTag(step, moe_layers_, -1);
  device.dispatched.value.store(before, std::memory_order_relaxed);
  device.returned.value.store(before, std::memory_order_relaxed);
}

void ElasticEngine::WriteStep(const core::StepPlan& plan, std::uint32_t step) {
  ExchangeHeader& header = exchange_->header();
  header.step = step;
  WriteView(placement_, header.views[0]);
  UpdateSpin();
  exchange_->BeginProgress();
  for (const DeviceId member : placement_.members()) BeginDevice(member, step);
  for (const core::TableWrite& write : plan.table_writes)
    exchange_->BlockTable(write.table_slot)[write.index] = static_cast<std::uint32_t>(write.block.value);
  for (const core::DevicePlan& device_plan : plan.devices) {
    DeviceHeader& device = exchange_->device(device_plan.device.value);
    for (const core::SequenceStep& sequence : device_plan.sequences) {
      SlotState& slot = slots_[sequence.table_slot];
      const std::span<const TokenId> tokens = scheduler_->Tokens(sequence.request);
      std::int32_t* history = exchange_->TokenHistory(sequence.table_slot);
      if (slot.request != sequence.request || slot.written == 0) {
        WriteSampling(scheduler_->Request(sequence.request), checkpoint_.spec.eos_ids,
                      exchange_->Sampling(sequence.table_slot));
        slot = {sequence.request, 0};
      }
      std::copy(tokens.begin() + slot.written, tokens.end(), history + slot.written);
      slot.written = static_cast<int>(tokens.size());
      PlanEntry& entry = exchange_->Plan(device_plan.device.value)[device.entry_count++];
      entry = {sequence.request.value, sequence.table_slot, sequence.start_position,
               sequence.rows,          sequence.sample,     sequence.score_prompt};
      device.row_count += sequence.rows;
    }
  }
}

bool ElasticEngine::AwaitStep(std::uint32_t step) {
  ExchangeHeader& header = exchange_->header();
  const TimeNs deadline = Now() + TimeNs{options_.step_timeout_seconds} * 1'000'000'000;
  std::vector<std::int32_t> participants = exchange_->Participants();
  const auto finished = [&] {
    return std::ranges::all_of(participants, [&](std::int32_t device) {
      return exchange_->device(device).finished_step.load(std::memory_order_acquire) == step;
    });
  };
  while (!WaitFor(
      header.finish, {0}, [&](std::uint32_t) { return finished(); },
      [&] { return death_.load() || early_task_.load() || Now() > deadline; })) {
    if (finished()) return true;
    if (early_task_.exchange(false) && !death_) {
      RunEarlyTask();
      participants = exchange_->Participants();
      continue;
    }
    // Given up: every waiter is woken until all are out of the step.
    header.abort_step.store(step, std::memory_order_seq_cst);
    if (Now() > deadline) {
      const std::scoped_lock lock(instances_mutex_);
      for (const std::int32_t device : participants) {
        if (exchange_->device(device).finished_step.load() == step) continue;
        LogWarn("device {} did not finish step {} within {} s: its worker is killed", device, step,
                options_.step_timeout_seconds);
        instances_->Kill(DeviceId(device));
      }
      death_ = true;
    }
    for (const std::int32_t device : participants) {
      exchange_->device(device).dispatched.WakeAll();
      exchange_->device(device).returned.WakeAll();
    }
    return false;
  }
  return true;
}

void ElasticEngine::ReadStep(const core::StepPlan& plan) {
  result_.step = plan.step;
  result_.sequences.clear();
  for (const core::DevicePlan& device : plan.devices) {
    const LogprobRecord* sampled = exchange_->Sampled(device.device.value);
    const LogprobRecord* scores = exchange_->PromptScores(device.device.value);
    int row = 0;
    for (std::size_t i = 0; i < device.sequences.size(); ++i) {
      const core::SequenceStep& sequence = device.sequences[i];
      core::SequenceResult one;
      one.request = sequence.request;
      if (sequence.sample) one.sampled = ReadLogprob(sampled[i]);
      if (sequence.score_prompt && scheduler_->Knows(sequence.request)) {
        const auto prompt = static_cast<int>(scheduler_->Request(sequence.request).prompt.size());
        for (int r = 0; r < sequence.rows && sequence.start_position + r + 1 < prompt; ++r)
          one.prompt_logprobs.push_back(ReadLogprob(scores[row + r]));
      }
      row += sequence.rows;
      result_.sequences.push_back(std::move(one));
    }
  }
}

void ElasticEngine::RunStep(const core::StepPlan& plan) {
  if (!CopyTails(plan)) return;
  const TimeNs begin = last_step_end_ != 0 ? last_step_end_ : Now();
  ExchangeHeader& header = exchange_->header();
  const std::uint32_t step = header.step + 1;
  WriteStep(plan, step);
  for (const DeviceId member : placement_.members()) exchange_->device(member.value).go.Set(step);
  Deliver();  // while the devices compute: nobody waits for what clients are told of the step before
  PublishStats();
  if (!AwaitStep(step)) {
    scheduler_->AbandonStep();
    step_given_up_ = true;
    if (++failed_attempts_ >= options_.step_attempts)
      GiveUp({ErrorCode::kInternal,
              fmt::format("a step failed {} times; the requests in it are given up", failed_attempts_)});
    return;
  }
  failed_attempts_ = 0;
  ++steps_;
  CountStepTime();
  if (!fresh_.empty())
    for (const core::DevicePlan& device : plan.devices)
      if (fresh_.erase(device.device) > 0) Observe(core::FirstTokenEvent{device.device});
  NoteStep(plan, static_cast<double>(Now() - begin) * 1e-9);
  ReadStep(plan);
  scheduler_->Complete(result_, Now(), events_);
}

void ElasticEngine::CountStepTime() {
  TimeNs begin = std::numeric_limits<TimeNs>::max(), end = 0;
  for (const std::int32_t participant : exchange_->Participants()) {
    const DeviceHeader& device = exchange_->device(participant);
    begin = std::min(begin, device.begin_ns);
    end = std::max(end, device.end_ns);
  }
  step_ns_ += end - begin;
  if (devices_ended_ != 0) between_steps_ns_ += std::max<TimeNs>(begin - devices_ended_, 0);
  devices_ended_ = end;
}

void ElasticEngine::NoteStep(const core::StepPlan& plan, double seconds) {
  core::StepShape shape;
  shape.devices = static_cast<int>(placement_.members().size());
  double all_rows = 0;
  for (const core::DevicePlan& device : plan.devices) {
    double rows = 0, context = 0;
    for (const core::SequenceStep& sequence : device.sequences) {
      rows += sequence.rows;
      context += sequence.start_position + sequence.rows;
    }
    all_rows += rows;
    shape.rows = std::max(shape.rows, rows);
    shape.kv_bytes = std::max(shape.kv_bytes, context * KvTokenBytes());
  }
  const core::ModelSpec& spec = checkpoint_.spec;
  shape.experts =
      core::ExpertsTouched(spec.moe.experts, spec.moe.top_k, shape.devices, all_rows) * moe_layers_;
  const auto bucket = std::ranges::lower_bound(kStepRowBounds, static_cast<int>(all_rows));
  ++steps_by_rows_[static_cast<std::size_t>(bucket - kStepRowBounds.begin())];
  step_rows_ += static_cast<std::uint64_t>(all_rows);
  if (step_observer_) step_observer_(shape, seconds);
}

void ElasticEngine::SetStepObserver(StepObserver observer) {
  (void)BetweenSteps([&]() -> Status {
    step_observer_ = std::move(observer);
    return {};
  });
}

void ElasticEngine::PublishStats() {
  const core::SchedulerStats schedule = scheduler_->Stats();
  EngineStats stats;
  stats.running = schedule.running;
  stats.waiting = schedule.waiting;
  stats.kv_blocks = schedule.blocks_total;
  stats.kv_usage = schedule.blocks_total == 0 ? 0
                                              : static_cast<double>(schedule.blocks_used) /
                                                    static_cast<double>(schedule.blocks_total);
  stats.steps = steps_;
  stats.step_ns = step_ns_;
  stats.between_steps_ns = between_steps_ns_;
  stats.steps_by_rows = steps_by_rows_;
  stats.step_rows = step_rows_;
  stats.preemptions = schedule.preemptions;
  stats.prefix_queries = schedule.prefix_queries;
  stats.prefix_hits = schedule.prefix_hits;
  stats.epoch = placement_.epoch().value;
  stats.recoveries = recoveries_;
  for (const DeviceId member : placement_.members()) {
    if (asleep_) break;
    DeviceStats device;
    device.device = member;
    device.pid = pids_[member];
    device.sequences = scheduler_->SequencesOn(member);
    device.rows = exchange_->device(member.value).expert_rows.load(std::memory_order_relaxed);
    device.experts = static_cast<std::uint64_t>(placement_.ExpertsOn(member));
    stats.devices.push_back(device);
  }
  const std::scoped_lock lock(mutex_);
  stats_ = std::move(stats);
  if (published_placement_.epoch() != placement_.epoch() || published_placement_.members().empty())
    published_placement_ = placement_;
  queued_ = static_cast<std::size_t>(schedule.waiting);
}

}  // namespace elasticmoe::runtime
