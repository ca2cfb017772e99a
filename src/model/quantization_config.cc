// What "quantization_config" says. How llm-compressor, AutoGPTQ, GPTQModel, AutoAWQ, vLLM and transformers
// write it.
#include <fmt/format.h>

#include <algorithm>

#include "model/config_reader.h"
#include "model/families/decoder.h"
#include "model/quantization.h"

namespace elasticmoe::model {
namespace {

constexpr char kMethods[] =
    "\"fp8\", \"compressed-tensors\", \"gptq\", \"awq\", \"mxfp4\"; use the bf16 checkpoint or a .gguf";

Status ReadGroup(const ConfigReader& reader, Quantization& out) {
  EM_ASSIGN_OR_RETURN(const int group, reader.Int("group_size", -1, kMaxWidth));
  if (group == 0)
    return Fail(ErrorCode::kInvalidArgument, "group_size=0 (expected -1, or an integer from 1 to {})",
                kMaxWidth);
  out.group = std::max(group, 0);
  return {};
}

Status ReadGptq(const ConfigReader& reader, Quantization& out) {
  out.method = Quantization::Method::kGptq;
  const Json* bits = reader.Find("bits");
  if (bits == nullptr || (*bits != 4 && *bits != 8))
    EM_RETURN_IF_ERROR(
        reader.Unsupported("bits={} (supported: 4, 8)", bits != nullptr ? Shown(*bits) : "null"));
  out.bits = bits != nullptr && *bits == 8 ? 8 : 4;
  // "gptq" is the form whose zeros are stored less one.
  const Json* format = reader.Find("checkpoint_format");
  if (format == nullptr) format = reader.Find("format");
  out.stored_less_one = format == nullptr || *format != "gptq_v2";
  if (format != nullptr && *format != "gptq" && *format != "gptq_v2")
    EM_RETURN_IF_ERROR(
        reader.Unsupported("checkpoint_format={} (supported: \"gptq\", \"gptq_v2\")", Shown(*format)));
  EM_RETURN_IF_ERROR(reader.Only("pack_dtype", "int32"));
  EM_RETURN_IF_ERROR(reader.Only("is_marlin_format", false));
  // Modules that are left out ("-:") are simply not quantised; others with values of their own are not read.
  const Json* dynamic = reader.Find("dynamic");
  if (dynamic != nullptr && dynamic->is_object())
    for (const auto& [name, values] : dynamic->items())
      if (!name.starts_with("-:") && values.is_object() && !values.empty())
        EM_RETURN_IF_ERROR(reader.Unsupported("dynamic holds {}={} (supported: modules left out, \"-:...\")",
                                              Shown(Json(name)), Shown(values)));
  return ReadGroup(reader, out);
}

Status ReadAwq(const ConfigReader& reader, Quantization& out) {
  out.method = Quantization::Method::kAwq;
  out.bits = 4;
  EM_RETURN_IF_ERROR(reader.Only("bits", 4));
  EM_RETURN_IF_ERROR(reader.Only("zero_point", true));
  for (const char* key : {"version", "format"}) {
    const Json* version = reader.Find(key);
    if (version != nullptr && *version != "gemm" && *version != "GEMM")
      EM_RETURN_IF_ERROR(reader.Unsupported("{}={} (supported: \"gemm\")", key, Shown(*version)));
  }
  return ReadGroup(reader, out);
}

Status ReadFp8(const ConfigReader& reader, Quantization& out) {
  out.method = Quantization::Method::kFp8;
  EM_RETURN_IF_ERROR(reader.Only("fmt", "e4m3"));
  if (reader.Find("weight_block_size") == nullptr) {
    out.method = Quantization::Method::kFp8Whole;
    return {};
  }
  EM_ASSIGN_OR_RETURN(const auto block, reader.Ints("weight_block_size", 1, 1 << 16));
  if (block.size() != 2)
    return reader.Unsupported(
        "weight_block_size={} (supported: rows and columns of a block, as in [128, 128])",
        Shown(*reader.Find("weight_block_size")));
  out.block_rows = block[0];
  out.block_columns = block[1];
  return {};
}

bool IsOneOf(const Json* value, std::initializer_list<const char*> texts) {
  return value != nullptr && std::ranges::any_of(texts, [&](const char* text) { return *value == text; });
}

// The form of one group's weights: of numbers that fit together with those of the other groups.
Status ReadCompressedWeights(const ConfigReader& of, const Json* format, Quantization& out) {
  const Json *bits = of.Find("num_bits"), *type = of.Find("type"), *strategy = of.Find("strategy");
  const auto refuse = [&] {
    return of.Unsupported(
        "num_bits={}, type={}, strategy={} with format={} (supported: int of 4 or 8 bits, strategy tensor, "
        "channel or group; float of 8 bits, strategy tensor, channel or block)",
        bits != nullptr ? Shown(*bits) : "null", type != nullptr ? Shown(*type) : "null",
        strategy != nullptr ? Shown(*strategy) : "null", format != nullptr ? Shown(*format) : "null");
  };
  if (bits == nullptr || (*bits != 4 && *bits != 8)) return refuse();
  if (IsOneOf(type, {"float"})) {
    if (*bits != 8 || !IsOneOf(strategy, {"tensor", "channel", "block"})) return refuse();
    if (*strategy != "block") return {};
    EM_ASSIGN_OR_RETURN(const auto block, of.Ints("block_structure", 1, 1 << 16));
    if (block.size() != 2 ||
        (out.block_rows > 0 && (out.block_rows != block[0] || out.block_columns != block[1])))
      return refuse();
    out.block_rows = block[0];
    out.block_columns = block[1];
    return {};
  }
  if (!IsOneOf(type, {"int"}) || !IsOneOf(strategy, {"tensor", "channel", "group"})) return refuse();
  const bool packed = format == nullptr || *format == "pack-quantized" || *format == "mixed-precision";
  if (!packed && *bits != 8) return refuse();
  if (!packed) return {};
  if (out.bits != 0 && *bits != out.bits)
    return of.Unsupported("num_bits={} (supported: one number for all that is packed, {} elsewhere)",
                          Shown(*bits), out.bits);
  out.bits = bits->get<int>();
  return {};
}

// llm-compressor's: groups of modules with the form of their weights. What activations are rounded to there
// does not count: they stay in bf16 here.
Status ReadCompressed(const ConfigReader& reader, Quantization& out) {
  out.method = Quantization::Method::kCompressed;
  out.block_rows = out.block_columns = 0;
  const auto check_format = [&](const Json* format) -> Status {
    if (format == nullptr || IsOneOf(format, {"pack-quantized", "int-quantized", "float-quantized",
                                              "naive-quantized", "mixed-precision"}))
      return {};
    return reader.Unsupported(
        "format={} (supported: \"pack-quantized\", \"int-quantized\", \"float-quantized\", "
        "\"naive-quantized\")",
        Shown(*format));
  };
  const Json* whole = reader.Find("format");
  EM_RETURN_IF_ERROR(check_format(whole));
  const Json* sparsity = reader.Find("sparsity_config");
  if (sparsity != nullptr && sparsity->is_object() && !sparsity->empty())
    EM_RETURN_IF_ERROR(reader.Inside(*sparsity, "sparsity_config").Only("format", "dense"));
  const Json* transform = reader.Find("transform_config");
  if (transform != nullptr && transform->is_object() && !transform->empty() &&
      reader.Inside(*transform, "transform_config").Find("config_groups") != nullptr &&
      !(*transform)["config_groups"].empty())
    EM_RETURN_IF_ERROR(reader.Unsupported("transform_config={} (supported: none)", Shown(*transform)));
  const Json* groups = reader.Find("config_groups");
  if (groups == nullptr || !groups->is_object() || groups->empty())
    return reader.Unsupported("config_groups={} (supported: an object of groups with \"weights\")",
                              groups != nullptr ? Shown(*groups) : "null");
  for (const auto& [name, group] : groups->items()) {
    const Json* weights = group.is_object() ? ConfigReader(group).Find("weights") : nullptr;
    if (weights == nullptr || !weights->is_object()) {
      EM_RETURN_IF_ERROR(reader.Unsupported("config_groups.{}={} (supported: an object with \"weights\")",
                                            name, Shown(group)));
      continue;
    }
    const Json* format = ConfigReader(group).Find("format");
    EM_RETURN_IF_ERROR(check_format(format));
    EM_RETURN_IF_ERROR(
        ReadCompressedWeights(reader.Inside(*weights, fmt::format("config_groups.{}.weights", name)),
                              format != nullptr ? format : whole, out));
  }
  return {};
}

Status Read(const ConfigReader& reader, Quantization& out) {
  const Json* method = reader.Find("quant_method");
  if (IsOneOf(method, {"fp8"})) return ReadFp8(reader, out);
  if (IsOneOf(method, {"gptq"})) return ReadGptq(reader, out);
  if (IsOneOf(method, {"awq"})) return ReadAwq(reader, out);
  if (IsOneOf(method, {"compressed-tensors"})) return ReadCompressed(reader, out);
  if (!IsOneOf(method, {"mxfp4"}))
    return reader.Unsupported("quant_method={} (supported: {})", method != nullptr ? Shown(*method) : "null",
                              kMethods);
  out.method = Quantization::Method::kMxfp4;
  return {};
}

}  // namespace

Expected<Quantization> ReadQuantization(const Json& config) {
  EM_RETURN_IF_ERROR(IsObject(config));
  Quantization out;
  const Json* json = ConfigReader(config).Find("quantization_config");
  if (json == nullptr) return out;
  constexpr char kKey[] = "quantization_config";
  if (auto status = IsObject(*json); !status) return Within(kKey, std::move(status.error()));
  std::vector<std::string> unsupported;
  Status status = Read(ConfigReader(*json, &unsupported), out);
  if (!unsupported.empty()) {
    if (!status) unsupported.push_back(std::move(status.error().message));
    return Fail(ErrorCode::kUnimplemented, "{}: {}", kKey, fmt::join(unsupported, "; also: "));
  }
  if (!status) return Within(kKey, std::move(status.error()));
  return out;
}

}  // namespace elasticmoe::model
