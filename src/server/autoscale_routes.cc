#include "server/autoscale_routes.h"

#include <cmath>

#include "base/clock.h"
#include "server/api_error.h"

namespace elasticmoe::server {
namespace {

using runtime::Autoscaler;

double Seconds(TimeNs ns) {
  return static_cast<double>(ns) * 1e-9;
}

// JSON has no infinity: a load beyond the capacity has no step time.
Json Finite(double value) {
  return std::isfinite(value) ? Json(value) : Json();
}

Json ToJson(const core::Decision& decision, TimeNs now) {
  Json forecasts = Json::array();
  for (const core::Forecast& one : decision.forecasts)
    forecasts.push_back({{"devices", one.devices},
                         {"attainment", one.attainment},
                         {"ttft_s", Finite(one.ttft_s)},
                         {"step_s", Finite(one.step_s)},
                         {"running", one.running},
                         {"tokens_s", one.tokens_s},
                         {"stable", one.stable}});
  return {{"ago_s", Seconds(now - decision.at)},
          {"code", std::string(core::ToString(decision.code))},
          {"from", decision.from},
          {"to", decision.to},
          {"applied", decision.apply},
          {"reason", decision.reason},
          {"attainment", decision.seen_attainment},
          {"forecasts", std::move(forecasts)}};
}

Json ToJson(const Autoscaler::State& state) {
  const TimeNs now = Now();
  const core::AutoscalerOptions& policy = state.settings.policy;
  Json decisions = Json::array();
  for (const runtime::ToldDecision& one : state.told) {
    decisions.push_back(ToJson(one.decision, now));
    if (!one.error.empty()) decisions.back()["error"] = one.error;
  }
  return {{"policy", std::string(core::ToString(policy.kind))},
          {"strategy", state.settings.strategy},
          {"observe", policy.observe},
          {"held_by", state.held_by.empty() ? Json() : Json(state.held_by)},
          {"held_for_s", state.held_until > 0 ? Json(Seconds(state.held_until - now)) : Json()},
          {"min_devices", policy.min_devices},
          {"max_devices", policy.max_devices},
          {"slo",
           {{"ttft_ms", policy.slo.ttft_s * 1e3},
            {"tpot_ms", policy.slo.tpot_s * 1e3},
            {"attainment", policy.slo.attainment}}},
          {"window_s", Seconds(policy.window_ns)},
          {"devices", state.devices},
          {"attainment", state.attainment},
          {"step_cost",
           {{"fixed_s", state.cost.fixed_s},
            {"row_s", state.cost.row_s},
            {"expert_row_s", state.cost.expert_row_s},
            {"expert_s", state.cost.expert_s},
            {"kv_byte_s", state.cost.kv_byte_s},
            {"token_s", state.cost.token_s},
            {"peer_s", state.cost.peer_s}}},
          {"optimism", state.optimism},
          {"last", ToJson(state.last, now)},
          {"decisions", std::move(decisions)}};
}

HttpResponse Refuse(const std::string& param, const std::string& message) {
  return ErrorResponse({.status = 400, .message = message, .param = param});
}

HttpResponse Change(Autoscaler& autoscaler, const std::string& text) {
  const auto body = ParseJson(text);
  if (!body || !body->is_object()) return Refuse("", "the body must be a JSON object");
  for (const auto& [key, value] : body->items()) {
    if (key != "hold" && key != "observe")
      return Refuse(key, key + " is unknown; hold and observe can be set");
    if (!value.is_boolean()) return Refuse(key, key + " must be true or false");
  }
  if (const auto hold = body->find("hold"); hold != body->end()) {
    if (hold->get<bool>())
      autoscaler.Hold("POST /v1/autoscale", 0);
    else
      autoscaler.Release();
  }
  if (const auto observe = body->find("observe"); observe != body->end())
    autoscaler.SetObserve(observe->get<bool>());
  return {.body = DumpJson(ToJson(autoscaler.Current()))};
}

std::string MetricLines(const Autoscaler& autoscaler) {
  const Autoscaler::State state = autoscaler.Current();
  std::string out;
  const auto head = [&](std::string_view name, std::string_view help, std::string_view type) {
    out += fmt::format("# HELP {0} {1}\n# TYPE {0} {2}\n", name, help, type);
  };
  head("elasticmoe_autoscale_decisions_total", "Looks of the autoscaler, by what they came to.", "counter");
  for (int code = 0; code < core::kDecisionCodes; ++code)
    out += fmt::format("elasticmoe_autoscale_decisions_total{{code=\"{}\"}} {}\n",
                       core::ToString(static_cast<core::DecisionCode>(code)),
                       state.counts[static_cast<std::size_t>(code)]);
  head("elasticmoe_slo_attainment", "Share of the last window's requests within both limits.", "gauge");
  out += fmt::format("elasticmoe_slo_attainment {}\n", state.attainment);
  head("elasticmoe_autoscale_held", "1 while a person holds the size.", "gauge");
  out += fmt::format("elasticmoe_autoscale_held {}\n", state.held_by.empty() ? 0 : 1);
  head("elasticmoe_autoscale_wanted_devices", "Size that the last decision wants.", "gauge");
  out += fmt::format("elasticmoe_autoscale_wanted_devices {}\n", state.last.to);
  head("elasticmoe_autoscale_optimism",
       "Forecasts are made for so many times the load, as what came has taught.", "gauge");
  out += fmt::format("elasticmoe_autoscale_optimism {}\n", state.optimism);
  if (state.last.forecasts.empty()) return out;
  const auto gauge = [&](std::string_view name, std::string_view help, auto value) {
    head(name, help, "gauge");
    for (const core::Forecast& one : state.last.forecasts)
      out += fmt::format("{}{{devices=\"{}\"}} {}\n", name, one.devices,
                         std::isfinite(value(one)) ? fmt::format("{}", value(one)) : "+Inf");
  };
  gauge("elasticmoe_autoscale_forecast_attainment", "Forecast share of requests within both limits, by size.",
        [](const core::Forecast& one) { return one.attainment; });
  gauge("elasticmoe_autoscale_forecast_ttft_seconds", "Forecast mean time to the first token, by size.",
        [](const core::Forecast& one) { return one.ttft_s; });
  gauge("elasticmoe_autoscale_forecast_tokens_per_second", "Most output tokens a second, by size.",
        [](const core::Forecast& one) { return one.tokens_s; });
  return out;
}

}  // namespace

void AddAutoscaleRoutes(ApiServer& server, Autoscaler& autoscaler) {
  server.AddRoute("GET", "/v1/autoscale", Plain([&autoscaler](const HttpRequest&) {
                    return HttpResponse{.body = DumpJson(ToJson(autoscaler.Current()))};
                  }));
  server.AddRoute("POST", "/v1/autoscale", Plain([&autoscaler](const HttpRequest& request) {
                    return Change(autoscaler, request.body);
                  }));
  server.AddMetrics([&autoscaler] { return MetricLines(autoscaler); });
}

void AddNoAutoscaleRoutes(ApiServer& server) {
  server.AddRoute("GET", "/v1/autoscale", Plain([](const HttpRequest&) {
                    return HttpResponse{.body = DumpJson(Json{{"policy", "off"}})};
                  }));
}

}  // namespace elasticmoe::server
