#include "cli/load_report.h"

#include <algorithm>

namespace elasticmoe::cli {
namespace {

using State = RequestResult::State;

double Ms(TimeNs ns) {
  return static_cast<double>(ns) * 1e-6;
}

double PerSecond(std::uint64_t count, double seconds) {
  return seconds > 0 ? static_cast<double>(count) / seconds : 0;
}

// Adds a completed request and says whether it met the limits.
bool AddCompleted(LoadReport& report, const RequestResult& request) {
  report.input_tokens += static_cast<std::uint64_t>(request.input_tokens);
  report.output_tokens += static_cast<std::uint64_t>(request.output_tokens);
  report.e2e_ms.Add(Ms(request.done_ns - request.due_ns));
  bool met = true;
  if (request.first_token_ns > 0) {
    const double ttft_ms = Ms(request.first_token_ns - request.due_ns);
    report.ttft_ms.Add(ttft_ms);
    met = !report.slo.ttft_ms || ttft_ms <= *report.slo.ttft_ms;
  }
  if (request.output_tokens > 1 && !request.gaps_ms.empty()) {
    const double tpot_ms = Ms(request.last_token_ns - request.first_token_ns) / (request.output_tokens - 1);
    report.tpot_ms.Add(tpot_ms);
    met = met && (!report.slo.tpot_ms || tpot_ms <= *report.slo.tpot_ms);
  }
  for (const float gap : request.gaps_ms) report.itl_ms.Add(static_cast<double>(gap));
  return met;
}

std::string Line(std::string_view name, std::string_view value) {
  return fmt::format("  {:<22}{:>12}\n", name, value);
}

std::string Row(std::string_view name, Samples& samples) {
  if (samples.Count() == 0)
    return fmt::format("  {:<10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}\n", name, "-", "-", "-", "-", "-", "-");
  return fmt::format("  {:<10}{:>10.2f}{:>10.2f}{:>10.2f}{:>10.2f}{:>10.2f}{:>10.2f}\n", name, samples.Mean(),
                     samples.Percentile(50), samples.Percentile(90), samples.Percentile(95),
                     samples.Percentile(99), samples.Max());
}

}  // namespace

LoadReport Summarize(const LoadResult& result, const SloLimits& slo) {
  LoadReport report;
  report.slo = slo;
  report.requests = result.requests.size();
  report.duration_s = static_cast<double>(result.duration_ns) * 1e-9;
  report.client_cpu_s = result.client_cpu_s;
  report.interrupted = result.interrupted;
  std::uint64_t met = 0;
  for (const RequestResult& request : result.requests) {
    if (request.state == State::kCompleted) {
      ++report.completed;
      met += AddCompleted(report, request);
    } else if (request.state == State::kCancelled) {
      ++report.cancelled;
    } else {
      ++report.failed;
      ++report.errors[request.error_kind];
      report.first_error.emplace(request.error_kind, request.error_message);
    }
  }
  if (slo.ttft_ms || slo.tpot_ms) report.slo_met = met;
  return report;
}

Json ToJson(LoadReport& report, Json about) {
  Json out = {
      {"requests", report.requests},
      {"completed", report.completed},
      {"failed", report.failed},
      {"cancelled", report.cancelled},
      {"duration_s", report.duration_s},
      {"input_tokens", report.input_tokens},
      {"output_tokens", report.output_tokens},
      {"request_per_s", PerSecond(report.completed, report.duration_s)},
      {"output_tokens_per_s", PerSecond(report.output_tokens, report.duration_s)},
      {"total_tokens_per_s", PerSecond(report.input_tokens + report.output_tokens, report.duration_s)},
      {"ttft_ms", report.ttft_ms.ToJson()},
      {"tpot_ms", report.tpot_ms.ToJson()},
      {"itl_ms", report.itl_ms.ToJson()},
      {"e2e_ms", report.e2e_ms.ToJson()}};
  out["errors"] = Json::object();
  for (const auto& [kind, count] : report.errors)
    out["errors"][kind] = {{"count", count}, {"first", report.first_error[kind]}};
  if (report.slo_met) {
    const std::uint64_t counted = report.completed + report.failed;
    out["slo"] = {
        {"ttft_ms", report.slo.ttft_ms ? Json(*report.slo.ttft_ms) : Json()},
        {"tpot_ms", report.slo.tpot_ms ? Json(*report.slo.tpot_ms) : Json()},
        {"attainment", counted > 0 ? static_cast<double>(*report.slo_met) / static_cast<double>(counted) : 0},
        {"goodput_request_per_s", PerSecond(*report.slo_met, report.duration_s)}};
  }
  out["client_cpu_s"] = report.client_cpu_s;
  out["interrupted"] = report.interrupted;
  out["config"] = std::move(about);
  return out;
}

std::string ToTable(LoadReport& report, const std::string& title) {
  std::string out = title + "\n\n";
  out += Line("requests", fmt::format("{}", report.requests));
  out += Line("completed", fmt::format("{}", report.completed));
  out += Line("failed", fmt::format("{}", report.failed));
  if (report.cancelled > 0) out += Line("cancelled by Ctrl-C", fmt::format("{}", report.cancelled));
  out += Line("duration", fmt::format("{:.2f} s", report.duration_s));
  out += Line("requests/s", fmt::format("{:.2f}", PerSecond(report.completed, report.duration_s)));
  out += Line("input tokens", fmt::format("{}", report.input_tokens));
  out += Line("output tokens", fmt::format("{}", report.output_tokens));
  out += Line("output tokens/s", fmt::format("{:.1f}", PerSecond(report.output_tokens, report.duration_s)));
  out +=
      Line("total tokens/s",
           fmt::format("{:.1f}", PerSecond(report.input_tokens + report.output_tokens, report.duration_s)));
  if (report.slo_met) {
    const std::uint64_t counted = std::max<std::uint64_t>(report.completed + report.failed, 1);
    out += Line("SLO attainment", fmt::format("{:.1f} %", 100.0 * static_cast<double>(*report.slo_met) /
                                                              static_cast<double>(counted)));
    out += Line("goodput, requests/s", fmt::format("{:.2f}", PerSecond(*report.slo_met, report.duration_s)));
  }
  out += Line("client CPU", fmt::format("{:.2f} s", report.client_cpu_s));
  out += fmt::format("\n  {:<10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}\n", "ms", "mean", "p50", "p90", "p95",
                     "p99", "max");
  out += Row("TTFT", report.ttft_ms);
  out += Row("TPOT", report.tpot_ms);
  out += Row("ITL", report.itl_ms);
  out += Row("end to end", report.e2e_ms);
  if (!report.errors.empty()) out += "\n";
  for (const auto& [kind, count] : report.errors)
    out += fmt::format("  {} x {}: {}\n", count, kind, report.first_error[kind]);
  return out;
}

std::string OutputLines(const LoadResult& result) {
  std::string out;
  for (std::size_t i = 0; i < result.requests.size(); ++i) {
    const RequestResult& request = result.requests[i];
    Json line = {{"index", i}};
    if (request.state != State::kCompleted) {
      line["failed"] = request.state == State::kCancelled ? "cancelled" : request.error_kind;
    } else {
      line["input_tokens"] = request.input_tokens;
      if (!request.token_ids.empty())
        line["token_ids"] = request.token_ids;
      else
        line["text"] = request.text;
    }
    out += DumpJson(line) + "\n";
  }
  return out;
}

}  // namespace elasticmoe::cli
