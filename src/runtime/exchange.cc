#include "runtime/exchange.h"

#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/check.h"

namespace elasticmoe::runtime {
namespace {

constexpr std::uint64_t kMagic = 0x32'45'6f'4d'63'69'74'73;  // also the layout's version
constexpr std::size_t kAlignment = 4096;                     // areas of different devices share no page

std::size_t Take(std::size_t& at, std::size_t bytes, std::size_t alignment = 64) {
  at = (at + alignment - 1) / alignment * alignment;
  const std::size_t begin = at;
  at += bytes;
  return begin;
}

}  // namespace

Exchange::Offsets Exchange::Layout(const ExchangeShape& shape) {
  Offsets o;
  std::size_t at = sizeof(ExchangeHeader);
  o.table_stride = std::size_t((shape.max_model_len + shape.block_tokens - 1) / shape.block_tokens) *
                   sizeof(std::uint32_t);
  o.tables = Take(at, o.table_stride * shape.max_slots, kAlignment);
  o.history_stride = std::size_t(shape.max_model_len + 1) * sizeof(std::int32_t);
  o.history = Take(at, o.history_stride * shape.max_slots, kAlignment);
  o.sampling = Take(at, sizeof(SlotSampling) * shape.max_slots, kAlignment);
  o.placement_stride = std::size_t(shape.moe_layers) * shape.experts * (1 + kMaxReplicas);
  o.placements = Take(at, o.placement_stride * kPlacementRing, kAlignment);
  o.expert_rows = Take(at, sizeof(std::uint64_t) * shape.moe_layers * shape.experts, kAlignment);
  std::size_t area = sizeof(DeviceHeader);
  const std::size_t rows = shape.max_rows;
  o.plan = Take(area, sizeof(PlanEntry) * shape.max_slots);
  o.sampled = Take(area, sizeof(LogprobRecord) * shape.max_slots);
  o.scores = Take(area, sizeof(LogprobRecord) * rows);
  o.routes = Take(area, rows * shape.top_k * sizeof(std::int32_t));
  o.activations = Take(area, rows * shape.hidden * shape.activation_bytes);
  o.outputs = Take(area, rows * shape.top_k * shape.hidden * sizeof(float));
  o.head_inputs = Take(area, std::size_t{kHeadRows} * shape.hidden * shape.activation_bytes);
  o.logits = Take(area, std::size_t{kHeadRows} * shape.vocab * sizeof(float));
  o.device_stride = (area + kAlignment - 1) / kAlignment * kAlignment;
  o.devices = Take(at, o.device_stride * shape.max_devices, kAlignment);
  o.total = at;
  return o;
}

Expected<Exchange> Exchange::Create(const ExchangeShape& shape) {
  EM_CHECK(shape.max_devices <= kMaxDevices);
  Exchange exchange;
  exchange.offsets_ = Layout(shape);
  EM_ASSIGN_OR_RETURN(exchange.memory_,
                      CreateMemory("elasticmoe-exchange", exchange.offsets_.total, PageKind::kSmall));
  EM_ASSIGN_OR_RETURN(exchange.mapping_, Map(exchange.memory_.get(), 0, exchange.offsets_.total, true));
  ::madvise(exchange.mapping_.data(), exchange.mapping_.size(), MADV_HUGEPAGE);
  exchange.header().shape = shape;
  exchange.header().magic = kMagic;
  return exchange;
}

Expected<Exchange> Exchange::Attach(int fd) {
  struct stat info {};
  if (::fstat(fd, &info) != 0 || static_cast<std::size_t>(info.st_size) < sizeof(ExchangeHeader))
    return Fail(ErrorCode::kInvalidArgument, "attaching to the exchange: descriptor {} is none", fd);
  Exchange exchange;
  exchange.memory_ = Fd(fd);
  EM_ASSIGN_OR_RETURN(exchange.mapping_, Map(fd, 0, static_cast<std::size_t>(info.st_size), true));
  if (exchange.header().magic != kMagic)
    return Fail(ErrorCode::kFailedPrecondition, "attaching to the exchange: it is of another version");
  exchange.offsets_ = Layout(exchange.header().shape);
  EM_CHECK(exchange.offsets_.total <= exchange.mapping_.size());
  return exchange;
}

DeviceHeader& Exchange::device(int device) const {
  return *reinterpret_cast<DeviceHeader*>(DeviceArea(device));
}

std::uint32_t* Exchange::BlockTable(int slot) const {
  return reinterpret_cast<std::uint32_t*>(mapping_.data() + offsets_.tables + slot * offsets_.table_stride);
}
std::int32_t* Exchange::TokenHistory(int slot) const {
  return reinterpret_cast<std::int32_t*>(mapping_.data() + offsets_.history + slot * offsets_.history_stride);
}
SlotSampling& Exchange::Sampling(int slot) const {
  return reinterpret_cast<SlotSampling*>(mapping_.data() + offsets_.sampling)[slot];
}
std::uint8_t* Exchange::PlacementEntry(int ring_index, int layer, int expert) const {
  return reinterpret_cast<std::uint8_t*>(mapping_.data() + offsets_.placements +
                                         ring_index * offsets_.placement_stride) +
         (std::size_t(layer) * shape().experts + expert) * (1 + kMaxReplicas);
}
std::atomic<std::uint64_t>& Exchange::ExpertRows(int layer, int expert) const {
  return reinterpret_cast<std::atomic<std::uint64_t>*>(
      mapping_.data() + offsets_.expert_rows)[std::size_t(layer) * shape().experts + expert];
}
PlanEntry* Exchange::Plan(int device) const {
  return reinterpret_cast<PlanEntry*>(DeviceArea(device) + offsets_.plan);
}
LogprobRecord* Exchange::Sampled(int device) const {
  return reinterpret_cast<LogprobRecord*>(DeviceArea(device) + offsets_.sampled);
}
LogprobRecord* Exchange::PromptScores(int device) const {
  return reinterpret_cast<LogprobRecord*>(DeviceArea(device) + offsets_.scores);
}
std::byte* Exchange::Activations(int device) const {
  return DeviceArea(device) + offsets_.activations;
}
std::int32_t* Exchange::Routes(int device) const {
  return reinterpret_cast<std::int32_t*>(DeviceArea(device) + offsets_.routes);
}
float* Exchange::Outputs(int device) const {
  return reinterpret_cast<float*>(DeviceArea(device) + offsets_.outputs);
}

std::byte* Exchange::HeadInputs(int device) const {
  return DeviceArea(device) + offsets_.head_inputs;
}
float* Exchange::Logits(int device) const {
  return reinterpret_cast<float*>(DeviceArea(device) + offsets_.logits);
}

void Exchange::BeginProgress() const {
  header().progress.store(kNoSwitch << 16, std::memory_order_relaxed);
}

int Exchange::EnterLayer(int layer) const {
  const auto mine = static_cast<std::uint32_t>(layer);
  std::atomic<std::uint32_t>& progress = header().progress;
  std::uint32_t now = progress.load(std::memory_order_acquire);
  while ((now & 0xffff) <= mine &&
         !progress.compare_exchange_weak(now, (now & 0xffff'0000) | (mine + 1), std::memory_order_acq_rel)) {
  }
  return mine >= now >> 16 ? 1 : 0;
}

bool Exchange::SwitchView() const {
  std::atomic<std::uint32_t>& progress = header().progress;
  std::uint32_t now = progress.load(std::memory_order_acquire);
  do {
    const std::uint32_t entered = now & 0xffff;
    if (now >> 16 != kNoSwitch || entered >= static_cast<std::uint32_t>(shape().moe_layers)) return false;
    if (progress.compare_exchange_weak(now, entered << 16 | entered, std::memory_order_acq_rel)) return true;
  } while (true);
}

int Exchange::SwitchLayer() const {
  const std::uint32_t layer = header().progress.load(std::memory_order_acquire) >> 16;
  return layer == kNoSwitch ? shape().moe_layers : static_cast<int>(layer);
}

std::vector<std::int32_t> Exchange::Participants() const {
  const StepView& first = header().views[0];
  std::vector<std::int32_t> all(first.Members().begin(), first.Members().end());
  if (SwitchLayer() == shape().moe_layers) return all;
  for (const std::int32_t member : header().views[1].Members())
    if (!first.Has(DeviceId(member))) all.push_back(member);
  return all;
}

void Exchange::WritePlacement(int ring_index, const core::Placement& placement) const {
  for (int layer = 0; layer < placement.layers(); ++layer) {
    for (int expert = 0; expert < placement.experts(); ++expert) {
      const auto owners = placement.Owners(layer, expert);
      std::uint8_t* entry = PlacementEntry(ring_index, layer, expert);
      EM_CHECK(!owners.empty());
      entry[0] = static_cast<std::uint8_t>(std::min<std::size_t>(owners.size(), kMaxReplicas));
      for (int i = 0; i < entry[0]; ++i) entry[1 + i] = static_cast<std::uint8_t>(owners[i].value);
    }
  }
}

void WriteSampling(const core::GenerationRequest& request, std::span<const TokenId> eos_ids,
                   SlotSampling& out) {
  const core::SamplingParams& params = request.sampling;
  out.seed = params.seed;
  out.temperature = params.temperature;
  out.top_p = params.top_p;
  out.min_p = params.min_p;
  out.presence_penalty = params.presence_penalty;
  out.frequency_penalty = params.frequency_penalty;
  out.repetition_penalty = params.repetition_penalty;
  out.top_k = params.top_k;
  out.logprobs = params.logprobs;
  out.prompt_logprobs = request.prompt_logprobs;
  out.prompt_tokens = static_cast<std::int32_t>(request.prompt.size());
  out.min_tokens = request.min_tokens;
  EM_CHECK(params.logit_bias.size() <= kMaxBias, "biases={}", params.logit_bias.size());
  out.bias_count = 0;
  for (const auto& [token, value] : params.logit_bias) {
    out.bias_token[out.bias_count] = token;
    out.bias_value[out.bias_count++] = value;
  }
  EM_CHECK(request.stop_token_ids.size() + eos_ids.size() <= kMaxBanned);
  out.banned_count = 0;
  for (const TokenId token : request.stop_token_ids) out.banned[out.banned_count++] = token;
  if (!request.ignore_eos)
    for (const TokenId token : eos_ids) out.banned[out.banned_count++] = token;
}

core::SamplingParams ReadSampling(const SlotSampling& in) {
  core::SamplingParams params;
  params.seed = in.seed;
  params.temperature = in.temperature;
  params.top_p = in.top_p;
  params.min_p = in.min_p;
  params.presence_penalty = in.presence_penalty;
  params.frequency_penalty = in.frequency_penalty;
  params.repetition_penalty = in.repetition_penalty;
  params.top_k = in.top_k;
  params.logprobs = in.logprobs;
  for (int i = 0; i < in.bias_count; ++i) params.logit_bias.emplace_back(in.bias_token[i], in.bias_value[i]);
  return params;
}

void WriteLogprob(const core::TokenLogprob& in, LogprobRecord& out) {
  out.token = in.token;
  out.logprob = in.logprob;
  out.top_count = static_cast<std::int32_t>(std::min<std::size_t>(in.top.size(), core::kMaxTopLogprobs));
  for (int i = 0; i < out.top_count; ++i) {
    out.top_token[i] = in.top[i].first;
    out.top_logprob[i] = in.top[i].second;
  }
}

core::TokenLogprob ReadLogprob(const LogprobRecord& in) {
  core::TokenLogprob out;
  out.token = in.token;
  out.logprob = in.logprob;
  for (int i = 0; i < in.top_count; ++i) out.top.emplace_back(in.top_token[i], in.top_logprob[i]);
  return out;
}

}  // namespace elasticmoe::runtime
