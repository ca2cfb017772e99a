#include "model/family.h"

#include <array>

#include "model/config_reader.h"
#include "model/families/bailing_moe.h"
#include "model/families/deepseek.h"
#include "model/families/dense.h"
#include "model/families/ernie4_5_moe.h"
#include "model/families/glm4_moe.h"
#include "model/families/gpt_oss.h"
#include "model/families/mixtral.h"
#include "model/families/olmoe.h"
#include "model/families/qwen2_moe.h"
#include "model/families/qwen3_moe.h"
#include "model/fused_tensors.h"

namespace elasticmoe::model {
namespace {

// The registry: one line a family.
const auto& Families() {
  static const std::array families = {&Qwen3Moe(),   &Mixtral(), &Qwen2Moe(), &Olmoe(),      &DeepseekV2(),
                                      &DeepseekV3(), &Glm4Moe(), &GptOss(),   &BailingMoe(), &BailingMoeV2(),
                                      &Ernie45Moe(), &Qwen3(),   &Qwen2(),    &Llama(),      &Mistral()};
  return families;
}

}  // namespace

Expected<core::ModelSpec> Family::Spec(const Json& json) const {
  EM_RETURN_IF_ERROR(IsObject(json));
  std::vector<std::string> messages;
  core::ModelSpec spec;
  spec.family = ModelType();
  Json config = Defaults();
  config.update(json);
  Status status = Read(ConfigReader(config, &messages), spec);
  if (messages.empty() && status) return spec;
  if (messages.empty()) return tl::unexpected<Error>(std::move(status.error()));
  if (!status) messages.push_back(std::move(status.error().message));
  return Fail(ErrorCode::kUnimplemented, "{}", fmt::join(messages, "; also: "));
}

Status Family::Unfuse(const core::ModelSpec&, TensorIndex& index) const {
  return SplitStackedExperts({}, index);
}

Expected<const Family*> FindFamily(std::string_view model_type) {
  std::vector<std::string_view> names;
  for (const Family* family : Families()) {
    if (family->ModelType() == model_type) return family;
    names.push_back(family->ModelType());
  }
  return Fail(ErrorCode::kUnimplemented, "model_type={} is no family served here (supported: {})",
              Shown(std::string(model_type)), fmt::join(names, ", "));
}

Expected<const Family*> FamilyOf(const Json& config) {
  EM_RETURN_IF_ERROR(IsObject(config));
  const Json* type = ConfigReader(config).Find("model_type");
  if (!type)
    return Fail(ErrorCode::kInvalidArgument, "model_type is missing; is this a model's config.json?");
  if (!type->is_string())
    return Fail(ErrorCode::kInvalidArgument, "model_type={} (expected a string)", Shown(*type));
  return FindFamily(std::string_view(type->get_ref<const std::string&>()));
}

}  // namespace elasticmoe::model
