#include "model/families/dense.h"

#include "model/families/decoder.h"

namespace elasticmoe::model {
namespace {

enum class Kind { kLlama, kMistral, kQwen2, kQwen3 };

class DenseFamily final : public Family {
 public:
  DenseFamily(Kind kind, const char* model_type, const char* architecture)
      : kind_(kind), model_type_(model_type), architecture_(architecture) {}

  std::string_view ModelType() const override { return model_type_; }

  Json Defaults() const override {
    return kind_ == Kind::kMistral ? Json{{"sliding_window", 4096}} : Json::object();
  }

  Status Read(const ConfigReader& config, core::ModelSpec& spec) const override {
    spec.attention.qk_norm = kind_ == Kind::kQwen3;
    EM_RETURN_IF_ERROR(ReadDecoder(config, spec));
    // What the originals' code has: attention_bias is read by Llama and Qwen3 alone, for all four
    // projections.
    if (kind_ == Kind::kMistral) spec.attention.qkv_bias = false;
    if (kind_ == Kind::kQwen2) spec.attention.qkv_bias = true;
    spec.attention.o_bias = kind_ != Kind::kQwen2 && spec.attention.qkv_bias;
    EM_RETURN_IF_ERROR(OnlyWholeRope(config));
    if (kind_ == Kind::kLlama) {
      EM_ASSIGN_OR_RETURN(spec.dense_bias, config.Bool("mlp_bias", false));
    } else {
      EM_RETURN_IF_ERROR(config.Only("mlp_bias", false));
    }
    EM_RETURN_IF_ERROR(ReadAttentionWindows(config, spec));
    EM_RETURN_IF_ERROR(ReadDenseWidth(config, spec));
    return {};
  }

  std::vector<TensorName> Tensors(const core::ModelSpec& spec) const override { return DecoderTensors(spec); }

  Json Config(const core::ModelSpec& spec) const override {
    Json config = DecoderConfig(spec);
    config["architectures"] = {architecture_};
    WriteWindows(spec, config);
    config["intermediate_size"] = spec.layers[0].dense_width;
    if (kind_ == Kind::kLlama) config["mlp_bias"] = spec.dense_bias;
    return config;
  }

 private:
  Status ReadAttentionWindows(const ConfigReader& config, core::ModelSpec& spec) const {
    if (kind_ == Kind::kLlama) return OnlyFullAttention(config);
    if (kind_ == Kind::kMistral) return ReadWindows(config, 0, spec);
    EM_ASSIGN_OR_RETURN(const bool windows, config.Bool("use_sliding_window", false));
    EM_ASSIGN_OR_RETURN(const int first, config.Int("max_window_layers", 0, INT32_MAX, 28));
    return windows ? ReadWindows(config, first, spec) : OnlyFullAttention(config);
  }

  Kind kind_;
  const char* model_type_;
  const char* architecture_;
};

}  // namespace

const Family& Llama() {
  static const DenseFamily family(Kind::kLlama, "llama", "LlamaForCausalLM");
  return family;
}

const Family& Mistral() {
  static const DenseFamily family(Kind::kMistral, "mistral", "MistralForCausalLM");
  return family;
}

const Family& Qwen2() {
  static const DenseFamily family(Kind::kQwen2, "qwen2", "Qwen2ForCausalLM");
  return family;
}

const Family& Qwen3() {
  static const DenseFamily family(Kind::kQwen3, "qwen3", "Qwen3ForCausalLM");
  return family;
}

}  // namespace elasticmoe::model
