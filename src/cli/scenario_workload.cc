// The workload of a scenario: when requests come and how long they are.
#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "base/file.h"
#include "base/rng.h"
#include "cli/load_plan.h"
#include "cli/scenario.h"
#include "cli/scenario_reader.h"
#include "cli/trace_csv.h"

namespace elasticmoe::cli {
namespace {

constexpr std::size_t kMostRequests = 5'000'000;

// As it is, or with `copies` of each request, or so many that `rate` come a second on average (a part of them
// by lot where that is less than the trace's own). Copies come up to `spread_s` later: other users, not the
// same one again.
Expected<std::vector<sim::SimRequest>> FromTrace(const ScenarioReader& reader,
                                                 const std::filesystem::path& base) {
  EM_ASSIGN_OR_RETURN(const std::string path, reader.Text("path"));
  EM_ASSIGN_OR_RETURN(const double speed, reader.Number("speed", 1e-3, 1e6, 1));
  EM_ASSIGN_OR_RETURN(const double copies, reader.Int("copies", 1, 1000, 1));
  EM_ASSIGN_OR_RETURN(const double rate, reader.Number("rate", 0, 1e6, 0));
  EM_ASSIGN_OR_RETURN(const double spread_s, reader.Number("spread_s", 0, 1e6, 0));
  EM_ASSIGN_OR_RETURN(const int seed, reader.Int("seed", 0, 1 << 30, 1));
  if (rate > 0 && reader.Has("copies"))
    return Fail(ErrorCode::kInvalidArgument, "reading the scenario: {} and {} exclude each other",
                reader.Where("rate"), reader.Where("copies"));
  EM_ASSIGN_OR_RETURN(const std::string text, ReadFile(base / path));
  auto rows = ParseTraceCsv(text);
  if (!rows) return Within("reading " + path, rows.error());
  double times = copies;
  if (rate > 0 && !rows->empty()) {
    const double seconds = static_cast<double>(rows->back().at_ns) * 1e-9 / speed;
    times = rate * seconds / static_cast<double>(rows->size());
  }
  if (times * static_cast<double>(rows->size()) > static_cast<double>(kMostRequests))
    return Fail(ErrorCode::kInvalidArgument,
                "reading the scenario: workload brings {:.0f} requests (limit={})",
                times * static_cast<double>(rows->size()), kMostRequests);
  std::vector<sim::SimRequest> out;
  Rng rng(static_cast<std::uint64_t>(seed));
  for (const TraceRow& row : *rows) {
    const int count = static_cast<int>(times + (rate > 0 ? rng.Uniform() : 0));
    for (int i = 0; i < count; ++i)
      out.push_back(
          {static_cast<TimeNs>(static_cast<double>(row.at_ns) / speed + rng.Uniform() * spread_s * 1e9),
           row.context_tokens, row.generated_tokens});
  }
  std::ranges::stable_sort(out, {}, &sim::SimRequest::at_ns);
  return out;
}

// "0:1,300:9": seconds:rate, straight lines between, as steps of a second.
Expected<std::vector<RateStep>> Ramp(const ScenarioReader& reader) {
  EM_ASSIGN_OR_RETURN(const std::string text, reader.Text("points"));
  std::vector<std::pair<double, double>> points;
  std::size_t at = 0;
  while (at <= text.size()) {
    const std::size_t end = std::min(text.find(',', at), text.size());
    const std::string one = text.substr(at, end - at);
    const std::size_t colon = one.find(':');
    char* rest_a = nullptr;
    char* rest_b = nullptr;
    const double seconds = std::strtod(one.c_str(), &rest_a);
    const double rate = colon == one.npos ? -1 : std::strtod(one.c_str() + colon + 1, &rest_b);
    if (colon == one.npos || colon == 0 || rest_a != one.c_str() + colon || *rest_b != '\0' ||
        !(rate >= 0 && rate <= 1e6) || !(seconds >= 0 && seconds <= 1e6) ||
        (!points.empty() && seconds <= points.back().first))
      return Fail(
          ErrorCode::kInvalidArgument,
          "reading the scenario: {}='{}' at '{}'; write seconds:rate,… with rising seconds and rates of "
          "0 or more",
          reader.Where("points"), text, one);
    points.emplace_back(seconds, rate);
    at = end + 1;
  }
  std::vector<RateStep> steps;
  if (points.front().first > 0) steps.push_back({0, points.front().first});
  for (std::size_t i = 1; i < points.size(); ++i) {
    const auto [from_s, from] = points[i - 1];
    const auto [to_s, to] = points[i];
    const int count = std::max(1, static_cast<int>(std::ceil(to_s - from_s)));
    for (int k = 0; k < count; ++k)
      steps.push_back({from + (to - from) * (k + 0.5) / count, (to_s - from_s) / count});
  }
  if (steps.empty())
    return Fail(ErrorCode::kInvalidArgument, "reading the scenario: {}='{}' has one point only",
                reader.Where("points"), text);
  return steps;
}

Expected<std::vector<RateStep>> Bursts(const ScenarioReader& reader) {
  EM_ASSIGN_OR_RETURN(const double base, reader.Number("rate", 0, 1e6));
  EM_ASSIGN_OR_RETURN(const double burst, reader.Number("burst_rate", 0, 1e6));
  EM_ASSIGN_OR_RETURN(const double every, reader.Number("every_s", 1e-3, 1e6));
  EM_ASSIGN_OR_RETURN(const double length, reader.Number("burst_s", 1e-3, every));
  EM_ASSIGN_OR_RETURN(const double seconds, reader.Number("seconds", 1e-3, 1e6));
  std::vector<RateStep> steps;
  for (double at = 0; at < seconds; at += every) {
    if (every > length) steps.push_back({base, std::min(every - length, seconds - at)});
    if (at + every - length < seconds)
      steps.push_back({burst, std::min(length, seconds - at - (every - length))});
  }
  return steps;
}

}  // namespace

Expected<std::vector<sim::SimRequest>> ReadWorkload(const Json& json, const std::filesystem::path& base) {
  EM_ASSIGN_OR_RETURN(const ScenarioReader reader,
                      ScenarioReader::Make(json, "workload",
                                           {"kind", "path", "speed", "copies", "schedule", "points", "rate",
                                            "burst_rate", "every_s", "burst_s", "seconds", "requests",
                                            "spread_s", "prompt_tokens", "output_tokens", "seed"}));
  EM_ASSIGN_OR_RETURN(const std::string kind, reader.Text("kind"));
  if (kind == "trace") return FromTrace(reader, base);
  LoadShape shape;
  const auto range = [&](const char* key, TokenRange* to) -> Status {
    EM_ASSIGN_OR_RETURN(const std::string text, reader.Text(key));
    auto parsed = ParseTokenRange(text);
    if (!parsed) return Within(fmt::format("reading workload.{}", key), parsed.error());
    *to = *parsed;
    return {};
  };
  std::vector<RateStep> steps;
  std::vector<sim::SimRequest> out;
  const auto add = [&](TimeNs at) {
    const RequestLength length = LengthOf(shape, out.size());
    out.push_back({at, length.input_tokens, length.output_tokens});
  };
  int at_once = 0;
  if (kind == "poisson") {
    EM_ASSIGN_OR_RETURN(const std::string text, reader.Text("schedule"));
    auto schedule = ParseRateSchedule(text);
    if (!schedule) return Within("reading workload.schedule", schedule.error());
    steps = std::move(*schedule);
  } else if (kind == "ramp") {
    EM_ASSIGN_OR_RETURN(steps, Ramp(reader));
  } else if (kind == "bursts") {
    EM_ASSIGN_OR_RETURN(steps, Bursts(reader));
  } else if (kind == "offline") {
    EM_ASSIGN_OR_RETURN(at_once, reader.Int("requests", 1, static_cast<int>(kMostRequests)));
  } else {
    return Fail(ErrorCode::kInvalidArgument,
                "reading the scenario: workload.kind={} (one of poisson, bursts, ramp, trace, offline)",
                kind);
  }
  EM_RETURN_IF_ERROR(range("prompt_tokens", &shape.input));
  EM_RETURN_IF_ERROR(range("output_tokens", &shape.output));
  EM_ASSIGN_OR_RETURN(const int seed, reader.Int("seed", 0, 1 << 30, 1));
  shape.seed = static_cast<std::uint64_t>(seed);
  for (int i = 0; i < at_once; ++i) add(0);
  double expected = 0;
  for (const RateStep& step : steps) expected += step.per_s * step.seconds;
  if (expected > static_cast<double>(kMostRequests))
    return Fail(ErrorCode::kInvalidArgument,
                "reading the scenario: workload brings {:.0f} requests (limit={})", expected, kMostRequests);
  if (!steps.empty()) {
    Arrivals arrivals = Arrivals::Poisson(std::move(steps), shape.seed);
    while (const auto at = arrivals.Next()) add(*at);
  }
  return out;
}

}  // namespace elasticmoe::cli
