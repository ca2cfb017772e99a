#include "cli/bench_forward.h"

#include <algorithm>

#include "base/check.h"
#include "compute/sampler.h"
#include "runtime/hmm/loader.h"

namespace elasticmoe::cli {
namespace {

// Products of one row with all that is no expert.
double OperationsOfRow(const core::ModelSpec& spec, const compute::WeightLayout& layout) {
  double weights = 0;
  const auto add = [&](compute::Role role, int layer) {
    const compute::TensorPlace& place = layout.Place(role, layer);
    weights += static_cast<double>(place.n) * place.k;
  };
  const double mlp = 3.0 * spec.hidden;  // a unit of width
  for (int layer = 0; layer < spec.LayerCount(); ++layer) {
    const core::AttentionSpec& a = spec.attention;
    weights += static_cast<double>(a.QkvRows()) * spec.hidden;
    if (a.q_lora_rank > 0) add(compute::Role::kQUp, layer);
    if (a.Latent()) add(compute::Role::kKvUp, layer);
    add(compute::Role::kO, layer);
    if (spec.layers[layer].moe) {
      add(compute::Role::kRouter, layer);
      weights += mlp * spec.moe.shared_width;
    } else {
      weights += mlp * spec.layers[layer].dense_width;
    }
  }
  return 2 * weights;
}

}  // namespace

core::SamplingParams SamplingOf(int sequence) {
  return {.temperature = 100, .seed = static_cast<std::uint64_t>(sequence) + 1};
}

ForwardAlone::ForwardAlone(const core::ModelSpec& spec, const compute::Kernels& kernels, Options options)
    : spec_(spec),
      kernels_(kernels),
      options_(std::move(options)),
      layout_(spec),
      threads_(options_.cpus),
      forward_(spec, kernels, threads_, options_.max_rows),
      moe_index_(runtime::MoeIndex(spec)),
      row_operations_(OperationsOfRow(spec, layout_)),
      visits_(static_cast<std::size_t>(spec.moe.experts)) {}

Expected<std::unique_ptr<ForwardAlone>> ForwardAlone::Attach(const core::ModelSpec& spec,
                                                             const compute::Kernels& kernels,
                                                             Options options) {
  std::unique_ptr<ForwardAlone> alone(new ForwardAlone(spec, kernels, std::move(options)));
  EM_RETURN_IF_ERROR(alone->Map());
  return alone;
}

Status ForwardAlone::Map() {
  EM_ASSIGN_OR_RETURN(const auto hmm, runtime::HmmClient::Connect(options_.hmm_socket));
  EM_ASSIGN_OR_RETURN(memory_, hmm->Describe());
  const int moe_layers = runtime::MoeLayerCount(spec_);
  experts_.resize(static_cast<std::size_t>(moe_layers) * spec_.moe.experts);
  for (std::size_t i = 0; i < memory_.map.domains.size(); ++i) {
    const runtime::DomainMap& domain = memory_.map.domains[i];
    EM_ASSIGN_OR_RETURN(runtime::Mapping mapping, runtime::Map(memory_.fds[i].get(), 0, domain.bytes, true));
    std::byte* const data = mapping.data();
    if (i == 0) {
      runtime::Prefault(data + domain.shared_offset, layout_.SharedBytes());
      shared_ = compute::BindShared(spec_, layout_, data + domain.shared_offset);
    }
    for (std::size_t e = 0; e < experts_.size(); ++e) {
      const std::int64_t offset = domain.expert_offsets[e];
      if (offset < 0 || experts_[e].gate.data != nullptr) continue;
      runtime::Prefault(data + offset, layout_.ExpertBytes());
      experts_[e] = compute::BindExpert(spec_, layout_, data + offset);
    }
    domains_.push_back(std::move(mapping));
  }
  kv_.layout = compute::KvLayout::Of(spec_, kernels_.kv_element_bytes);
  const int blocks_each = (options_.tokens_each + compute::kBlockTokens - 1) / compute::kBlockTokens;
  const std::size_t blocks = static_cast<std::size_t>(blocks_each) * options_.sequences;
  kv_.blocks_per_chunk = static_cast<std::uint32_t>(blocks);
  const std::size_t bytes =
      (blocks * kv_.layout.BlockBytes() + runtime::kHugePage - 1) / runtime::kHugePage * runtime::kHugePage;
  const runtime::PageKind kind = runtime::BestPageKind();
  EM_ASSIGN_OR_RETURN(kv_memory_, runtime::CreateMemory("elasticmoe-bench-kv", bytes, kind));
  EM_ASSIGN_OR_RETURN(kv_mapping_, runtime::Map(kv_memory_.get(), 0, bytes, true));
  EM_RETURN_IF_ERROR(runtime::Populate(kv_mapping_.data(), bytes, kind));
  chunks_ = {kv_mapping_.data()};
  kv_.chunks = chunks_.data();
  std::uint32_t next = 0;
  tables_.resize(static_cast<std::size_t>(options_.sequences));
  for (auto& table : tables_)
    for (int i = 0; i < blocks_each; ++i) table.push_back(next++);
  Forget();
  return {};
}

void ForwardAlone::Forget() {
  lengths_.assign(tables_.size(), 0);
}

Work ForwardAlone::TakeWork() {
  return std::exchange(work_, Work{});
}

std::vector<TokenId> ForwardAlone::Step(std::span<const Part> parts) {
  std::vector<TokenId> tokens;
  std::vector<compute::Chunk> chunks;
  std::vector<int> last_rows;
  for (const Part& part : parts) {
    int& length = lengths_[static_cast<std::size_t>(part.sequence)];
    const int rows = static_cast<int>(part.tokens.size());
    EM_CHECK(length + rows <= options_.tokens_each, "length={} rows={}", length, rows);
    chunks.push_back({static_cast<int>(tokens.size()), rows, length, tables_[part.sequence]});
    tokens.insert(tokens.end(), part.tokens.begin(), part.tokens.end());
    length += rows;
    last_rows.push_back(static_cast<int>(tokens.size()) - 1);
  }
  const std::size_t rows = tokens.size();
  activations_.resize(rows * spec_.hidden * kernels_.activation_bytes);
  chosen_.resize(rows * spec_.moe.top_k);
  mix_.resize(chosen_.size());
  outputs_.resize(chosen_.size() * spec_.hidden);
  forward_.Begin(shared_, tokens, chunks);
  for (int layer = 0; layer < spec_.LayerCount(); ++layer) {
    forward_.Attention(layer, shared_, kv_);
    if (moe_index_[layer] < 0) {
      forward_.DenseMlp(layer, shared_);
    } else {
      Experts(layer, moe_index_[layer]);
    }
  }
  logits_.resize(parts.size() * spec_.vocab);
  forward_.Logits(shared_, last_rows, logits_.data());
  std::vector<TokenId> next(parts.size());
  threads_.Run(static_cast<int>(parts.size()), [&](int i) {
    const std::span<float> logits(logits_.data() + static_cast<std::size_t>(i) * spec_.vocab,
                                  static_cast<std::size_t>(spec_.vocab));
    const int sequence = parts[static_cast<std::size_t>(i)].sequence;
    const core::SamplingParams sampling = SamplingOf(sequence);
    next[static_cast<std::size_t>(i)] =
        compute::Sample({.logits = logits, .params = &sampling, .position = lengths_[sequence]}).token;
  });
  Count(chunks, static_cast<int>(rows), static_cast<int>(parts.size()));
  return next;
}

void ForwardAlone::Experts(int layer, int moe_layer) {
  forward_.Route(layer, shared_, activations_.data(), chosen_.data(), mix_.data());
  const std::size_t row_bytes = static_cast<std::size_t>(spec_.hidden) * kernels_.activation_bytes;
  for (auto& rows : visits_) rows.clear();
  for (std::size_t i = 0; i < chosen_.size(); ++i) {
    if (chosen_[i] < 0) continue;  // fewer than top_k
    work_.operations += 6.0 * spec_.hidden * spec_.moe.expert_width;
    visits_[static_cast<std::size_t>(chosen_[i])].push_back(
        {activations_.data() + i / spec_.moe.top_k * row_bytes, &outputs_[i * spec_.hidden]});
  }
  std::vector<compute::ExpertBatch> batches;
  for (int expert = 0; expert < spec_.moe.experts; ++expert) {
    if (visits_[expert].empty()) continue;
    batches.push_back(
        {experts_[static_cast<std::size_t>(moe_layer) * spec_.moe.experts + expert], visits_[expert]});
    work_.bytes += static_cast<double>(layout_.ExpertBytes());
  }
  compute::RunExperts(spec_, kernels_, threads_, batches, scratch_);
  forward_.Combine(outputs_.data(), mix_.data());
}

void ForwardAlone::Count(std::span<const compute::Chunk> chunks, int rows, int logit_rows) {
  const core::AttentionSpec& a = spec_.attention;
  work_.operations += rows * row_operations_ + 2.0 * logit_rows * spec_.vocab * spec_.hidden;
  work_.bytes += static_cast<double>(layout_.SharedBytes());
  if (!spec_.tied_head)  // of the embedding only the rows' own are read
    work_.bytes -= static_cast<double>(compute::PackedBytes(spec_.vocab, spec_.hidden));
  const double key = a.Latent() ? a.LatentDim() : a.head_dim,
               value = a.Latent() ? a.kv_lora_rank : a.head_dim;
  const double token_bytes = static_cast<double>(kv_.layout.BlockBytes()) / compute::kBlockTokens;
  for (const compute::Chunk& chunk : chunks) {
    const double seen = chunk.start_position + (chunk.rows + 1) / 2.0;  // tokens, the mean of its rows
    work_.operations += 2.0 * spec_.LayerCount() * a.heads * (key + value) * seen * chunk.rows;
    work_.bytes += token_bytes * (chunk.start_position + chunk.rows);
  }
}

}  // namespace elasticmoe::cli
