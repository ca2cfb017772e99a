#include "server/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <vector>

namespace elasticmoe::server {
namespace {

using prometheus::Labels;
using Buckets = prometheus::Histogram::BucketBoundaries;

// vLLM's buckets.
const Buckets kFirstTokenS = {.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,  .75,
                              1,    2.5,  5,   7.5, 10,  20,  40,  80, 160, 640, 2560};
const Buckets kTokenS = {.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80};
const Buckets kRequestS = {.3, .5, .8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                           30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
const Buckets kN = {1, 2, 5, 10, 20};
const Buckets kResizeS = {.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 25, 50, 100};

prometheus::ClientMetric WithLabels(const Labels& labels) {
  prometheus::ClientMetric metric;
  for (const auto& [key, text] : labels) {
    prometheus::ClientMetric::Label label;
    label.name = key;
    label.value = text;
    metric.label.push_back(std::move(label));
  }
  return metric;
}

void AddIterationTokens(const Labels& labels, const runtime::EngineStats& stats,
                        std::vector<prometheus::MetricFamily>& families) {
  prometheus::ClientMetric metric = WithLabels(labels);
  std::uint64_t steps = 0;
  for (std::size_t i = 0; i < stats.steps_by_rows.size(); ++i) {
    steps += stats.steps_by_rows[i];
    const double bound = i < runtime::kStepRowBounds.size() ? runtime::kStepRowBounds[i]
                                                            : std::numeric_limits<double>::infinity();
    metric.histogram.bucket.push_back({steps, bound});
  }
  metric.histogram.sample_count = steps;
  metric.histogram.sample_sum = static_cast<double>(stats.step_rows);
  prometheus::MetricFamily family;
  family.name = "vllm:iteration_tokens_total";
  family.help = "Rows of tokens in a step, of prompts and of running sequences.";
  family.type = prometheus::MetricType::Histogram;
  family.metric.push_back(std::move(metric));
  families.push_back(std::move(family));
}

// 1, 2, 5, 10, ... up to `limit`.
Buckets OneTwoFive(int limit) {
  Buckets out;
  for (double decade = 1; decade <= limit; decade *= 10)
    for (double m : {1.0, 2.0, 5.0})
      if (decade * m <= limit) out.push_back(decade * m);
  return out;
}

}  // namespace

struct Metrics::Impl {
  Labels labels;
  prometheus::Registry registry;
  prometheus::Family<prometheus::Counter>* success;
  prometheus::Family<prometheus::Counter>* http;
  prometheus::Family<prometheus::Counter>* resizes;
  prometheus::Family<prometheus::Histogram>* resize_latency;
  prometheus::Histogram *resize_capacity, *resize_pause;
  prometheus::Counter *resize_remapped, *resize_copied, *resize_stages;
  prometheus::Counter *prompt_tokens, *generation_tokens;
  prometheus::Histogram *first_token, *inter_token, *per_token, *e2e, *queue, *prefill, *decode, *inference;
  prometheus::Histogram *request_prompt, *request_generation, *request_max_tokens, *request_n,
      *computed_prompt;

