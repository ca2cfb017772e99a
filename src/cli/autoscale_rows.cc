#include "cli/autoscale_rows.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <map>

#include "cli/resize_rows.h"
#include "cli/samples.h"
#include "cli/svg_curve.h"

namespace elasticmoe::cli {
namespace {

constexpr double kBurst = 1.5;
constexpr int kApart = 2;
constexpr double kCurveBinS = 1;

double Seconds(TimeNs ns) {
  return static_cast<double>(ns) * 1e-9;
}

bool Whole(const RequestResult& request) {
  return request.state == RequestResult::State::kCompleted;
}
double TtftMs(const RequestResult& request) {
  return static_cast<double>(request.first_token_ns - request.due_ns) * 1e-6;
}
double TpotMs(const RequestResult& request) {
  return static_cast<double>(request.last_token_ns - request.first_token_ns) * 1e-6 /
         std::max(request.output_tokens - 1, 1);
}
bool Met(const RequestResult& request, const SloLimits& slo) {
  return Whole(request) && (!slo.ttft_ms || TtftMs(request) <= *slo.ttft_ms) &&
         (!slo.tpot_ms || TpotMs(request) <= *slo.tpot_ms);
}

bool InBurst(double at_s, const std::vector<Burst>& bursts) {
  return std::ranges::any_of(bursts, [&](const Burst& b) { return at_s >= b.from_s && at_s < b.to_s; });
}

double Percentile(Samples& samples, double percent) {
  return samples.Count() == 0 ? 0 : samples.Percentile(percent);
}

using Points = std::vector<std::pair<double, double>>;

// One value a second of the requests that were due in it; `empty` where none was.
Points BySecond(const LoadResult& load, double empty,
                const std::function<double(const std::vector<const RequestResult*>&)>& value) {
  std::map<int, std::vector<const RequestResult*>> bins;
  for (const RequestResult& request : load.requests)
    bins[static_cast<int>(Seconds(request.due_ns) / kCurveBinS)].push_back(&request);
  Points points;
  for (int bin = 0; !bins.empty() && bin <= bins.rbegin()->first; ++bin)
    points.emplace_back((bin + 0.5) * kCurveBinS, bins.contains(bin) ? value(bins.at(bin)) : empty);
  return points;
}

Points OfSamples(const AutoscaleRun& run, double AutoscaleSample::*field) {
  Points points;
  for (const AutoscaleSample& sample : run.samples) points.emplace_back(sample.at_s, sample.*field);
  return points;
}

}  // namespace

std::vector<Burst> FindBursts(const std::vector<double>& arrivals_s, double bin_s) {
  if (arrivals_s.empty()) return {};
  const double last_s = *std::ranges::max_element(arrivals_s);
  std::vector<int> counts(static_cast<std::size_t>(last_s / bin_s) + 1);
  for (const double at_s : arrivals_s) ++counts[static_cast<std::size_t>(at_s / bin_s)];
  std::vector<int> sorted = counts;
  std::ranges::nth_element(sorted, sorted.begin() + static_cast<std::ptrdiff_t>(sorted.size() / 2));
  const double usual = std::max(1, sorted[sorted.size() / 2]);
  std::vector<Burst> bursts;
  for (std::size_t bin = 0; bin < counts.size(); ++bin) {
    if (counts[bin] <= kBurst * usual) continue;
    const double from_s = static_cast<double>(bin) * bin_s;
    if (bursts.empty() || from_s - bursts.back().to_s > kApart * bin_s) bursts.push_back({from_s, from_s});
    bursts.back().to_s = from_s + bin_s;
  }
  return bursts;
}

AutoscaleRow MakeRow(const AutoscaleRun& run, const SloLimits& slo, const std::vector<Burst>& bursts) {
  AutoscaleRow row;
  row.name = run.name;
  row.requests = run.load.requests.size();
  Samples ttft, tpot;
  std::size_t met = 0, in_bursts = 0, met_in_bursts = 0, tokens = 0;
  for (const RequestResult& request : run.load.requests) {
    const bool good = Met(request, slo), burst = InBurst(Seconds(request.due_ns), bursts);
    met += good;
    in_bursts += burst;
    met_in_bursts += burst && good;
    tokens += static_cast<std::size_t>(request.output_tokens);
    if (!Whole(request)) continue;
    ++row.whole;
    ttft.Add(TtftMs(request));
    tpot.Add(TpotMs(request));
  }
  row.failed = row.requests - row.whole;
  if (row.requests > 0) row.attainment = static_cast<double>(met) / static_cast<double>(row.requests);
  row.burst_attainment =
      in_bursts == 0 ? 1 : static_cast<double>(met_in_bursts) / static_cast<double>(in_bursts);
  row.ttft_p50_ms = Percentile(ttft, 50), row.ttft_p99_ms = Percentile(ttft, 99);
  row.tpot_p50_ms = Percentile(tpot, 50), row.tpot_p99_ms = Percentile(tpot, 99);
  if (!run.samples.empty()) {
    row.device_s = run.samples.back().device_s - run.samples.front().device_s;
    row.joules = run.samples.back().joules - run.samples.front().joules;
  }
  if (tokens > 0) row.joules_per_token = row.joules / static_cast<double>(tokens);
  if (row.requests > 0) row.device_s_per_request = row.device_s / static_cast<double>(row.requests);
  ResizeRun gaps;  // the longest pause of the whole run, by the rules of `bench resize`
  gaps.load = run.load;
  row.worst_gap_ms = MakeRow(gaps, {}, slo, std::numeric_limits<TimeNs>::max() / 2).pause_ms;
  for (const Json& one : run.decisions)
    ++(one.value("from", 0) == one.value("to", 0) ? row.rebalances : row.resizes);
  if (!bursts.empty())
    row.resizes_per_burst = static_cast<double>(row.resizes) / static_cast<double>(bursts.size());
  return row;
}

Json ToJson(const AutoscaleRow& row) {
  return {{"name", row.name},
          {"requests", row.requests},
          {"completed", row.whole},
          {"failed", row.failed},
          {"slo_attainment", row.attainment},
          {"burst_attainment", row.burst_attainment},
          {"ttft_p50_ms", row.ttft_p50_ms},
          {"ttft_p99_ms", row.ttft_p99_ms},
          {"tpot_p50_ms", row.tpot_p50_ms},
          {"tpot_p99_ms", row.tpot_p99_ms},
          {"device_seconds", row.device_s},
          {"device_seconds_per_request", row.device_s_per_request},
          {"joules", row.joules},
          {"joules_per_token", row.joules_per_token},
          {"worst_gap_ms", row.worst_gap_ms},
          {"resizes", row.resizes},
          {"resizes_per_burst", row.resizes_per_burst},
          {"rebalances", row.rebalances}};
}

std::string ToTable(const std::vector<AutoscaleRow>& rows) {
  std::string out = fmt::format("  {:<24}{:>8}{:>9}{:>10}{:>10}{:>10}{:>10}{:>9}{:>9}{:>8}{:>9}{:>10}\n",
                                "run", "SLO %", "bursts %", "TTFT p50", "TTFT p99", "TPOT p99", "device-s",
                                "J/token", "gap ms", "failed", "resizes", "per burst");
  for (const AutoscaleRow& row : rows)
    out += fmt::format(
        "  {:<24}{:>8.1f}{:>9.1f}{:>10.1f}{:>10.1f}{:>10.2f}{:>10.1f}{:>9.3f}{:>9.0f}{:>8}{:>9}{:>10.1f}\n",
        row.name, 100 * row.attainment, 100 * row.burst_attainment, row.ttft_p50_ms, row.ttft_p99_ms,
        row.tpot_p99_ms, row.device_s, row.joules_per_token, row.worst_gap_ms, row.failed, row.resizes,
        row.resizes_per_burst);
  return out;
}

std::string AutoscaleHtml(const std::string& title, const std::vector<AutoscaleRun>& runs,
                          const std::vector<AutoscaleRow>& rows, const SloLimits& slo,
                          const std::vector<Burst>& bursts) {
  double most_devices = 1;
  for (const AutoscaleRun& run : runs)
    for (const AutoscaleSample& sample : run.samples) most_devices = std::max(most_devices, sample.devices);
  std::vector<std::pair<double, double>> shaded;
  for (const Burst& burst : bursts) shaded.emplace_back(burst.from_s, burst.to_s);
  std::string out = CurvePageHead(title) + fmt::format("<pre>{}</pre>\n", HtmlEscaped(ToTable(rows)));
  out +=
      "<p><small>Shaded: bursts. Dashed: the limit of the SLO. By the second in which requests "
      "came.</small></p>\n";
  for (const AutoscaleRun& run : runs) {
    out += fmt::format("<h2>{}</h2>\n", HtmlEscaped(run.name));
    const auto mean = [](const std::vector<const RequestResult*>& requests) {
      double sum = 0, count = 0;
      for (const RequestResult* request : requests)
        if (Whole(*request)) sum += TtftMs(*request), ++count;
      return count > 0 ? sum / count : 0;
    };
    const auto share = [&](const std::vector<const RequestResult*>& requests) {
      return 100 *
             static_cast<double>(
                 std::ranges::count_if(requests, [&](const auto* request) { return Met(*request, slo); })) /
             static_cast<double>(requests.size());
    };
    const auto figure = [&](Curve curve) {
      curve.shaded = shaded;
      out += SvgCurve(curve);
    };
    out += "<div class=\"curves\">\n";
    figure({"Arrivals", "requests/s", BySecond(run.load, 0, [](const auto& requests) {
              return static_cast<double>(requests.size()) / kCurveBinS;
            })});
    figure({.label = "Devices",
            .points = OfSamples(run, &AutoscaleSample::devices),
            .steps = true,
            .top = most_devices});
    figure({"Requests that wait", "", OfSamples(run, &AutoscaleSample::waiting)});
    figure({"Requests that run", "", OfSamples(run, &AutoscaleSample::running)});
    figure({.label = "Mean TTFT", .unit = "ms", .points = BySecond(run.load, 0, mean), .limit = slo.ttft_ms});
    figure({.label = "SLO attainment", .unit = "%", .points = BySecond(run.load, 100, share), .top = 100.0});
    out += "</div>\n";
    out += "<ol>";
    for (const Json& one : run.decisions)
      out += fmt::format("<li>{:.1f} s: {} to {}: {}</li>\n", one.value("at_s", 0.0), one.value("from", 0),
                         one.value("to", 0), HtmlEscaped(one.value("reason", "")));
    out += "</ol>\n";
  }
  return out;
}

}  // namespace elasticmoe::cli
