#include "cli/status_view.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "cli/openai_answer.h"

namespace elasticmoe::cli {
namespace {

constexpr std::size_t kScreenWidth = 80, kLabelWidth = 10;

struct Column {
  std::string title;
  std::vector<std::string> cells;
};

std::string Table(const std::vector<Column>& columns) {
  std::string out;
  const std::size_t rows = columns.front().cells.size();
  for (std::size_t row = 0; row <= rows; ++row) {
    std::string line;
    for (const Column& column : columns) {
      std::size_t width = column.title.size();
      for (const std::string& cell : column.cells) width = std::max(width, cell.size());
      line += fmt::format("  {:>{}}", row == 0 ? column.title : column.cells[row - 1], width);
    }
    out += line + "\n";
  }
  return out;
}

std::string Cell(const Json& value, bool is_bytes) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_boolean()) return value.get<bool>() ? "yes" : "no";
  if (value.is_number() && is_bytes) return HumanBytes(value.get<double>());
  if (value.is_number_float()) return fmt::format("{:.2f}", value.get<double>());
  if (value.is_number() || value.is_array())
    return value.is_array() ? fmt::format("{}", value.size()) : DumpJson(value);
  return "-";
}

// "kv_used_bytes" -> "kv used"
std::string Title(std::string key) {
  if (key.ends_with("_bytes")) key.resize(key.size() - 6);
  std::ranges::replace(key, '_', ' ');
  return key;
}

// One column for each key of the devices, in the order in which they come up.
std::string Devices(const Json& devices) {
  std::vector<std::string> keys;
  for (const Json& device : devices)
    if (device.is_object())
      for (const auto& [key, value] : device.items())
        if (!value.is_object() && std::ranges::find(keys, key) == keys.end()) keys.push_back(key);
  if (keys.empty()) return "";
  std::vector<Column> columns;
  for (const std::string& key : keys) {
    Column column{Title(key), {}};
    for (const Json& device : devices) {
      const Json* value = FindField(device, key);
      column.cells.push_back(value == nullptr ? "-" : Cell(*value, key.ends_with("_bytes")));
    }
    columns.push_back(std::move(column));
  }
  return Table(columns);
}

std::string Cluster(const Json& cluster) {
  std::string out, line;
  const auto flush = [&] {
    if (!line.empty()) out += fmt::format("{:<10}{}\n", out.empty() ? "cluster" : "", line);
    line.clear();
  };
  for (const auto& [key, value] : cluster.items()) {
    if (!value.is_primitive() || value.is_null() || key == "operation") continue;
    const std::string item = fmt::format("{} {}", Title(key), Cell(value, key.ends_with("_bytes")));
    if (kLabelWidth + line.size() + 2 + item.size() > kScreenWidth) flush();
    line += (line.empty() ? "" : ", ") + item;
  }
  flush();
  const Json* operation = FindField(cluster, "operation");
  if (operation != nullptr && operation->is_object()) {
    const std::string state = StringField(*operation, "state", "?"), phase = StringField(*operation, "phase");
    out += fmt::format("resize    {}{}{} {:.0f} %\n", state, phase.empty() || phase == state ? "" : " ",
                       phase == state ? "" : phase, 100 * NumberField(*operation, "progress"));
  }
  const Json* devices = FindField(cluster, "devices");
  if (devices != nullptr && devices->is_array() && !devices->empty()) out += "\n" + Devices(*devices);
  return out;
}

// Breaks at blanks, so that it fits the screen beside the label.
std::string Wrapped(std::string_view label, const std::string& text) {
  std::string out;
  std::size_t at = 0;
  while (at < text.size()) {
    std::size_t end = std::min(text.size(), at + kScreenWidth - kLabelWidth);
    if (end < text.size())
      if (const std::size_t blank = text.rfind(' ', end); blank != text.npos && blank > at) end = blank;
    out += fmt::format("{:<{}}{}\n", out.empty() ? label : "", kLabelWidth, text.substr(at, end - at));
    at = text.find_first_not_of(' ', end);
  }
  return out;
}

std::string Autoscale(const Json& state) {
  const std::string policy = StringField(state, "policy");
  if (policy.empty() || policy == "off") return "";
  const auto whole = [&](const Json& json, const char* key) {
    return static_cast<int>(NumberField(json, key));
  };
  std::string line = fmt::format("{}, {} to {} devices, {:.1f} % of the last requests in the limits", policy,
                                 whole(state, "min_devices"), whole(state, "max_devices"),
                                 100 * NumberField(state, "attainment", 1));
  if (const std::string holder = StringField(state, "held_by"); !holder.empty())
    line += ", held by " + holder;
  if (const Json* observe = FindField(state, "observe"); observe != nullptr && *observe == true)
    line += ", observing only";
  std::string out = Wrapped("autoscale", line);
  if (const Json* last = FindField(state, "last"); last != nullptr && last->is_object())
    out += Wrapped("", fmt::format("{}: {}", StringField(*last, "code"), StringField(*last, "reason")));
  const Json* decisions = FindField(state, "decisions");
  if (decisions == nullptr || !decisions->is_array()) return out;
  for (auto at = decisions->rbegin(); at != decisions->rend(); ++at) {
    if (whole(*at, "from") == whole(*at, "to")) continue;
    out += Wrapped("", fmt::format("{:.0f} s ago {} -> {}: {}", NumberField(*at, "ago_s"), whole(*at, "from"),
                                   whole(*at, "to"), StringField(*at, "reason")));
    break;
  }
  return out;
}

