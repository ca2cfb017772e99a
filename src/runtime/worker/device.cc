#include "runtime/worker/device.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "base/clock.h"
#include "compute/sampler.h"
#include "runtime/hmm/loader.h"

namespace elasticmoe::runtime {
namespace {

// Sharing the head costs a wait for all; one of fewer weights is read sooner than that.
constexpr std::size_t kSharedHead = std::size_t{1} << 20;

}  // namespace

Device::Device(DeviceId id, const core::ModelSpec& spec, const compute::Kernels& kernels,
               std::vector<int> cpus, ExpertTableKind expert_table, Exchange& exchange)
    : id_(id),
      spec_(spec),
      kernels_(kernels),
      exchange_(exchange),
      layout_(spec),
      threads_(cpus),
      forward_(spec, kernels, threads_, exchange.shape().max_rows),
      moe_index_(MoeIndex(spec)),
      table_kind_(expert_table),
      rows_by_expert_(spec.moe.experts) {}

Status Device::Attach(const MemoryMap& map, Fd domain_fd) {
  const DomainMap* domain = map.Find(map.DomainOf(id_));
  if (domain == nullptr)
    return Fail(ErrorCode::kNotFound, "attaching device {}: domain={} is not open", id_, map.DomainOf(id_));
  table_.reset();
  domain_fd_ = std::move(domain_fd);
  EM_ASSIGN_OR_RETURN(domain_, Map(domain_fd_.get(), 0, domain->bytes, true));
  table_ = MakeExpertTable(table_kind_,
                           {exchange_.shape().moe_layers, exchange_.shape().experts, layout_.ExpertBytes(),
                            map.pages_per_expert * map.page_bytes, kPlacementRing},
                           domain_, domain_fd_.get());
  Prefault(domain_.data() + domain->shared_offset, layout_.SharedBytes());
  shared_ = compute::BindShared(spec_, layout_, domain_.data() + domain->shared_offset);
  kv_.layout = compute::KvLayout::Of(spec_, map.kv_element_bytes);
  kv_.blocks_per_chunk = map.blocks_per_chunk;
  chunks_.assign(domain->bytes / (kv_.blocks_per_chunk * kv_.layout.BlockBytes()), nullptr);
  kv_.chunks = chunks_.data();
  EM_RETURN_IF_ERROR(SetKvChunks(domain->kv_chunks));
  for (EpochExperts& epoch : epochs_) epoch.valid = false;
  return {};
}

Status Device::SetKvChunks(const std::vector<std::uint64_t>& offsets) {
  AfterSteps();
  const std::size_t chunk_bytes = kv_.blocks_per_chunk * kv_.layout.BlockBytes();
  if (offsets.size() > chunks_.size())
    return Fail(ErrorCode::kInvalidArgument, "sizing KV: chunks={} (limit={})", offsets.size(),
                chunks_.size());
  for (std::size_t i = 0; i < offsets.size(); ++i) {
    std::byte* chunk = domain_.data() + offsets[i];
    if (chunks_[i] == chunk) continue;
    Prefault(chunk, chunk_bytes);
    chunks_[i] = chunk;
  }
  // Their memory goes: if it comes back, its page tables have to be made again.
  std::fill(chunks_.begin() + static_cast<std::ptrdiff_t>(offsets.size()), chunks_.end(), nullptr);
  Prepared();
  return {};
}

Status Device::Prepare(const MemoryMap& map, std::uint64_t epoch) {
  const DomainMap* domain = map.Find(map.DomainOf(id_));
  if (domain == nullptr)
    return Fail(ErrorCode::kNotFound, "preparing epoch {}: device {} has no domain", epoch, id_);
  AfterSteps();
  EpochExperts& entry = epochs_[epoch % kPlacementRing];
  entry = EpochExperts{};
  entry.epoch = epoch;
  entry.weights.resize(std::size_t(exchange_.shape().moe_layers) * exchange_.shape().experts);
  const int ring = static_cast<int>(epoch % kPlacementRing);
  std::vector<OwnedExpert> owned_experts;
  for (int layer = 0; layer < exchange_.shape().moe_layers; ++layer) {
    for (int expert = 0; expert < exchange_.shape().experts; ++expert) {
      const std::uint8_t* owners = exchange_.PlacementEntry(ring, layer, expert);
      bool owned = false;
      for (int i = 0; i < owners[0]; ++i) owned |= owners[1 + i] == id_.value;
      if (!owned) continue;
      const std::size_t index = std::size_t(layer) * exchange_.shape().experts + expert;
      const std::int64_t offset = domain->expert_offsets[index];
      if (offset < 0)
        return Fail(ErrorCode::kFailedPrecondition,
                    "preparing epoch {}: layer={} expert={} is not in the domain of device {}", epoch, layer,
                    expert, id_);
      owned_experts.push_back({layer, expert, static_cast<std::uint64_t>(offset)});
    }
  }
  EM_ASSIGN_OR_RETURN(const std::vector<std::byte*> addresses, table_->Prepare(epoch, owned_experts));
  for (std::size_t i = 0; i < addresses.size(); ++i)
    entry.weights[std::size_t(owned_experts[i].layer) * exchange_.shape().experts + owned_experts[i].expert] =
        compute::BindExpert(spec_, layout_, addresses[i]);
  entry.owned = static_cast<int>(addresses.size());
  entry.valid = true;
  Prepared();
  return {};
}

void Device::AfterSteps() const {
  (void)exchange_.device(id_.value).finished_step.load(std::memory_order_acquire);
}

void Device::Prepared() {
  preparations_.fetch_add(1, std::memory_order_release);
}

bool Device::GivenUp(std::uint32_t step) const {
  return exchange_.header().abort_step.load(std::memory_order_acquire) == step;
}

bool Device::Await(const StepView& view, SharedWord DeviceHeader::*word, std::uint32_t step,
                   std::uint32_t tag) {
  const SpinPolicy spin{exchange_.header().spin};
  const std::int64_t start = Now();
  for (const std::int32_t member : view.Members()) {
    if (!WaitFor(
            exchange_.device(member).*word, spin, [&](std::uint32_t value) { return Reached(value, tag); },
            [&] { return GivenUp(step); }))
      return false;
  }
  wait_ns_ += Now() - start;
  return true;
}

// Rows come rank by rank, row by row: the order does not matter to any value, but it is fixed.
void Device::ServeExperts(const StepView& view, int layer, const EpochExperts& experts) {
  const ExchangeShape& shape = exchange_.shape();
  for (auto& rows : rows_by_expert_) rows.clear();
  const std::size_t row_bytes = std::size_t(shape.hidden) * shape.activation_bytes;
  std::uint64_t served = 0;
  for (int rank = 0; rank < view.member_count; ++rank) {
    const int source = view.members[rank];
    const int rows = exchange_.device(source).row_count;
    const std::int32_t* routes = exchange_.Routes(source);
    const std::byte* activations = exchange_.Activations(source);
    float* outputs = exchange_.Outputs(source);
    for (int row = 0; row < rows; ++row) {
      for (int j = 0; j < shape.top_k; ++j) {
        const int expert = routes[row * shape.top_k + j];
        if (expert < 0) break;  // top-any chose fewer
        if (exchange_.OwnerFor(view.placement_index, layer, expert, rank) != id_.value) continue;
        rows_by_expert_[expert].push_back(
            {activations + row * row_bytes, outputs + (std::size_t(row) * shape.top_k + j) * shape.hidden});
        ++served;
      }
    }
  }
  batches_.clear();
  for (int expert = 0; expert < shape.experts; ++expert) {
    if (rows_by_expert_[expert].empty()) continue;
    const compute::MlpWeights& weights = experts.weights[std::size_t(layer) * shape.experts + expert];
    EM_CHECK(weights.gate.data != nullptr, "epoch={} layer={} expert={} device={}", view.epoch, layer, expert,
             id_);
    batches_.push_back({weights, rows_by_expert_[expert]});
    exchange_.ExpertRows(layer, expert).fetch_add(rows_by_expert_[expert].size(), std::memory_order_relaxed);
  }
  if (!batches_.empty()) compute::RunExperts(spec_, kernels_, threads_, batches_, scratch_);
  exchange_.device(id_.value).expert_rows.fetch_add(served, std::memory_order_relaxed);
}

const Device::EpochExperts& Device::ExpertsOf(const StepView& view) const {
  (void)preparations_.load(std::memory_order_acquire);
  const EpochExperts& experts = epochs_[view.placement_index];
  EM_CHECK(experts.valid && experts.epoch == view.epoch, "device={} epoch={} prepared={}", id_, view.epoch,
           experts.epoch);
  return experts;
}

int Device::CollectRows() {
  tokens_.clear();
  chunks_of_step_.clear();
  for (int i = 0; i < exchange_.device(id_.value).entry_count; ++i) {
    const PlanEntry& entry = exchange_.Plan(id_.value)[i];
    const std::int32_t* history = exchange_.TokenHistory(entry.table_slot);
    const int blocks =
        (entry.start_position + entry.rows + compute::kBlockTokens - 1) / compute::kBlockTokens;
    chunks_of_step_.push_back({static_cast<int>(tokens_.size()),
                               entry.rows,
                               entry.start_position,
                               {exchange_.BlockTable(entry.table_slot), static_cast<std::size_t>(blocks)}});
    tokens_.insert(tokens_.end(), history + entry.start_position,
                   history + entry.start_position + entry.rows);
  }
  const int rows = exchange_.device(id_.value).row_count;
  EM_CHECK(static_cast<int>(tokens_.size()) == rows);
  return rows;
}

bool Device::RunStep(std::uint32_t step) {
  const std::int64_t start = Now();
  wait_ns_ = 0;
  const ExchangeHeader& header = exchange_.header();
  const ExchangeShape& shape = exchange_.shape();
  DeviceHeader& mine = exchange_.device(id_.value);
  const bool joins = !header.views[0].Has(id_);  // on the way
  const StepView* view = &header.views[joins ? 1 : 0];
  const EpochExperts* experts = &ExpertsOf(*view);
  const int first_served = joins ? exchange_.SwitchLayer() : 0;

  const int rows = CollectRows();
  // Of the last layer: the head has a tag of its own, since all members take part there.
  const std::uint32_t last_tag = LayerTag(step, shape.moe_layers, shape.moe_layers - 1);
  if (rows == 0) mine.dispatched.Set(last_tag);
  if (experts->owned == 0) mine.returned.Set(last_tag);
  mix_.resize(std::size_t(rows) * shape.top_k);
  if (rows > 0) forward_.Begin(shared_, tokens_, chunks_of_step_);

  for (int layer = 0; layer < spec_.LayerCount(); ++layer) {
    if (rows > 0) forward_.Attention(layer, shared_, kv_);
    const int moe_layer = moe_index_[layer];
    if (moe_layer < 0) {
      if (rows > 0) forward_.DenseMlp(layer, shared_);
      continue;
    }
    // Whoever has nothing to do is not waited for, and must not run ahead of those who have.
    if (moe_layer < first_served || (rows == 0 && experts->owned == 0)) continue;
    const std::uint32_t tag = LayerTag(step, shape.moe_layers, moe_layer);
    if (rows > 0) {
      forward_.Route(layer, shared_, exchange_.Activations(id_.value), exchange_.Routes(id_.value),
                     mix_.data());
      mine.dispatched.Set(tag);
    }
    if (exchange_.EnterLayer(moe_layer) == 1 && view == &header.views[0]) {
      view = &header.views[1];
      if (!view->Has(id_)) {  // it has left: its rows are at an end, nobody asks it for experts
        EM_CHECK(rows == 0);
        break;
      }
      experts = &ExpertsOf(*view);
      if (experts->owned == 0) mine.returned.Set(last_tag);
    }
    if (experts->owned > 0) {
      if (!Await(*view, &DeviceHeader::dispatched, step, tag)) return false;
      ServeExperts(*view, moe_layer, *experts);
      mine.returned.Set(tag);
    }
    if (rows > 0) {
      if (!Await(*view, &DeviceHeader::returned, step, tag)) return false;
      forward_.Combine(exchange_.Outputs(id_.value), mix_.data());
    }
  }
  CollectWanted();
  mine.head_rows = 0;
  if (std::size_t(spec_.vocab) * spec_.hidden >= kSharedHead && !ShareHead(step)) return false;
  if (GivenUp(step)) return false;
  if (rows > 0) SampleRows();
  mine.wait_ns = wait_ns_;
  mine.begin_ns = start;
  mine.end_ns = Now();
  mine.compute_ns = mine.end_ns - start - wait_ns_;
  Finish(step);
  return true;
}

void Device::CollectWanted() {
  wanted_.clear();
  for (int i = 0, row = 0; i < exchange_.device(id_.value).entry_count; ++i) {
    const PlanEntry& entry = exchange_.Plan(id_.value)[i];
    for (int within = 0; within < entry.rows; ++within, ++row) {
      const bool last = within + 1 == entry.rows;
      if (entry.score_prompt || (last && entry.sample)) wanted_.push_back({i, row, within});
    }
  }
}

// The head is read once a step by all together rather than by each: a member computes its part of the
// vocabulary for the rows of all.
bool Device::ShareHead(std::uint32_t step) {
  const ExchangeHeader& header = exchange_.header();
  const ExchangeShape& shape = exchange_.shape();
  DeviceHeader& mine = exchange_.device(id_.value);
  const std::uint32_t tag = LayerTag(step, shape.moe_layers, shape.moe_layers);
  const std::size_t row_bytes = std::size_t(shape.hidden) * shape.activation_bytes;
  if (wanted_.size() <= kHeadRows) mine.head_rows = static_cast<int>(wanted_.size());
  which_.clear();
  for (int i = 0; i < mine.head_rows; ++i) which_.push_back(wanted_[i].row);
  forward_.HeadInput(shared_, which_, exchange_.HeadInputs(id_.value));
  mine.dispatched.Set(tag);
  // Rows are with members of the first view only. Once they are here, no layer is left to switch at.
  if (!Await(header.views[0], &DeviceHeader::dispatched, step, tag)) return false;
  const StepView& view = header.views[exchange_.SwitchLayer() < shape.moe_layers ? 1 : 0];
  const auto members = view.Members();
  const auto part = std::find(members.begin(), members.end(), id_.value) - members.begin();
  if (part == view.member_count) return true;  // it has left on the way
  // Side by side, as kernels like them: little to copy for what is computed of it.
  head_in_.clear();
  head_out_.clear();
  head_rows_.resize(header.views[0].member_count * kHeadRows * row_bytes);
  for (const std::int32_t source : header.views[0].Members()) {
    const int rows = exchange_.device(source).head_rows;
    std::memcpy(head_rows_.data() + head_in_.size() * row_bytes, exchange_.HeadInputs(source),
                rows * row_bytes);
    for (int row = 0; row < rows; ++row) {
      head_in_.push_back(head_rows_.data() + head_in_.size() * row_bytes);
      head_out_.push_back(exchange_.Logits(source) + std::size_t(row) * shape.vocab);
    }
  }
  forward_.HeadPart(shared_, head_in_, head_out_, static_cast<int>(part), view.member_count);
  mine.returned.Set(tag);
  return mine.head_rows == 0 || Await(view, &DeviceHeader::returned, step, tag);
}

void Device::SampleRows() {
  const std::size_t vocab = static_cast<std::size_t>(spec_.vocab);
  float* logits = exchange_.Logits(id_.value);
  const bool shared = exchange_.device(id_.value).head_rows > 0;  // they are there already
  for (std::size_t begin = 0; begin < wanted_.size(); begin += kHeadRows) {
    const std::size_t count = std::min<std::size_t>(kHeadRows, wanted_.size() - begin);
    if (!shared) {
      which_.clear();
      for (std::size_t i = 0; i < count; ++i) which_.push_back(wanted_[begin + i].row);
      forward_.Logits(shared_, which_, logits);
    }
    threads_.Run(static_cast<int>(count), [&](int i) {
      SampleRow(wanted_[begin + i], {logits + std::size_t(i) * vocab, vocab});
    });
  }
}

void Device::SampleRow(const Wanted& want, std::span<float> logits) {
  const PlanEntry& entry = exchange_.Plan(id_.value)[want.entry];
  const SlotSampling& slot = exchange_.Sampling(entry.table_slot);
  const std::int32_t* history = exchange_.TokenHistory(entry.table_slot);
  const int position = entry.start_position + want.within;  // of this row; it predicts position + 1
  if (entry.score_prompt && position + 1 < slot.prompt_tokens)
    WriteLogprob(compute::Score(logits, history[position + 1], slot.prompt_logprobs),
                 exchange_.PromptScores(id_.value)[want.row]);
  if (!entry.sample || want.within + 1 != entry.rows) return;
  const core::SamplingParams params = ReadSampling(slot);
  const int next = position + 1;
  compute::SampleInput input;
  input.logits = logits;
  input.params = &params;
  if (next - slot.prompt_tokens < slot.min_tokens)
    input.banned = {slot.banned, std::size_t(slot.banned_count)};
  input.prompt = {history, std::size_t(slot.prompt_tokens)};
  input.generated = {history + slot.prompt_tokens, std::size_t(next - slot.prompt_tokens)};
  input.position = next;
  WriteLogprob(compute::Sample(input), exchange_.Sampled(id_.value)[want.entry]);
}

void Device::Finish(std::uint32_t step) {
  exchange_.device(id_.value).finished_step.store(step, std::memory_order_release);
  exchange_.header().finish.Increment();
}

}  // namespace elasticmoe::runtime
