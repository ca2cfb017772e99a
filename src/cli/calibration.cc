#include "cli/calibration.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <iterator>
#include <span>
#include <thread>

#include "cli/client.h"
#include "cli/machine_speed.h"
#include "cli/openai_answer.h"
#include "compute/limits.h"
#include "model/checkpoint.h"

namespace elasticmoe::cli {
namespace {

constexpr TimeNs kStartTimeout = 600'000'000'000;
constexpr int kPrompt = 16, kOutput = 64;
// Times that every point is shown to the fit: enough that its prior counts little.
constexpr int kShown = 100;
// A remapped page costs no copy, so the link is as good as none.
constexpr double kRemapped = 1e15;

double MedianMs(Samples& milliseconds) {
  return milliseconds.Count() > 0 ? milliseconds.Percentile(50) : 0;
}

constexpr int kDecodeRows[] = {1, 2, 4, 8, 16};
constexpr int kPromptRows[] = {8, 64, 256};

// Decode steps of `rows` sequences at `devices`.
core::StepShape DecodeShape(const sim::ModelShape& model, int rows, int devices) {
  const double busiest = std::ceil(static_cast<double>(rows) / devices);
  return {.devices = devices,
          .rows = busiest,
          .expert_rows = static_cast<double>(rows) / devices,
          .experts = core::ExpertsTouched(model.experts, model.top_k, devices, rows) * model.moe_layers,
          .kv_bytes = busiest * (kPrompt + kOutput / 2.0) * model.kv_token_bytes,
          .tokens = static_cast<double>(rows)};
}

core::StepShape PrefillShape(const sim::ModelShape& model, int rows, int devices) {
  return {.devices = devices,
          .rows = static_cast<double>(rows),
          .expert_rows = static_cast<double>(rows) / devices,
          .experts = core::ExpertsTouched(model.experts, model.top_k, devices, rows) * model.moe_layers,
          .kv_bytes = rows * model.kv_token_bytes,
          .tokens = 1};
}

// The points that are measured at `devices`, without times yet.
std::vector<CalibrationPoint> PointsAt(const sim::ModelShape& model, int devices) {
  std::vector<CalibrationPoint> points;
  for (const int rows : kDecodeRows)
    points.push_back({.what = fmt::format("decode, {} rows, {} devices", rows, devices),
                      .shape = DecodeShape(model, rows, devices)});
  for (const int rows : kPromptRows)
    points.push_back({.what = fmt::format("prompt, {} rows, {} devices", rows, devices),
                      .prompt = true,
                      .shape = PrefillShape(model, rows, devices)});
  return points;
}

// Adds a time to each of the points of one size.
Status MeasureSteps(MeasuredServer& server, std::span<CalibrationPoint> points) {
  CalibrationPoint* point = points.data();
  for (const int rows : kDecodeRows) {
    EM_ASSIGN_OR_RETURN(LoadReport report, server.Closed(kPrompt, kOutput, rows, std::max(4, 3 * rows)));
    point++->times_ms.Add(MedianMs(report.tpot_ms));
  }
  for (const int rows : kPromptRows) {
    EM_ASSIGN_OR_RETURN(LoadReport report, server.Closed(rows, 2, 1, 12));
    point++->times_ms.Add(MedianMs(report.ttft_ms));
  }
  return {};
}

// The coefficients of a step, and what is left of the time to the first token of prompts: a request's own
// part.
void Fit(const sim::ModelShape& model, Calibration& out) {
  constexpr int kPasses = 4;
  double& request_s = out.profile.request_s;
  const core::StepCost prior = sim::CostOf(out.profile, model);
  const auto step_s = [&](const CalibrationPoint& one) {
    return std::max(one.measured_s / 10, one.measured_s - (one.prompt ? request_s : 0));
  };
  for (int pass = 0; pass < kPasses; ++pass) {
    core::StepCostLearner learner(prior);
    for (int round = 0; round < kShown; ++round)
      for (const CalibrationPoint& one : out.points) learner.Observe(one.shape, step_s(one));
    out.profile.measured = learner.cost();
    Samples rest;
    for (CalibrationPoint& one : out.points) {
      one.fitted_s = learner.cost().Seconds(one.shape);
      if (one.prompt) rest.Add(one.measured_s - one.fitted_s);
    }
    if (pass + 1 < kPasses) request_s = std::max(0.0, rest.Percentile(50));
  }
  for (CalibrationPoint& one : out.points) one.measured_s = step_s(one);
}

}  // namespace

Expected<std::unique_ptr<MeasuredServer>> MeasuredServer::Start(const CalibrationOptions& options) {
  std::vector<std::string> arguments{options.model,
                                     "--devices",
                                     "1",
                                     "--max-devices",
                                     std::to_string(options.devices),
                                     "--threads-per-device",
                                     std::to_string(options.threads_per_device)};
  if (options.domain_per_device) arguments.emplace_back("--domain-per-device");
  arguments.insert(arguments.end(), options.serve_flags.begin(), options.serve_flags.end());
  std::unique_ptr<MeasuredServer> out(new MeasuredServer);
  const auto start = std::chrono::steady_clock::now();
  EM_ASSIGN_OR_RETURN(out->child_, ServerChild::Start(std::move(arguments), kStartTimeout));
  out->start_s_ = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  EM_ASSIGN_OR_RETURN(Url url, ParseUrl(out->child_->url()));
  out->client_ = std::make_unique<HttpClient>(out->loop_, std::move(url), HttpClientOptions{});
  EM_ASSIGN_OR_RETURN(const auto models, ListModels(*out->client_));
  out->model_ = models.front().id;
  out->vocab_ = models.front().vocab;
  return out;
}

LoadOptions MeasuredServer::Load() const {
  LoadOptions load;
  load.model = model_;
  // Other prompts each time: none is found in the prefix cache.
  static std::uint64_t seed = 0;
  load.shape.seed = ++seed;
  if (vocab_ > 0) {
    load.shape.first_id = vocab_ > 400 ? 100 : 0;
    load.shape.end_id = vocab_;
  }
  return load;
}

Expected<LoadReport> MeasuredServer::Closed(int input_tokens, int output_tokens, int concurrency,
                                            int requests) {
  LoadOptions load = Load();
  load.shape.input = {input_tokens, input_tokens};
  load.shape.output = {output_tokens, output_tokens};
  load.concurrency = concurrency;
  load.requests = static_cast<std::uint64_t>(requests);
  LoadReport report = Summarize(LoadRun(loop_, *client_, std::move(load)).Run(), {});
  if (report.completed == 0 || report.failed > 0)
    return Fail(ErrorCode::kUnavailable, "calibrating: failed={} of {} requests ({})", report.failed,
                report.requests, report.first_error.empty() ? "" : report.first_error.begin()->second);
  return report;
}

Expected<LoadReport> MeasuredServer::Open(int input_tokens, int output_tokens, Arrivals arrivals) {
  LoadOptions load = Load();
  load.shape.input = {input_tokens, input_tokens};
  load.shape.output = {output_tokens, output_tokens};
  load.arrivals = std::move(arrivals);
  LoadReport report = Summarize(LoadRun(loop_, *client_, std::move(load)).Run(), {});
  if (report.completed == 0 || report.failed > 0)
    return Fail(ErrorCode::kUnavailable, "measuring: failed={} of {} requests ({})", report.failed,
                report.requests, report.first_error.empty() ? "" : report.first_error.begin()->second);
  return report;
}

Expected<double> MeasuredServer::Scale(int devices) {
  const Json body = {{"devices", devices}};
  EM_ASSIGN_OR_RETURN(Json answer,
                      CallJson(*client_, {.method = "POST", .target = "/v1/scale", .body = DumpJson(body)}));
  const std::string id = StringField(answer, "id");
  for (int tries = 0; tries < 3000; ++tries) {
    const std::string state = StringField(answer, "state");
    if (state == "done")
      return NumberField(answer.value("report", Json::object()), "scaling_latency_ms", 0) * 1e-3;
    if (state == "aborted")
      return Fail(ErrorCode::kFailedPrecondition, "scaling to {}: {}", devices, StringField(answer, "error"));
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    EM_ASSIGN_OR_RETURN(answer, CallJson(*client_, {.target = "/v1/scale/" + id}));
  }
  return Fail(ErrorCode::kDeadlineExceeded, "scaling to {}: it does not end", devices);
}

double Calibration::WorstDeviation() const {
  double worst = 0;
  for (const CalibrationPoint& one : points)
    worst = std::max(worst, std::abs(one.fitted_s / std::max(one.measured_s, 1e-12) - 1));
  return worst;
}

Expected<sim::ModelShape> ModelShapeOf(const std::string& directory) {
  EM_ASSIGN_OR_RETURN(const model::Checkpoint checkpoint, model::Checkpoint::Open(directory));
  return sim::ShapeOf(checkpoint.spec);
}

Expected<Calibration> Calibrate(const CalibrationOptions& options,
                                const std::function<void(const std::string&)>& say,
                                const BesideCalibration& beside) {
  Calibration out;
  EM_ASSIGN_OR_RETURN(const sim::ModelShape model, ModelShapeOf(options.model));
  EM_ASSIGN_OR_RETURN(out.profile, sim::ProfileOf("cpu-core"));
  out.profile.devices = options.devices;
  say("memory");
  const int any_cpu = -1;
  compute::ThreadPool thread({&any_cpu, 1});
  out.profile.memory_bytes_s = compute::ReadProbe(thread).BytesPerSecond(thread);
  EM_ASSIGN_OR_RETURN(const double copy, CopyBandwidth());
  out.profile.link_bytes_s = options.domain_per_device ? copy : kRemapped;
  say("start of a server");
  EM_ASSIGN_OR_RETURN(const auto server, MeasuredServer::Start(options));
  // Loading is part of what was measured.
  out.profile.boot_s = server->start_s();
  out.profile.host_bytes_s = out.profile.disk_bytes_s = kRemapped;
  EM_ASSIGN_OR_RETURN(LoadReport warm, server->Closed(kPrompt, kOutput, 4, 8));
  for (int devices = 1; devices <= options.devices; ++devices)
    std::ranges::move(PointsAt(model, devices), std::back_inserter(out.points));
  const std::size_t points_a_size = out.points.size() / options.devices;
  for (int round = 0; round < options.rounds; ++round) {
    for (int devices = 1; devices <= options.devices; ++devices) {
      say(fmt::format("round {} of {}: {} device{}", round + 1, options.rounds, devices,
                      devices == 1 ? "" : "s"));
      if (devices > 1) {
        EM_ASSIGN_OR_RETURN(const double seconds, server->Scale(devices));
        out.scaling_s.push_back(seconds);
      }
      EM_RETURN_IF_ERROR(
          MeasureSteps(*server, std::span(out.points).subspan((devices - 1) * points_a_size, points_a_size)));
      if (beside) EM_RETURN_IF_ERROR(beside(*server, devices, round));
    }
    if (options.devices > 1) EM_RETURN_IF_ERROR(server->Scale(1));
  }
  for (CalibrationPoint& one : out.points) one.measured_s = MedianMs(one.times_ms) * 1e-3;
  if (!out.scaling_s.empty()) {
    // The first growth: it touches memory that later ones find ready, and a server rarely grows twice in a
    // row.
    const double copied = options.domain_per_device
                              ? (static_cast<double>(model.shared_bytes) + model.AllExpertBytes() / 2) / copy
                              : 0;
    out.profile.attach_s = std::max(0.0, out.scaling_s.front() - copied);
  }
  Fit(model, out);
  return out;
}

}  // namespace elasticmoe::cli