// Devices from the metrics, of a server that has no /v1/cluster.
std::string DevicesOfMetrics(const std::vector<MetricSample>& metrics) {
  std::map<std::string, std::map<std::string, double>> devices;  // device -> metric -> value
  std::vector<std::string> names;
  for (const MetricSample& sample : metrics) {
    const auto device = sample.labels.find("device");
    if (device == sample.labels.end() || !sample.name.starts_with("elasticmoe_device_")) continue;
    const std::string name = sample.name.substr(18);
    devices[device->second][name] += sample.value;
    if (std::ranges::find(names, name) == names.end()) names.push_back(name);
  }
  if (devices.empty()) return "";
  std::vector<Column> columns = {{"device", {}}};
  for (const auto& [device, values] : devices) columns[0].cells.push_back(device);
  for (const std::string& name : names) {
    Column column{Title(name.ends_with("_total") ? name.substr(0, name.size() - 6) : name), {}};
    for (const auto& [device, values] : devices) {
      const auto value = values.find(name);
      column.cells.push_back(value == values.end() ? "-" : fmt::format("{}", value->second));
    }
    columns.push_back(std::move(column));
  }
  return "\n" + Table(columns);
}

std::string Load(const ServerState& state, const std::optional<ServerState>& before) {
  const auto sum = [&](std::string_view name) { return SumOf(state.metrics, name); };
  std::string out;
  const auto add = [&](std::optional<double> value, std::string_view what) {
    if (value) out += fmt::format("{}{:.0f} {}", out.empty() ? "" : ", ", *value, what);
  };
  add(sum("vllm:num_requests_running"), "running");
  add(sum("vllm:num_requests_waiting"), "waiting");
  add(sum("vllm:request_success_total"), "ended");
  add(sum("vllm:num_preemptions_total"), "preempted");
  if (!out.empty()) out = "requests  " + out + "\n";

  std::string tokens;
  const auto rate = [&](std::string_view name, std::string_view what) {
    const auto now = sum(name);
    if (!now) return;
    tokens += fmt::format("{}{:.0f} {}", tokens.empty() ? "" : ", ", *now, what);
    const auto then = before ? SumOf(before->metrics, name) : std::nullopt;
    if (then && state.at_ns > before->at_ns && *now >= *then)
      tokens +=
          fmt::format(" ({:.0f}/s)", (*now - *then) * 1e9 / static_cast<double>(state.at_ns - before->at_ns));
  };
  rate("vllm:generation_tokens_total", "generated");
  rate("vllm:prompt_tokens_total", "of prompts");
  if (!tokens.empty()) out += "tokens    " + tokens + "\n";
  auto usage = sum("vllm:kv_cache_usage_perc");
  if (!usage) usage = sum("vllm:gpu_cache_usage_perc");  // its name before vLLM 0.10
  if (usage) out += fmt::format("KV cache  {:.1f} % in use\n", 100 * *usage);

  std::string latency;
  const auto mean = [&](const std::string& name, std::string_view what) {
    const auto total = sum(name + "_sum"), count = sum(name + "_count");
    if (!total || !count || *count <= 0) return;
    latency += fmt::format("{}{} {:.1f} ms", latency.empty() ? "" : ", ", what, *total / *count * 1e3);
  };
  mean("vllm:time_to_first_token_seconds", "first token");
  mean("vllm:inter_token_latency_seconds", "next token");
  mean("vllm:e2e_request_latency_seconds", "request");
  if (!latency.empty()) out += "mean      " + latency + "\n";
  return out;
}

}  // namespace

std::string HumanBytes(double bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB"};
  std::size_t unit = 0;
  while (std::abs(bytes) >= 1024 && unit + 1 < std::size(kUnits)) {
    bytes /= 1024;
    ++unit;
  }
  return unit == 0 ? fmt::format("{:.0f} B", bytes) : fmt::format("{:.1f} {}", bytes, kUnits[unit]);
}

std::string RenderStatus(const ServerState& state, const std::optional<ServerState>& before) {
  std::string out = fmt::format("server    {}  {}{}{}\n", state.url, state.health,
                                state.version.empty() ? "" : "  version ", state.version);
  for (const ModelInfo& model : state.models) {
    out += fmt::format("model     {}", model.id);
    if (model.max_model_len > 0) out += fmt::format("  context {}", model.max_model_len);
    out += "\n";
  }
  out += Load(state, before);
  if (state.autoscale.is_object()) out += Autoscale(state.autoscale);
  out += state.cluster.is_object() ? Cluster(state.cluster) : DevicesOfMetrics(state.metrics);
  return out;
}

Json StatusJson(const ServerState& state) {
  Json models = Json::array();
  for (const ModelInfo& model : state.models)
    models.push_back({{"id", model.id}, {"max_model_len", model.max_model_len}});
  Json metrics = Json::object();
  for (const MetricSample& sample : state.metrics) {
    if (sample.labels.contains("le")) continue;  // buckets say nothing when summed
    metrics[sample.name] =
        (metrics.contains(sample.name) ? metrics[sample.name].get<double>() : 0.0) + sample.value;
  }
  return Json{
      {"url", state.url},   {"health", state.health},   {"version", state.version},    {"models", models},
      {"metrics", metrics}, {"cluster", state.cluster}, {"autoscale", state.autoscale}};
}

}  // namespace elasticmoe::cli
