// For the tests of this module: models in private memory (read from a small checkpoint or made from a seed)
// and a driver that takes sequences through Forward the way a worker does, experts included.
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
#include "model/checkpoint.h"

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
  const auto checkpoint = model::Checkpoint::Open(directory);
  EM_CHECK(checkpoint.has_value(), "{}", checkpoint.error().message);
  std::vector<std::string> files;
  for (const auto& file : checkpoint->files) files.push_back(MustRead(file));
  TestModel model(checkpoint->spec);
  model::RowReader reader([&](int file, std::uint64_t offset, std::byte* out, std::uint64_t bytes) -> Status {
    std::memcpy(out, files[file].data() + offset, bytes);
    return {};
  });
  for (const model::TensorSource& source : checkpoint->tensors) {
    const TensorPlace& place = model.layout_.Place(source.tensor.role, source.tensor.layer);
    const auto rows = reader.Read(source, place.k, 0, place.n);
    EM_CHECK(rows.has_value());
    model.Put(source.tensor.role, source.tensor.layer, source.tensor.expert, rows->data, rows->type);
  }
  return model;
}

inline TestModel TestModel::Random(const core::ModelSpec& spec, std::uint64_t seed) {
  TestModel model(spec);
  Rng rng(seed);
  const auto put = [&](Role role, int layer, int expert = -1) {
    const TensorPlace& place = model.layout_.Place(role, layer);
    const bool norm = role == Role::kFinalNorm || role == Role::kAttentionNorm || role == Role::kQNorm ||
                      role == Role::kKNorm || role == Role::kMlpNorm || role == Role::kQDownNorm ||
                      role == Role::kKvDownNorm;
    const bool embedding = role == Role::kEmbedding;
    const bool threshold = spec.moe.top_any && role == Role::kRouterCorrection;  // of a cosine
    const double size = norm || threshold       ? 0.3
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
    const core::AttentionSpec& a = spec.attention;
    const auto some = [&](bool has, std::initializer_list<Role> roles) {
      if (!has) return;
      for (const Role role : roles) put(role, layer);
    };
    some(true, {Role::kAttentionNorm, Role::kO, Role::kMlpNorm});
    some(!a.Latent(), {Role::kQ, Role::kK, Role::kV});
    some(a.Latent() && a.q_lora_rank == 0, {Role::kQ});
    some(a.q_lora_rank > 0, {Role::kQDown, Role::kQDownNorm, Role::kQUp});
    some(a.Latent(), {Role::kKvDown, Role::kKvDownNorm, Role::kKvUp});
    some(a.qk_norm || a.qk_norm_whole, {Role::kQNorm, Role::kKNorm});
    some(a.qkv_bias && !a.Latent(), {Role::kQBias, Role::kKBias, Role::kVBias});
    some(a.o_bias, {Role::kOBias});
    some(a.sinks, {Role::kSinks});
    if (spec.layers[layer].moe) {
      put(Role::kRouter, layer);
      some(spec.moe.router_bias, {Role::kRouterBias});
      some(spec.moe.correction, {Role::kRouterCorrection});
      some(spec.moe.shared_width > 0, {Role::kSharedGate, Role::kSharedUp, Role::kSharedDown});
      some(spec.moe.shared_width > 0 && spec.dense_bias,
           {Role::kSharedGateBias, Role::kSharedUpBias, Role::kSharedDownBias});
      some(spec.moe.shared_gate, {Role::kSharedMix});
      for (int expert = 0; expert < spec.moe.experts; ++expert)
        for (const Role role : {Role::kExpertGate, Role::kExpertUp, Role::kExpertDown, Role::kExpertGateBias,
                                Role::kExpertUpBias, Role::kExpertDownBias})
          if (role <= Role::kExpertDown || spec.moe.expert_bias) put(role, layer, expert);
    } else {
      some(true, {Role::kDenseGate, Role::kDenseUp, Role::kDenseDown});
      some(spec.dense_bias, {Role::kDenseGateBias, Role::kDenseUpBias, Role::kDenseDownBias});
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

  // The experts that the rows of the last step chose, by layer: [rows, top_k], best first.
  const std::map<int, std::vector<std::int32_t>>& Routing() const { return routing_; }

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
    routing_[layer] = chosen;
    std::vector<std::vector<ExpertRow>> visits(spec.moe.experts);
    for (std::size_t i = 0; i < chosen.size(); ++i)
      if (chosen[i] >= 0)
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
  std::map<int, std::vector<std::int32_t>> routing_;
  std::vector<std::byte> scratch_;
};

}  // namespace elasticmoe::compute::testing
