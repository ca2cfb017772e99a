#include "server/scale_routes.h"

#include <atomic>

#include "base/clock.h"
#include "base/rng.h"

namespace elasticmoe::server {
namespace {

using runtime::ReplicaSet;

HttpResponse Answer(int status, const Json& body) {
  return {.status = status, .body = DumpJson(body)};
}

HttpResponse Refusal(const Error& error, const std::string& param) {
  int status = 500;
  std::string type = "InternalServerError";
  switch (error.code) {
    case ErrorCode::kInvalidArgument:
      status = 400;
      type = "BadRequestError";
      break;
    case ErrorCode::kNotFound:
      status = 404;
      type = "NotFoundError";
      break;
    case ErrorCode::kFailedPrecondition:
    case ErrorCode::kAlreadyExists:
      status = 409;
      type = "ConflictError";
      break;
    case ErrorCode::kResourceExhausted:
      status = 409;
      type = "ConflictError";
      break;
    case ErrorCode::kUnimplemented:
      status = 501;
      type = "NotImplementedError";
      break;
    case ErrorCode::kUnavailable:
      status = 503;
      type = "ServiceUnavailableError";
      break;
    default:
      break;
  }
  return Answer(status, {{"error",
                          {{"message", error.message},
                           {"type", type},
                           {"param", param.empty() ? Json() : Json(param)},
                           {"code", status}}}});
}

Json Milliseconds(TimeNs from, std::optional<TimeNs> to) {
  return to ? Json(static_cast<double>(*to - from) / 1e6) : Json();
}

Json Operation(const core::ResizeReport& report) {
  Json from = Json::array(), to = Json::array();
  for (const DeviceId device : report.from) from.push_back(device.value);
  for (const DeviceId device : report.to) to.push_back(device.value);
  Json body = {
      {"id", report.operation},
      {"state", std::string(core::ToString(report.state))},
      {"phase", std::string(core::ToString(report.state))},
      {"strategy", report.strategy},
      {"from", from},
      {"to", to},
      {"progress", report.finished      ? 1.0
                   : report.stages == 0 ? 0.0
                                        : static_cast<double>(report.stages_committed) / report.stages},
      {"report",
       {{"scaling_latency_ms", Milliseconds(report.started, report.serving)},
        {"total_ms", Milliseconds(report.started, report.finished)},
        {"first_capacity_ms", Milliseconds(report.started, report.first_capacity)},
        {"pause_ms", static_cast<double>(report.longest_step_gap) / 1e6},
        {"stages", report.stages},
        {"stages_committed", report.stages_committed},
        {"bytes_remapped", report.bytes_remapped},
        {"bytes_copied", report.bytes_copied},
        {"copy_ms", static_cast<double>(report.copy_ns) / 1e6},
        {"refused", report.refused},
        {"failed", report.failed}}}};
  Json peaks = Json::array();  // weights, as planned before anything began
  for (const core::DomainPeak& peak : report.domain_peaks)
    peaks.push_back({{"domain", peak.domain.value}, {"bytes", peak.bytes}});
  body["peak_weight_bytes"] = peaks;
  body["error"] = report.error ? Json(report.error->message) : Json();
  return body;
}

std::string NewOperationId() {
  static std::atomic<std::uint64_t> next{0};
  const auto now = std::chrono::system_clock::now().time_since_epoch().count();
  return fmt::format("scale-{:016x}", RandomAt(static_cast<std::uint64_t>(now), next++));
}

Expected<int> Integer(const Json& body, const char* key, int least) {
  const auto at = body.find(key);
  if (at == body.end()) return Fail(ErrorCode::kInvalidArgument, "{} is required", key);
  if (!at->is_number_integer() || at->get<std::int64_t>() < least || at->get<std::int64_t>() > 1'000'000)
    return Fail(ErrorCode::kInvalidArgument, "{} must be {}", key,
                least > 0 ? "a positive integer" : "an integer that is not negative");
  return at->get<int>();
}

struct BadField {
  std::string param;
  Error error;
};

tl::expected<core::ResizeCommand, BadField> ParseCommand(const Json& body) {
  if (!body.is_object())
    return tl::unexpected(BadField{"", {ErrorCode::kInvalidArgument, "the body must be a JSON object"}});
  core::ResizeCommand command;
  auto devices = Integer(body, "devices", 0);
  if (!devices) return tl::unexpected(BadField{"devices", devices.error()});
  command.count = *devices;
  if (const auto at = body.find("remove"); at != body.end() && !at->is_null()) {
    const Error wrong{ErrorCode::kInvalidArgument, "remove must be a list of device numbers"};
    if (!at->is_array()) return tl::unexpected(BadField{"remove", wrong});
    for (const Json& device : *at) {
      if (!device.is_number_integer()) return tl::unexpected(BadField{"remove", wrong});
      command.victims.emplace_back(static_cast<int>(device.get<std::int64_t>()));
    }
  }
  const auto text = [&](const char* key, std::string& out) -> bool {
    const auto at = body.find(key);
    if (at == body.end() || at->is_null()) return true;
    if (!at->is_string() || at->get_ref<const std::string&>().empty() ||
        at->get_ref<const std::string&>().size() > 200)
      return false;
    out = at->get<std::string>();
    return true;
  };
  command.operation = NewOperationId();
  for (auto [key, out] :
       {std::pair{"operation_id", &command.operation}, std::pair{"strategy", &command.strategy}})
    if (!text(key, *out))
      return tl::unexpected(BadField{
          key, {ErrorCode::kInvalidArgument, fmt::format("{} must be a string of 1 to 200 bytes", key)}});
  if (body.contains("deadline_s") && !body["deadline_s"].is_null()) {
    const Json& seconds = body["deadline_s"];
    if (!seconds.is_number() || seconds.get<double>() <= 0 || seconds.get<double>() > 1e6)
      return tl::unexpected(BadField{
          "deadline_s", {ErrorCode::kInvalidArgument, "deadline_s must be a number above 0, at most 1e6"}});
    command.deadline = Now() + static_cast<TimeNs>(seconds.get<double>() * 1e9);
  }
  return command;
}

HttpResponse Cluster(const ReplicaSet& replicas) {
  const auto primary = replicas.Primary();
  if (!primary)
    return Refusal({ErrorCode::kUnavailable, "the server is being restarted at another size"}, "");
  const runtime::ResizeController& controller = *primary->controller;
  const core::Placement placement = primary->engine->PlacementNow();
  const runtime::EngineStats stats = primary->engine->Stats();
  const auto running = replicas.RunningResize();
  Json devices = Json::array();
  for (const auto& [device, phase] : controller.Phases()) {
    Json entry = {{"device", device.value},
                  {"state", std::string(core::ToString(phase))},
                  {"member", placement.RankOf(device) >= 0}};
    for (const runtime::DeviceStats& one : stats.devices)
      if (one.device == device) {
        entry["pid"] = one.pid;
        entry["sequences"] = one.sequences;
        entry["experts"] = one.experts;
        entry["expert_rows"] = one.rows;
      }
    devices.push_back(entry);
  }
  Json experts = Json::array();  // [layer][expert] = owners
  for (int layer = 0; layer < placement.layers(); ++layer) {
    Json row = Json::array();
    for (int expert = 0; expert < placement.experts(); ++expert) {
      Json owners = Json::array();
      for (const DeviceId owner : placement.Owners(layer, expert)) owners.push_back(owner.value);
      row.push_back(owners);
    }
    experts.push_back(row);
  }
  Json memory = Json::array();
  for (const runtime::DomainStats& domain : stats.domains)
    memory.push_back({{"domain", domain.domain.value},
                      {"shared_bytes", domain.shared_bytes},
                      {"expert_bytes", domain.expert_bytes},
                      {"kv_bytes", domain.kv_bytes}});
  Json body = {{"epoch", placement.epoch().value},
               {"replicas", replicas.Replicas()},
               {"desired", running ? running->to.size() : placement.members().size()},
               {"active", stats.devices.size()},
               {"asleep", primary->engine->Asleep()},
               {"max_devices", replicas.options().max_devices},
               {"operation", running ? Json(running->operation) : Json()},
               {"devices", devices},
               {"kv_blocks", stats.kv_blocks},
               {"kv_usage", stats.kv_usage},
               {"standby", stats.standby},
               {"expert_imbalance", replicas.ExpertImbalance()},
               {"memory", memory},
               {"experts", experts}};
  return Answer(200, body);
}

// vLLM's words, vLLM's statuses.
HttpResponse ScaleElasticEp(const std::string& text, ReplicaSet& replicas) {
  const auto body = ParseJson(text);
  if (!body || !body->is_object()) return Refusal({ErrorCode::kInvalidArgument, "Invalid JSON format"}, "");
  auto size = Integer(*body, "new_data_parallel_size", 1);
  if (!size) return Refusal(size.error(), "new_data_parallel_size");
  int drain_timeout = 120;
  if (body->contains("drain_timeout")) {
    auto given = Integer(*body, "drain_timeout", 1);
    if (!given) return Refusal(given.error(), "drain_timeout");
    drain_timeout = *given;
  }
  core::ResizeCommand command;
  command.count = *size;
  command.operation = NewOperationId();
  const std::string operation = command.operation;
  if (auto started = replicas.Resize(std::move(command)); !started)
    return Refusal(started.error(), "new_data_parallel_size");
  const auto report = replicas.AwaitResize(operation, TimeNs{drain_timeout} * 1'000'000'000);
  if (!report || !report->finished)
    return Refusal({ErrorCode::kDeadlineExceeded,
                    fmt::format("Scale failed due to request drain timeout after {} seconds", drain_timeout)},
                   "");
  if (report->error) return Refusal({ErrorCode::kInternal, "Scale failed: " + report->error->message}, "");
  return Answer(200, {{"message", fmt::format("Scaled to {} data parallel engines", *size)}});
}

// Answers on a helper thread: waiting must not hold up other connections.
Handler Waiting(std::function<HttpResponse(const std::string& body)> answer) {
  return [answer](const std::shared_ptr<Exchange>& exchange) {
    exchange->Offload([exchange, answer, body = exchange->Request().body] {
      exchange->Post([exchange, response = answer(body)] { exchange->Respond(response); });
    });
  };
}

}  // namespace

void AddScaleRoutes(ApiServer& server, ReplicaSet& replicas) {
  replicas.SetResizeObserver(
      [&server](const core::ResizeReport& report) { server.metrics().ResizeDone(report); });
  server.AddRoute("POST", "/v1/scale", Plain([&replicas](const HttpRequest& request) {
                    const auto body = ParseJson(request.body);
                    if (!body) return Refusal(body.error(), "");
                    auto command = ParseCommand(*body);
                    if (!command) return Refusal(command.error().error, command.error().param);
                    const auto report = replicas.Resize(std::move(*command));
                    return report ? Answer(202, Operation(*report)) : Refusal(report.error(), "devices");
                  }));
  server.AddRoute(
      "GET", "/v1/scale/*", Plain([&replicas](const HttpRequest& request) {
        constexpr std::string_view kTrace = "/trace";
        if (std::string id = request.rest; id.ends_with(kTrace)) {
          id.resize(id.size() - kTrace.size());
          if (const auto trace = replicas.TraceOf(id)) return Answer(200, *trace);
          return Refusal({ErrorCode::kNotFound, fmt::format("there is no trace of operation {}", id)}, "id");
        }
        const auto report = replicas.FindResize(request.rest);
        if (!report)
          return Refusal({ErrorCode::kNotFound, fmt::format("operation {} is unknown", request.rest)}, "id");
        return Answer(200, Operation(*report));
      }));
  server.AddRoute("DELETE", "/v1/scale/*", Plain([&replicas](const HttpRequest& request) {
                    const auto report = replicas.CancelResize(request.rest);
                    return report ? Answer(200, Operation(*report)) : Refusal(report.error(), "id");
                  }));
  server.AddRoute(
      "POST", "/v1/rebalance", Plain([&replicas](const HttpRequest& request) {
        const auto body = request.body.empty() ? Json::object() : ParseJson(request.body);
        if (!body || !body->is_object())
          return Refusal({ErrorCode::kInvalidArgument, "the body must be a JSON object, or empty"}, "");
        const auto outlook = replicas.Balance();
        const auto report = replicas.StartRebalance();
        if (!report) return Refusal(report.error(), "");
        Json answer = Operation(*report);
        if (outlook)
          answer["imbalance"] = {{"before", outlook->now},
                                 {"planned", outlook->planned},
                                 {"rows_per_expert", outlook->rows_per_expert},
                                 {"moves", outlook->moves}};
        return Answer(202, answer);
      }));
  server.AddMetrics([&replicas] {
    return fmt::format(
        "# HELP elasticmoe_expert_imbalance Rows of a layer's busiest device over the mean, since the last "
        "commit.\n# TYPE elasticmoe_expert_imbalance gauge\nelasticmoe_expert_imbalance {}\n",
        replicas.ExpertImbalance());
  });
  server.AddRoute("GET", "/v1/cluster", Plain([&replicas](const HttpRequest&) { return Cluster(replicas); }));
  server.AddRoute("POST", "/scale_elastic_ep",
                  Waiting([&replicas](const std::string& body) { return ScaleElasticEp(body, replicas); }));
  server.AddRoute("POST", "/is_scaling_elastic_ep", Plain([&replicas](const HttpRequest&) {
                    return Answer(200, {{"is_scaling_elastic_ep", replicas.RunningResize().has_value()}});
                  }));
}

}  // namespace elasticmoe::server