  prometheus::Histogram* Add(const std::string& name, const std::string& help, const Buckets& buckets) {
    return &prometheus::BuildHistogram().Name(name).Help(help).Register(registry).Add(labels, buckets);
  }
  prometheus::Counter* AddCounter(const std::string& name, const std::string& help) {
    return &prometheus::BuildCounter().Name(name).Help(help).Register(registry).Add(labels);
  }
};

Metrics::Metrics(std::string model_name, int max_model_len) : impl_(std::make_unique<Impl>()) {
  Impl& m = *impl_;
  m.labels = {{"model_name", std::move(model_name)}, {"engine", "0"}};
  m.success = &prometheus::BuildCounter()
                   .Name("vllm:request_success_total")
                   .Help("Requests that ended, by finish reason.")
                   .Register(m.registry);
  for (const char* reason : {"stop", "length", "abort", "error"}) {
    Labels labels = m.labels;
    labels["finished_reason"] = reason;
    m.success->Add(labels);
  }
  m.http = &prometheus::BuildCounter()
                .Name("http_requests_total")
                .Help("HTTP requests, by route, method and status.")
                .Register(m.registry);
  m.resizes = &prometheus::BuildCounter()
                   .Name("elasticmoe_resize_operations_total")
                   .Help("Resizes that ended, by strategy and result.")
                   .Register(m.registry);
  m.resize_latency = &prometheus::BuildHistogram()
                          .Name("elasticmoe_resize_scaling_latency_seconds")
                          .Help("Command to the new size serving, by strategy.")
                          .Register(m.registry);
  m.resize_capacity = m.Add("elasticmoe_resize_first_capacity_seconds",
                            "Command to the first token of a new device.", kResizeS);
  m.resize_pause =
      m.Add("elasticmoe_resize_pause_seconds", "Longest time between two steps in a resize.", kResizeS);
  m.resize_remapped =
      m.AddCounter("elasticmoe_resize_bytes_remapped_total", "Expert bytes that changed owner.");
  m.resize_copied =
      m.AddCounter("elasticmoe_resize_bytes_copied_total", "Bytes of weights copied between domains.");
  m.resize_stages = m.AddCounter("elasticmoe_resize_stages_total", "Stages of resizes that were committed.");
  const Buckets tokens = OneTwoFive(max_model_len);
  m.prompt_tokens = m.AddCounter("vllm:prompt_tokens_total", "Prompt tokens prefilled.");
  m.generation_tokens = m.AddCounter("vllm:generation_tokens_total", "Generated tokens.");
  m.first_token = m.Add("vllm:time_to_first_token_seconds", "Arrival to first token.", kFirstTokenS);
  m.inter_token = m.Add("vllm:inter_token_latency_seconds", "Time between tokens of a request.", kTokenS);
  m.per_token =
      m.Add("vllm:request_time_per_output_token_seconds", "A request's mean time per later token.", kTokenS);
  m.e2e = m.Add("vllm:e2e_request_latency_seconds", "Arrival to last token.", kRequestS);
  m.queue = m.Add("vllm:request_queue_time_seconds", "Waiting for the first step.", kRequestS);
  m.inference = m.Add("vllm:request_inference_time_seconds", "First step to last token.", kRequestS);
  m.prefill = m.Add("vllm:request_prefill_time_seconds", "First step to first token.", kRequestS);
  m.decode = m.Add("vllm:request_decode_time_seconds", "First to last token.", kRequestS);
  m.request_prompt = m.Add("vllm:request_prompt_tokens", "Prompt tokens of a request.", tokens);
  m.request_generation = m.Add("vllm:request_generation_tokens", "Generated tokens of a request.", tokens);
  m.request_max_tokens = m.Add("vllm:request_params_max_tokens", "max_tokens of a request.", tokens);
  m.computed_prompt = m.Add("vllm:request_prefill_kv_computed_tokens",
                            "Prompt tokens of a request that were not in the prefix cache.", tokens);
  m.request_n = m.Add("vllm:request_params_n", "n of a request.", kN);
}

Metrics::~Metrics() = default;

void Metrics::PromptDone(int tokens) {
  impl_->prompt_tokens->Increment(tokens);
}

void Metrics::FirstToken(double seconds) {
  impl_->first_token->Observe(seconds);
  impl_->generation_tokens->Increment();
}

void Metrics::NextTokens(double seconds, int tokens) {
  if (tokens <= 0) return;
  for (int i = 0; i < tokens; ++i) impl_->inter_token->Observe(seconds / tokens);
  impl_->generation_tokens->Increment(tokens);
}

void Metrics::RequestDone(const RequestRecord& r) {
  Impl& m = *impl_;
  Labels labels = m.labels;
  labels["finished_reason"] = std::string(r.finish_reason);
  m.success->Add(labels).Increment();
  m.e2e->Observe(r.e2e_s);
  m.request_prompt->Observe(r.prompt_tokens);
  m.request_generation->Observe(r.generation_tokens);
  m.request_max_tokens->Observe(r.max_tokens);
  m.request_n->Observe(r.n);
  m.computed_prompt->Observe(r.prompt_tokens - r.cached_tokens);
  if (r.queue_s) m.queue->Observe(*r.queue_s);
  if (r.prefill_s) m.prefill->Observe(*r.prefill_s);
  if (r.prefill_s && r.decode_s) m.inference->Observe(*r.prefill_s + *r.decode_s);
  if (r.decode_s) {
    m.decode->Observe(*r.decode_s);
    if (r.generation_tokens > 1) m.per_token->Observe(*r.decode_s / (r.generation_tokens - 1));
  }
}

void Metrics::ResizeDone(const core::ResizeReport& report) {
  Impl& m = *impl_;
  Labels labels = m.labels;
  labels["strategy"] = report.strategy;  // one of ours: others are refused
  const auto seconds = [&](TimeNs at) { return static_cast<double>(at - report.started) / 1e9; };
  if (report.serving && !report.error)
    m.resize_latency->Add(labels, kResizeS).Observe(seconds(*report.serving));
  labels["result"] = std::string(core::ToString(report.state));
  m.resizes->Add(labels).Increment();
  if (report.first_capacity) m.resize_capacity->Observe(seconds(*report.first_capacity));
  m.resize_pause->Observe(static_cast<double>(report.longest_step_gap) / 1e9);
  m.resize_remapped->Increment(static_cast<double>(report.bytes_remapped));
  m.resize_copied->Increment(static_cast<double>(report.bytes_copied));
  m.resize_stages->Increment(report.stages_committed);
}

void Metrics::HttpResponse(std::string_view method, std::string_view route, int status) {
  // Labels come from our own lists only: a client must not be able to make new series.
  static constexpr std::string_view kMethods[] = {"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"};
  std::string shown = "other";
  for (std::string_view known : kMethods)
    if (method == known) shown = std::string(known);
  impl_->http
      ->Add({{"handler", route.empty() ? "none" : std::string(route)},
             {"method", shown},
             {"status", std::to_string(status)}})
      .Increment();
}

std::string Metrics::Page(const runtime::EngineStats& stats, int connections) const {
  std::vector<prometheus::MetricFamily> families = impl_->registry.Collect();
  const auto add = [&](const char* name, const char* help, prometheus::MetricType type, double value,
                       Labels extra = {}) {
    Labels labels = impl_->labels;
    labels.merge(extra);
    prometheus::ClientMetric metric = WithLabels(labels);
    (type == prometheus::MetricType::Gauge ? metric.gauge.value : metric.counter.value) = value;
    if (families.empty() || families.back().name != name) {
      prometheus::MetricFamily family;
      family.name = name;
      family.help = help;
      family.type = type;
      families.push_back(std::move(family));
    }
    families.back().metric.push_back(std::move(metric));
  };
  const auto number = [](auto value) { return static_cast<double>(value); };
  constexpr auto kGauge = prometheus::MetricType::Gauge;
  constexpr auto kCounter = prometheus::MetricType::Counter;
  add("vllm:num_requests_running", "Requests in the running batch.", kGauge, stats.running);
  add("vllm:num_requests_waiting", "Requests that wait.", kGauge, stats.waiting);
  add("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", kGauge, stats.kv_usage);
  add("vllm:cache_config_info", "Configuration of the KV cache.", kGauge, 1,
      {{"num_gpu_blocks", std::to_string(stats.kv_blocks)}});
  add("vllm:num_preemptions_total", "Requests preempted for want of KV blocks.", kCounter,
      number(stats.preemptions));
  add("vllm:prefix_cache_queries_total", "Tokens looked up in the prefix cache.", kCounter,
      number(stats.prefix_queries));
  add("vllm:prefix_cache_hits_total", "Tokens found in the prefix cache.", kCounter,
      number(stats.prefix_hits));
  AddIterationTokens(impl_->labels, stats, families);
  add("elasticmoe_engine_steps_total", "Steps of the engine.", kCounter, number(stats.steps));
  add("elasticmoe_engine_step_seconds_total", "Time in steps, first device's begin to last device's end.",
      kCounter, number(stats.step_ns) / 1e9);
  add("elasticmoe_engine_between_steps_seconds_total", "Time between steps while there were more to run.",
      kCounter, number(stats.between_steps_ns) / 1e9);
  add("elasticmoe_placement_epoch", "Number of the placement that serves.", kGauge, number(stats.epoch));
  add("elasticmoe_recoveries_total", "Workers replaced after they died.", kCounter, number(stats.recoveries));
  add("elasticmoe_http_connections", "Open HTTP connections.", kGauge, connections);
  add("elasticmoe_devices", "Devices of the placement that serves.", kGauge, number(stats.devices.size()));
  add("elasticmoe_resize_in_progress", "1 while a resize runs.", kGauge, stats.resizing ? 1 : 0);
  add("elasticmoe_standby_workers", "Workers that are ready to take over or to grow.", kGauge, stats.standby);
  for (const auto& [phase, count] : stats.phases)
    add("elasticmoe_devices_by_phase", "Devices by their phase in a resize.", kGauge, count,
        {{"phase", phase}});
  for (const auto& domain : stats.domains)
    for (const auto& [use, bytes] :
         {std::pair{"shared", domain.shared_bytes}, std::pair{"experts", domain.expert_bytes},
          std::pair{"kv", domain.kv_bytes}})
      add("elasticmoe_memory_bytes", "Memory of a domain by use.", kGauge, number(bytes),
          {{"domain", fmt::format("{}", domain.domain)}, {"use", use}});
  const runtime::CostStats& cost = stats.cost;
  add("elasticmoe_device_seconds_total", "Devices that were paid for, times seconds.", kCounter,
      cost.device_s);
  add("elasticmoe_busy_device_seconds_total", "Of them, in steps.", kCounter, cost.busy_device_s);
  const char* source = cost.measured ? "rapl" : "model";
  add("elasticmoe_energy_joules_total", "Energy, by the machine's counters or by the stated power model.",
      kCounter, cost.joules, {{"source", source}});
  const auto share = [&](const char* name, const char* help, double sum, std::uint64_t count,
                         Labels extra = {}) {
    if (count > 0) add(name, help, kGauge, sum / number(count), std::move(extra));
  };
  share("elasticmoe_device_seconds_per_request", "Device-seconds of a request, since the start.",
        cost.device_s, cost.requests);
  share("elasticmoe_device_seconds_per_token", "Device-seconds of an output token, since the start.",
        cost.device_s, cost.output_tokens);
  share("elasticmoe_joules_per_request", "Energy of a request, since the start.", cost.joules, cost.requests,
        {{"source", source}});
  share("elasticmoe_joules_per_token", "Energy of an output token, since the start.", cost.joules,
        cost.output_tokens, {{"source", source}});
  double most_rows = 0, all_rows = 0;
  for (const auto& device : stats.devices) {
    most_rows = std::max(most_rows, number(device.rows));
    all_rows += number(device.rows);
  }
  if (all_rows > 0)
    add("elasticmoe_device_imbalance", "Rows of the busiest device over the mean, since the start.", kGauge,
        most_rows * number(stats.devices.size()) / all_rows);
  for (const auto& device : stats.devices)
    add("elasticmoe_device_sequences", "Sequences that a device serves.", kGauge, device.sequences,
        {{"device", fmt::format("{}", device.device)}});
  for (const auto& device : stats.devices)
    add("elasticmoe_device_rows_total", "Rows of tokens that a device's experts computed.", kCounter,
        number(device.rows), {{"device", fmt::format("{}", device.device)}});
  for (const auto& device : stats.devices)
    add("elasticmoe_device_experts", "Pairs of layer and expert that a device serves.", kGauge,
        number(device.experts), {{"device", fmt::format("{}", device.device)}});
  return prometheus::TextSerializer().Serialize(families);
}

}  // namespace elasticmoe::server
