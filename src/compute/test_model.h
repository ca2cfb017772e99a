// For the tests of this module: models in private memory (read from a small checkpoint or made from a seed)
// and a driver that takes sequences through Forward the way a worker does, experts included. Reads
// safetensors trustingly: real checkpoints are model/checkpoint.h's.
#pragma once

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/file.h"
#include "base/json.h"
#include "base/rng.h"
#include "compute/forward.h"

namespace elasticmoe::compute::testing {

// Zeroed bytes on a cache line of their own.
class Blob {
 public:
  explicit Blob(std::size_t bytes) : lines_((bytes + kAlign - 1) / kAlign) {}
  std::byte* data() { return lines_.data()->bytes; }
  const std::byte* data() const { return lines_.data()->bytes; }
  void Fill(int value) { std::memset(data(), value, lines_.size() * kAlign); }

 private:
  struct alignas(kAlign) Line {
    std::byte bytes[kAlign] = {};
  };
  std::vector<Line> lines_;
};

inline std::string MustRead(const std::filesystem::path& path) {
  auto text = ReadFile(path);
  EM_CHECK(text.has_value(), "{}", text.error().message);
  return *std::move(text);
}

inline Json MustParse(std::string_view text) {
  auto json = ParseJson(text);
  EM_CHECK(json.has_value(), "{}", json.error().message);
  return *std::move(json);
}

// A float32 [rows, columns] array of NumPy.
struct Array {
  std::size_t columns = 0;
  std::vector<float> values;
  std::size_t Rows() const { return values.size() / columns; }
  const float* Row(std::size_t row) const { return &values[row * columns]; }
};

inline Array ReadNpy(const std::filesystem::path& path, std::size_t columns) {
  const std::string text = MustRead(path);
  const std::size_t begin =
      10 + static_cast<unsigned char>(text[8]) + 256 * static_cast<unsigned char>(text[9]);
  EM_CHECK(text.substr(0, begin).find("'<f4', 'fortran_order': False") != std::string::npos, "{}",
           path.string());
  Array array{columns, std::vector<float>((text.size() - begin) / sizeof(float))};
  std::memcpy(array.values.data(), text.data() + begin, array.values.size() * sizeof(float));
  return array;
}

class TestModel {
 public:
  // Of Qwen3-MoE or Mixtral with one model.safetensors.
  static TestModel Load(const std::filesystem::path& directory);
  // Weights from `seed`, scaled so that activations keep their size.
  static TestModel Random(const core::ModelSpec& spec, std::uint64_t seed);

  const core::ModelSpec& Spec() const { return *spec_; }
  const SharedWeights& Shared() const { return shared_; }
  MlpWeights Expert(int layer, int expert) const {
    return BindExpert(*spec_, layout_, experts_[std::size_t(layer) * spec_->moe.experts + expert].data());
  }
  // The values that went in, row-major [n, k]; empty where the model has no such tensor.
  const std::vector<float>& Plain(Role role, int layer = -1, int expert = -1) const {
    static const std::vector<float> kNone;
    const auto found = plain_.find({static_cast<int>(role), layer, expert});
    return found == plain_.end() ? kNone : found->second;
  }

 private:
  explicit TestModel(const core::ModelSpec& spec)
      : spec_(std::make_unique<core::ModelSpec>(spec)), layout_(spec), shared_blob_(layout_.SharedBytes()) {
    for (int i = 0; i < spec.LayerCount() * spec.moe.experts; ++i)
      experts_.emplace_back(layout_.ExpertBytes());
    shared_ = BindShared(*spec_, layout_, shared_blob_.data());
  }
  void Put(Role role, int layer, int expert, const void* source, DType type) {
    const TensorPlace& place = layout_.Place(role, layer);
    PackTensor(
        place, source, type,
        expert < 0 ? shared_blob_.data() : experts_[std::size_t(layer) * spec_->moe.experts + expert].data());
    std::vector<float>& plain = plain_[{static_cast<int>(role), layer, expert}];
    plain.resize(std::size_t(place.n) * place.k);
    ConvertToFloat(source, type, plain.size(), plain.data());
  }

