#include "model/inspect.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <system_error>

#include "base/file.h"
#include "model/chat_template.h"
#include "model/gguf/gguf.h"
#include "model/tokenizer.h"

namespace elasticmoe::model {
namespace {

namespace fs = std::filesystem;

constexpr std::uint64_t kBf16Bytes = 2;
constexpr std::size_t kShownUnused = 4;

bool HasTokenizer(const fs::path& model) {
  std::error_code code;
  if (!IsGgufPath(model)) return fs::exists(model / "tokenizer.json", code);
  const auto gguf = OpenGguf(model);
  return gguf && gguf->Has("tokenizer.ggml.tokens");
}

bool HasChatTemplate(const fs::path& directory) {
  std::error_code code;
  if (IsGgufPath(directory)) {
    const auto gguf = OpenGguf(directory);
    return gguf && gguf->Has("tokenizer.chat_template");
  }
  if (fs::exists(directory / "chat_template.jinja", code) ||
      fs::exists(directory / "chat_template.json", code))
    return true;
  const auto text = ReadFile(directory / "tokenizer_config.json");
  const auto json = text ? ParseJson(*text) : tl::unexpected<Error>(text.error());
  if (!json || !json->is_object()) return false;
  const auto it = json->find("chat_template");
  return it != json->end() && !it->is_null();
}

// A number with three digits and its unit: 1.41 B, 259 M.
std::string Short(double value, double base, std::initializer_list<const char*> units) {
  auto unit = units.begin();
  while (value >= base * 0.9995 && unit + 1 != units.end()) {
    value /= base;
    ++unit;
  }
  if (unit == units.begin()) return fmt::format("{:.0f}{}", value, *unit);
  return fmt::format("{:.{}f}{}", value, value < 9.995 ? 2 : value < 99.95 ? 1 : 0, *unit);
}

std::string Count(const Json& value) {
  return Short(value.get<double>(), 1000, {"", " K", " M", " B", " T"});
}
std::string Bytes(const Json& value) {
  return Short(value.get<double>(), 1024, {" B", " KiB", " MiB", " GiB", " TiB"});
}

std::string Joined(const Json& list, std::size_t limit = 1000) {
  std::string text;
  for (std::size_t i = 0; i < list.size() && i < limit; ++i) {
    if (i > 0) text += ", ";
    text += list[i].is_string() ? list[i].get<std::string>() : list[i].dump();
  }
  if (list.size() > limit) text += fmt::format(" and {} more", list.size() - limit);
  return text.empty() ? "none" : text;
}

}  // namespace

ModelFigures FiguresOf(const core::ModelSpec& spec, const std::vector<TensorName>& tensors) {
  ModelFigures figures;
  int first_layer = -1;  // with experts
  for (const TensorName& tensor : tensors) {
    std::uint64_t count = 1;
    for (const std::int64_t n : tensor.shape) count *= static_cast<std::uint64_t>(n);
    figures.parameters += count;
    if (tensor.expert >= spec.moe.top_k) continue;  // as many as any token visits, and all experts look alike
    figures.active_parameters += count;
    if (tensor.expert == 0 && first_layer < 0) first_layer = tensor.layer;
    if (tensor.expert == 0 && tensor.layer == first_layer) figures.expert_parameters += count;
  }
  const core::AttentionSpec& a = spec.attention;
  const int values = a.Latent() ? a.LatentDim() : 2 * a.kv_heads * a.head_dim;
  figures.kv_values_per_token = std::uint64_t{1} * spec.LayerCount() * values;
  return figures;
}

Json InspectModel(const Checkpoint& checkpoint) {
  const core::ModelSpec& spec = checkpoint.spec;
  const auto moe_layers =
      static_cast<std::uint64_t>(std::ranges::count_if(spec.layers, &core::LayerSpec::moe));
  const ModelFigures figures = FiguresOf(spec, (*FindFamily(spec.family))->Tensors(spec));
  std::set<std::string_view> types;
  for (const TensorSource& tensor : checkpoint.tensors) types.insert(NameOf(tensor.encoding));
  Json files = Json::array();
  for (std::size_t i = 0; i < checkpoint.files.size(); ++i)
    files.push_back({{"name", checkpoint.files[i].filename().string()}, {"bytes", checkpoint.file_bytes[i]}});

  Json report;
  report["directory"] = checkpoint.directory.string();
  report["family"] = spec.family;
  report["parameters"] = checkpoint.parameters;
  report["active_parameters"] = figures.active_parameters;
  report["layers"] = spec.LayerCount();
  report["moe_layers"] = moe_layers;
  report["hidden"] = spec.hidden;
  report["heads"] = spec.attention.heads;
  report["kv_heads"] = spec.attention.kv_heads;
  report["latent"] = spec.attention.Latent() ? spec.attention.LatentDim() : 0;
  report["head_dim"] = spec.attention.head_dim;
  report["experts"] = spec.moe.experts;
  report["top_k"] = spec.moe.top_k;
  report["expert_width"] = spec.moe.expert_width;
  report["shared_expert_width"] = spec.moe.shared_width;
  report["vocab"] = spec.vocab;
  report["context"] = spec.max_positions;
  report["tied_head"] = spec.tied_head;
  report["eos_ids"] = spec.eos_ids;
  report["dtypes"] = types;
  report["bytes_on_disk"] =
      std::accumulate(checkpoint.file_bytes.begin(), checkpoint.file_bytes.end(), std::uint64_t{0});
  report["bytes_per_expert"] = figures.expert_parameters * kBf16Bytes;
  report["kv_bytes_per_token"] = figures.kv_values_per_token * kBf16Bytes;
  report["files"] = std::move(files);
  report["tensors"] = checkpoint.tensors.size();
  report["unused_tensors"] = checkpoint.unused;
  report["has_tokenizer"] = HasTokenizer(checkpoint.directory);
  report["has_chat_template"] = HasChatTemplate(checkpoint.directory);
  return report;
}

Status CheckServable(const fs::path& model) {
  std::vector<Error> errors;
  if (auto checkpoint = Checkpoint::Open(model); !checkpoint) errors.push_back(std::move(checkpoint.error()));
  // Where there is no model to read, a tokenizer is beside the point.
  if (!errors.empty() && errors[0].code != ErrorCode::kUnimplemented &&
      errors[0].code != ErrorCode::kInvalidArgument)
    return tl::unexpected<Error>(std::move(errors[0]));
  auto tokenizer = Tokenizer::Open(model);
  if (!tokenizer) errors.push_back(std::move(tokenizer.error()));
  if (tokenizer && *tokenizer && !(*tokenizer)->ChatTemplateSource().empty())
    if (auto parsed = ChatTemplate::Parse((*tokenizer)->ChatTemplateSource()); !parsed)
      errors.push_back({parsed.error().code, fmt::format("reading the chat template of {}: {}",
                                                         model.string(), parsed.error().message)});
  if (errors.empty()) return {};
  std::vector<std::string> messages;
  for (Error& error : errors) messages.push_back(std::move(error.message));
  return tl::unexpected<Error>(Error{errors[0].code, fmt::format("{}", fmt::join(messages, "; also: "))});
}

std::string DescribeModel(const Json& report) {
  std::string text = report["directory"].get<std::string>() + "\n";
  const auto line = [&text](std::string_view name, const std::string& value) {
    text += fmt::format("  {:<12}{}\n", name, value);
  };
  const auto number = [&report](const char* key) { return report[key].get<std::int64_t>(); };
  line("family", report["family"].get<std::string>());
  line("parameters", fmt::format("{}, {} active per token", Count(report["parameters"]),
                                 Count(report["active_parameters"])));
  line("layers", fmt::format("{}, of which {} with experts", number("layers"), number("moe_layers")));
  if (number("experts") > 0)
    line("experts", fmt::format("{} a layer, top {}, {} each in bf16", number("experts"), number("top_k"),
                                Bytes(report["bytes_per_expert"])));
  const std::string cached = number("latent") > 0 ? fmt::format("one latent of {}", number("latent"))
                                                  : fmt::format("{} KV heads", number("kv_heads"));
  line("attention", fmt::format("{} heads, {}, {} wide; KV cache {} a token in bf16", number("heads"), cached,
                                number("head_dim"), Bytes(report["kv_bytes_per_token"])));
  std::string widths;
  if (number("experts") > 0) widths = fmt::format(", expert width {}", number("expert_width"));
  if (number("shared_expert_width") > 0)
    widths += fmt::format(", shared expert {}", number("shared_expert_width"));
  line("hidden", fmt::format("{}{}", number("hidden"), widths));
  line("vocabulary",
       fmt::format("{} ids, {} head, end of text: {}", number("vocab"),
                   report["tied_head"].get<bool>() ? "tied" : "separate", Joined(report["eos_ids"])));
  line("context", fmt::format("{} tokens", number("context")));
  line("weights", fmt::format("{} of {} in {} file{}, {} tensors", Bytes(report["bytes_on_disk"]),
                              Joined(report["dtypes"]), report["files"].size(),
                              report["files"].size() == 1 ? "" : "s", number("tensors")));
  line("tokenizer", report["has_tokenizer"].get<bool>() ? "yes" : "none: serves token ids only");
  line("chat", report["has_chat_template"].get<bool>() ? "has a template" : "no template");
  if (!report["unused_tensors"].empty()) line("not used", Joined(report["unused_tensors"], kShownUnused));
  return text;
}

}  // namespace elasticmoe::model
