// Model families: an adapter turns config.json into a ModelSpec and says what its checkpoint tensors are
// called. A new family is one file in families/ and one line in the registry. Pure.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/json.h"
#include "core/spec.h"

namespace elasticmoe::model {

// What a tensor is for. `layer` is -1 outside of layers, `expert` -1 outside of experts.
enum class TensorRole {
  kEmbedding,
  kFinalNorm,
  kLmHead,
  kAttentionNorm,
  kQ,
  kK,
  kV,
  kQBias,
  kKBias,
  kVBias,
  kQNorm,
  kKNorm,
  kO,
  kOBias,
  kSinks,
  kQDown,      // MLA: hidden -> q_lora_rank
  kQDownNorm,  // [q_lora_rank]
  kQUp,        // q_lora_rank -> q of all heads
  kKvDown,     // hidden -> latent and rotated key
  kKvDownNorm,
  kKvUp,     // latent -> for each head its plain k, then its v
  kKeyUp,    // kKvUp in two (GGUF): for each head its plain k, transposed [latent, plain k],
  kValueUp,  // and its v
  kMlpNorm,
  kRouter,
  kRouterBias,
  kRouterCorrection,
  kSharedGate,
  kSharedUp,
  kSharedDown,
  kSharedMix,  // [1, hidden]: gate of the shared expert's output
  kDenseGate,
  kDenseUp,
  kDenseDown,
  kSharedGateBias,
  kSharedUpBias,
  kSharedDownBias,
  kDenseGateBias,
  kDenseUpBias,
  kDenseDownBias,
  kExpertGate,
  kExpertUp,
  kExpertDown,
  kExpertGateBias,
  kExpertUpBias,
  kExpertDownBias,
};

constexpr bool OfExpert(TensorRole role) {
  return role >= TensorRole::kExpertGate;
}

struct TensorName {
  TensorRole role;
  int layer = -1;
  int expert = -1;
  std::string name;                 // in the checkpoint
  std::vector<std::int64_t> shape;  // [outputs, inputs] or [n]
};

class ConfigReader;
struct TensorIndex;

class Family {
 public:
  virtual ~Family() = default;
  virtual std::string_view ModelType() const = 0;  // config.json's model_type

  // What a key that config.json leaves out means to the family's own code, where that is not what the key's
  // absence means to Read. A key that is there and null means nothing.
  virtual Json Defaults() const { return Json::object(); }

  // Errors name the key, what was found and what is supported; kUnimplemented names all that is not
  // supported.
  Expected<core::ModelSpec> Spec(const Json& config) const;

  // Every tensor the forward pass needs, each once.
  virtual std::vector<TensorName> Tensors(const core::ModelSpec& spec) const = 0;

  // Takes apart what its checkpoints hold as one tensor (fused_tensors.h): what remains has the names of
  // Tensors.
  virtual Status Unfuse(const core::ModelSpec& spec, TensorIndex& index) const;

  // The config.json that Spec would read back as `spec` (for made models).
  virtual Json Config(const core::ModelSpec& spec) const = 0;

 protected:
  // Fills `spec`, whose family is set. kInvalidArgument where a value is wrong.
  virtual Status Read(const ConfigReader& config, core::ModelSpec& spec) const = 0;
};

// kUnimplemented, naming the families there are, if config's model_type is none of them.
Expected<const Family*> FamilyOf(const Json& config);
Expected<const Family*> FindFamily(std::string_view model_type);

}  // namespace elasticmoe::model