  std::unique_ptr<core::ModelSpec> spec_;
  WeightLayout layout_;
  Blob shared_blob_;
  std::vector<Blob> experts_;
  SharedWeights shared_;
  std::map<std::tuple<int, int, int>, std::vector<float>> plain_;
};

inline TestModel TestModel::Load(const std::filesystem::path& directory) {
  const Json config = MustParse(MustRead(directory / "config.json"));
  const bool mixtral = config["model_type"] == "mixtral";
  core::ModelSpec spec;
  spec.vocab = config["vocab_size"];
  spec.hidden = config["hidden_size"];
  spec.max_positions = config["max_position_embeddings"];
  spec.rms_eps = config["rms_norm_eps"];
  spec.tied_head = config["tie_word_embeddings"];
  core::AttentionSpec& a = spec.attention;
  a.heads = config["num_attention_heads"];
  a.kv_heads = config["num_key_value_heads"];
  a.head_dim = config.value("head_dim", spec.hidden / a.heads);
  a.qk_norm = !mixtral;
  a.rope_theta = config["rope_theta"];
  a.scale = 1.0F / std::sqrt(static_cast<float>(a.head_dim));
  spec.moe.experts = config[mixtral ? "num_local_experts" : "num_experts"];
  spec.moe.top_k = config["num_experts_per_tok"];
  spec.moe.expert_width = config[mixtral ? "intermediate_size" : "moe_intermediate_size"];
  spec.moe.renormalize = mixtral || config["norm_topk_prob"].get<bool>();
  spec.layers.assign(config["num_hidden_layers"].get<std::size_t>(), core::LayerSpec{true, 0});

  TestModel model(spec);
  const std::string file = MustRead(directory / "model.safetensors");
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, file.data(), 8);
  const Json header = MustParse(std::string_view(file).substr(8, header_bytes));
  const auto put = [&](Role role, int layer, int expert, const std::string& name) {
    const Json& tensor = header.at(name);
    EM_CHECK(tensor["dtype"] == "BF16", "{}", name);
    model.Put(role, layer, expert,
              file.data() + 8 + header_bytes + tensor["data_offsets"][0].get<std::size_t>(), DType::kBf16);
  };
  put(Role::kEmbedding, -1, -1, "model.embed_tokens.weight");
  put(Role::kFinalNorm, -1, -1, "model.norm.weight");
  if (!spec.tied_head) put(Role::kLmHead, -1, -1, "lm_head.weight");
  for (int layer = 0; layer < spec.LayerCount(); ++layer) {
    const std::string prefix = fmt::format("model.layers.{}.", layer);
    put(Role::kAttentionNorm, layer, -1, prefix + "input_layernorm.weight");
    put(Role::kQ, layer, -1, prefix + "self_attn.q_proj.weight");
    put(Role::kK, layer, -1, prefix + "self_attn.k_proj.weight");
    put(Role::kV, layer, -1, prefix + "self_attn.v_proj.weight");
    put(Role::kO, layer, -1, prefix + "self_attn.o_proj.weight");
    if (a.qk_norm) {
      put(Role::kQNorm, layer, -1, prefix + "self_attn.q_norm.weight");
      put(Role::kKNorm, layer, -1, prefix + "self_attn.k_norm.weight");
    }
    put(Role::kMlpNorm, layer, -1, prefix + "post_attention_layernorm.weight");
    const std::string moe = prefix + (mixtral ? "block_sparse_moe." : "mlp.");
    put(Role::kRouter, layer, -1, moe + "gate.weight");
    for (int expert = 0; expert < spec.moe.experts; ++expert) {
      const std::string name = fmt::format("{}experts.{}.", moe, expert);
      put(Role::kExpertGate, layer, expert, name + (mixtral ? "w1.weight" : "gate_proj.weight"));
      put(Role::kExpertUp, layer, expert, name + (mixtral ? "w3.weight" : "up_proj.weight"));
      put(Role::kExpertDown, layer, expert, name + (mixtral ? "w2.weight" : "down_proj.weight"));
    }
  }
  return model;
}

inline TestModel TestModel::Random(const core::ModelSpec& spec, std::uint64_t seed) {
  TestModel model(spec);
  Rng rng(seed);
  const auto put = [&](Role role, int layer, int expert = -1) {
    const TensorPlace& place = model.layout_.Place(role, layer);
    const bool norm = role == Role::kFinalNorm || role == Role::kAttentionNorm || role == Role::kQNorm ||
                      role == Role::kKNorm || role == Role::kMlpNorm;
    const bool embedding = role == Role::kEmbedding;
    const double size = norm                    ? 0.3
                        : embedding             ? 1.0
                        : role == Role::kRouter ? 3.0
                                                : 1.7 / std::sqrt(static_cast<double>(place.k));
    std::vector<Bf16> values(std::size_t(place.n) * place.k);
    for (Bf16& value : values)
      value = ToBf16(static_cast<float>((norm ? 1.0 : 0.0) + size * (2 * rng.Uniform() - 1)));
    model.Put(role, layer, expert, values.data(), DType::kBf16);
  };
  put(Role::kEmbedding, -1);
  put(Role::kFinalNorm, -1);
  if (!spec.tied_head) put(Role::kLmHead, -1);
  for (int layer = 0; layer < spec.LayerCount(); ++layer) {
    for (const Role role : {Role::kAttentionNorm, Role::kQ, Role::kK, Role::kV, Role::kO, Role::kMlpNorm})
      put(role, layer);
    if (spec.attention.qk_norm)
      for (const Role role : {Role::kQNorm, Role::kKNorm}) put(role, layer);
    if (spec.attention.qkv_bias)
      for (const Role role : {Role::kQBias, Role::kKBias, Role::kVBias}) put(role, layer);
    if (spec.layers[layer].moe) {
      put(Role::kRouter, layer);
      for (int expert = 0; expert < spec.moe.experts; ++expert)
        for (const Role role : {Role::kExpertGate, Role::kExpertUp, Role::kExpertDown})
          put(role, layer, expert);
    } else {
      for (const Role role : {Role::kDenseGate, Role::kDenseUp, Role::kDenseDown}) put(role, layer);
    }
  }
  return model;
}

