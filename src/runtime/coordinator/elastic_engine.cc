#include "runtime/coordinator/elastic_engine.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <thread>
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
constexpr TimeNs kOwnerPatience = 3'000'000'000;

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

// Two engines on one HMM would write into each other's KV: the name is held as long as this process lives.
// The engine before may still be on its way out, killed or replaced: it is waited for.
Status ElasticEngine::TakeName() {
  const TimeNs deadline = Now() + kOwnerPatience;
  for (;;) {
    auto owner = Listener::Bind("owner/" + options_.hmm_socket);
    if (owner) {
      owner_ = std::move(*owner);
      return {};
    }
    if (owner.error().code != ErrorCode::kAlreadyExists) return tl::unexpected<Error>(owner.error());
    if (Now() > deadline)
      return Fail(ErrorCode::kAlreadyExists,
                  "starting the engine: {} is another running server's memory; stop that server, or choose "
                  "another address (--port)",
                  options_.hmm_socket);
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
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

  EM_RETURN_IF_ERROR(TakeName());
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
  mover_ = std::make_unique<KvMover>(options_.hmm_socket, hmm_->pid(), [this] {
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

}  // namespace elasticmoe::runtime
