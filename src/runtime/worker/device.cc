#include "runtime/worker/device.h"

#include <algorithm>

#include "base/check.h"
#include "base/clock.h"
#include "compute/sampler.h"
#include "runtime/hmm/loader.h"

namespace elasticmoe::runtime {
namespace {

// Logits of so many rows are held at once; bounds the buffer, not the step.
constexpr int kLogitRows = 32;

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
  return {};
}

Status Device::Prepare(const MemoryMap& map, std::uint64_t epoch) {
  const DomainMap* domain = map.Find(map.DomainOf(id_));
  if (domain == nullptr)
    return Fail(ErrorCode::kNotFound, "preparing epoch {}: device {} has no domain", epoch, id_);
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
  return {};
}

bool Device::GivenUp(std::uint32_t step) const {
  return exchange_.header().abort_step.load(std::memory_order_acquire) == step;
}

bool Device::AwaitDispatched(std::uint32_t step, std::uint32_t tag) {
  const ExchangeHeader& header = exchange_.header();
  const std::int64_t start = Now();
  for (int rank = 0; rank < header.member_count; ++rank) {
    if (!WaitFor(
            exchange_.device(header.members[rank]).dispatched, {header.spin},
            [&](std::uint32_t value) { return Reached(value, tag); }, [&] { return GivenUp(step); }))
      return false;
  }
  wait_ns_ += Now() - start;
  return true;
}

bool Device::AwaitReturned(std::uint32_t step, std::uint32_t tag) {
  const ExchangeHeader& header = exchange_.header();
  const std::int64_t start = Now();
  for (int rank = 0; rank < header.member_count; ++rank) {
    if (!WaitFor(
            exchange_.device(header.members[rank]).returned, {header.spin},
            [&](std::uint32_t value) { return Reached(value, tag); }, [&] { return GivenUp(step); }))
      return false;
  }
  wait_ns_ += Now() - start;
  return true;
}

// Rows come rank by rank, row by row: the order does not matter to any value, but it is fixed.
void Device::ServeExperts(int ring, std::uint32_t step, int layer, const EpochExperts& experts) {
  const ExchangeHeader& header = exchange_.header();
  const ExchangeShape& shape = exchange_.shape();
  for (auto& rows : rows_by_expert_) rows.clear();
  const std::size_t row_bytes = std::size_t(shape.hidden) * shape.activation_bytes;
  std::uint64_t served = 0;
  for (int rank = 0; rank < header.member_count; ++rank) {
    const int source = header.members[rank];
    const int rows = exchange_.device(source).row_count;
    const std::int32_t* routes = exchange_.Routes(source);
    const std::byte* activations = exchange_.Activations(source);
    float* outputs = exchange_.Outputs(source);
    for (int row = 0; row < rows; ++row) {
      for (int j = 0; j < shape.top_k; ++j) {
        const int expert = routes[row * shape.top_k + j];
        if (expert < 0) break;  // top-any chose fewer
        if (exchange_.OwnerFor(ring, layer, expert, rank) != id_.value) continue;
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
    EM_CHECK(weights.gate.data != nullptr, "step={} layer={} expert={} device={}", step, layer, expert, id_);
    batches_.push_back({weights, rows_by_expert_[expert]});
    exchange_.ExpertRows(layer, expert).fetch_add(rows_by_expert_[expert].size(), std::memory_order_relaxed);
  }
  if (!batches_.empty()) compute::RunExperts(spec_, kernels_, threads_, batches_, scratch_);
  exchange_.device(id_.value).expert_rows.fetch_add(served, std::memory_order_relaxed);
}

bool Device::RunStep(std::uint32_t step) {
  const std::int64_t start = Now();
  wait_ns_ = 0;
  const ExchangeHeader& header = exchange_.header();
  const ExchangeShape& shape = exchange_.shape();
  DeviceHeader& mine = exchange_.device(id_.value);
  const int ring = header.placement_index;
  const EpochExperts& experts = epochs_[ring];
  EM_CHECK(experts.valid && experts.epoch == header.epoch, "step={} epoch={} prepared={}", step, header.epoch,
           experts.epoch);

  const int rows = mine.row_count;
  tokens_.clear();
  chunks_of_step_.clear();
  for (int i = 0; i < mine.entry_count; ++i) {
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
  EM_CHECK(static_cast<int>(tokens_.size()) == rows);

  const std::uint32_t last_tag = LayerTag(step, shape.moe_layers, shape.moe_layers - 1);
  if (rows == 0) mine.dispatched.Set(last_tag);
  if (experts.owned == 0) mine.returned.Set(last_tag);
  mix_.resize(std::size_t(rows) * shape.top_k);
  if (rows > 0) forward_.Begin(shared_, tokens_, chunks_of_step_);

  for (int layer = 0; layer < spec_.LayerCount(); ++layer) {
    if (rows > 0) forward_.Attention(layer, shared_, kv_);
    const int moe_layer = moe_index_[layer];
    if (moe_layer < 0) {
      if (rows > 0) forward_.DenseMlp(layer, shared_);
      continue;
    }
    const std::uint32_t tag = LayerTag(step, shape.moe_layers, moe_layer);
    if (rows > 0) {
      forward_.Route(layer, shared_, exchange_.Activations(id_.value), exchange_.Routes(id_.value),
                     mix_.data());
      mine.dispatched.Set(tag);
    }
    if (experts.owned > 0) {
      if (!AwaitDispatched(step, tag)) return false;
      ServeExperts(ring, step, moe_layer, experts);
      mine.returned.Set(tag);
    }
    if (rows > 0) {
      if (!AwaitReturned(step, tag)) return false;
      forward_.Combine(exchange_.Outputs(id_.value), mix_.data());
    }
  }
  if (GivenUp(step)) return false;
  if (rows > 0) SampleRows();
  mine.wait_ns = wait_ns_;
  mine.compute_ns = Now() - start - wait_ns_;
  Finish(step);
  return true;
}

void Device::SampleRows() {
  const int vocab = spec_.vocab;
  // (plan entry, row of the step, index of the row within its entry) for each row whose logits are wanted.
  struct Wanted {
    int entry, row, within;
  };
  std::vector<Wanted> wanted;
  for (int i = 0, row = 0; i < exchange_.device(id_.value).entry_count; ++i) {
    const PlanEntry& entry = exchange_.Plan(id_.value)[i];
    for (int within = 0; within < entry.rows; ++within, ++row) {
      const bool last = within + 1 == entry.rows;
      if (entry.score_prompt || (last && entry.sample)) wanted.push_back({i, row, within});
    }
  }
  logits_.resize(std::size_t(kLogitRows) * vocab);
  std::vector<int> which;
  for (std::size_t begin = 0; begin < wanted.size(); begin += kLogitRows) {
    const std::size_t count = std::min<std::size_t>(kLogitRows, wanted.size() - begin);
    which.clear();
    for (std::size_t i = 0; i < count; ++i) which.push_back(wanted[begin + i].row);
    forward_.Logits(shared_, which, logits_.data());
    threads_.Run(static_cast<int>(count), [&](int i) {
      const Wanted& want = wanted[begin + i];
      const PlanEntry& entry = exchange_.Plan(id_.value)[want.entry];
      const SlotSampling& slot = exchange_.Sampling(entry.table_slot);
      const std::int32_t* history = exchange_.TokenHistory(entry.table_slot);
      const std::span<float> logits(logits_.data() + std::size_t(i) * vocab, vocab);
      const int position = entry.start_position + want.within;  // of this row; it predicts position + 1
      if (entry.score_prompt && position + 1 < slot.prompt_tokens)
        WriteLogprob(compute::Score(logits, history[position + 1], slot.prompt_logprobs),
                     exchange_.PromptScores(id_.value)[want.row]);
      if (entry.sample && want.within + 1 == entry.rows) {
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
    });
  }
}

void Device::Finish(std::uint32_t step) {
  exchange_.device(id_.value).finished_step.store(step, std::memory_order_release);
  exchange_.header().finish.Increment();
}

}  // namespace elasticmoe::runtime