// A device of its own: KV blocks (full of NaN until written), sequences, one Forward.
class Driver {
 public:
  struct Part {
    int sequence = 0;
    std::vector<TokenId> tokens;  // the next ones of the sequence
  };

  // `devices`: into how many calls of RunExperts the experts of a layer are spread.
  Driver(const TestModel& model, const Kernels& kernels, ThreadPool& threads, int max_rows, int blocks,
         int devices = 1)
      : model_(model),
        kernels_(kernels),
        threads_(threads),
        forward_(model.Spec(), kernels, threads, max_rows),
        layout_(KvLayout::Of(model.Spec(), kernels.kv_element_bytes)),
        devices_(devices) {
    for (int i = 0; i < blocks; ++i) {
      blocks_.emplace_back(layout_.BlockBytes()).Fill(0xff);
      chunks_.push_back(blocks_.back().data());
    }
  }

  // One step; logits [rows, vocab] of all rows in the order of `parts`.
  std::vector<float> Step(const std::vector<Part>& parts) {
    const core::ModelSpec& spec = model_.Spec();
    std::vector<TokenId> tokens;
    std::vector<Chunk> chunks;
    for (const Part& part : parts) {
      Sequence& sequence = sequences_[part.sequence];
      const int end = sequence.length + static_cast<int>(part.tokens.size());
      while (static_cast<int>(sequence.blocks.size()) * kBlockTokens < end)
        sequence.blocks.push_back(next_block_++);
      EM_CHECK(next_block_ <= blocks_.size());
      chunks.push_back(
          {static_cast<int>(tokens.size()), static_cast<int>(part.tokens.size()), sequence.length, {}});
      sequence.length = end;
      tokens.insert(tokens.end(), part.tokens.begin(), part.tokens.end());
    }
    for (std::size_t i = 0; i < parts.size(); ++i)
      chunks[i].block_table = sequences_[parts[i].sequence].blocks;
    const KvCache kv{layout_, chunks_.data(), 1};
    forward_.Begin(model_.Shared(), tokens, chunks);
    for (int layer = 0; layer < spec.LayerCount(); ++layer) {
      forward_.Attention(layer, model_.Shared(), kv);
      if (spec.layers[layer].moe) {
        Experts(layer, tokens.size());
      } else {
        forward_.DenseMlp(layer, model_.Shared());
      }
    }
    std::vector<int> all(tokens.size());
    for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int>(i);
    std::vector<float> logits(tokens.size() * spec.vocab);
    forward_.Logits(model_.Shared(), all, logits.data());
    return logits;
  }

 private:
  struct Sequence {
    int length = 0;
    std::vector<std::uint32_t> blocks;
  };

  void Experts(int layer, std::size_t rows) {
    const core::ModelSpec& spec = model_.Spec();
    const std::size_t row_bytes = std::size_t(spec.hidden) * kernels_.activation_bytes;
    std::vector<std::byte> activations(rows * row_bytes);
    std::vector<std::int32_t> chosen(rows * spec.moe.top_k);
    std::vector<float> mix(chosen.size()), outputs(chosen.size() * spec.hidden);
    forward_.Route(layer, model_.Shared(), activations.data(), chosen.data(), mix.data());
    std::vector<std::vector<ExpertRow>> visits(spec.moe.experts);
    for (std::size_t i = 0; i < chosen.size(); ++i)
      visits[chosen[i]].push_back(
          {activations.data() + i / spec.moe.top_k * row_bytes, &outputs[i * spec.hidden]});
    for (int device = 0; device < devices_; ++device) {
      std::vector<ExpertBatch> batches;
      for (int expert = device; expert < spec.moe.experts; expert += devices_)
        if (!visits[expert].empty()) batches.push_back({model_.Expert(layer, expert), visits[expert]});
      if (!batches.empty()) RunExperts(spec, kernels_, threads_, batches, scratch_);
    }
    forward_.Combine(outputs.data(), mix.data());
  }

  const TestModel& model_;
  const Kernels& kernels_;
  ThreadPool& threads_;
  Forward forward_;
  KvLayout layout_;
  int devices_;
  std::vector<Blob> blocks_;
  std::vector<std::byte*> chunks_;
  std::uint32_t next_block_ = 0;
  std::map<int, Sequence> sequences_;
  std::vector<std::byte> scratch_;
};

}  // namespace elasticmoe::compute::testing
