#include "cli/capacity_report.h"

#include <algorithm>

#include "cli/svg_curve.h"

namespace elasticmoe::cli {
namespace {

template <class Value>
std::string Figure(Curve curve, const std::vector<sim::CapacitySample>& samples, Value value) {
  for (const auto& sample : samples)
    curve.points.emplace_back(sample.at_s, static_cast<double>(value(sample)));
  return SvgCurve(curve);
}

double Seconds(const core::Decision& decision) {
  return static_cast<double>(decision.at) * 1e-9;
}

double PerToken(double sum, const sim::CapacityResult& r) {
  return r.output_tokens > 0 ? sum / r.output_tokens : 0;
}

}  // namespace

std::string CapacityTable(const std::vector<NamedRun>& runs) {
  std::string out =
      fmt::format("{:<28} {:>8} {:>9} {:>9} {:>9} {:>12} {:>10} {:>9} {:>8}\n", "run", "SLO %", "TTFT p50",
                  "TTFT p99", "TPOT p99", "device-s", "J/token", "gap s", "resizes");
  for (const auto& [name, r] : runs)
    out += fmt::format("{:<28} {:>8.2f} {:>8.2f}s {:>8.2f}s {:>7.0f}ms {:>12.0f} {:>10.2f} {:>9.2f} {:>8}\n",
                       name, r.attainment * 100, r.ttft_p50_s, r.ttft_p99_s, r.tpot_p99_s * 1e3, r.device_s,
                       PerToken(r.joules, r), r.worst_gap_s, r.resizes.size());
  return out;
}

Json CapacityJson(const std::vector<NamedRun>& runs) {
  Json out = Json::array();
  for (const auto& [name, r] : runs) {
    Json resizes = Json::array();
    for (const auto& [d, ready_s, done_s] : r.resizes)
      resizes.push_back({{"at_s", Seconds(d)},
                         {"from", d.from},
                         {"to", d.to},
                         {"ready_s", ready_s},
                         {"done_s", done_s},
                         {"code", std::string(core::ToString(d.code))},
                         {"reason", d.reason}});
    out.push_back({{"name", name},
                   {"requests", r.requests},
                   {"ended", r.ended},
                   {"slo_attainment", r.attainment},
                   {"ttft_p50_s", r.ttft_p50_s},
                   {"ttft_p99_s", r.ttft_p99_s},
                   {"tpot_p50_s", r.tpot_p50_s},
                   {"tpot_p99_s", r.tpot_p99_s},
                   {"device_seconds", r.device_s},
                   {"device_seconds_per_request", r.ended > 0 ? r.device_s / r.ended : 0},
                   {"joules", r.joules},
                   {"joules_per_token", PerToken(r.joules, r)},
                   {"output_tokens", r.output_tokens},
                   {"worst_gap_s", r.worst_gap_s},
                   {"smallest_size", r.least_devices},
                   {"duration_s", r.duration_s},
                   {"steps", r.steps},
                   {"faults", r.faults},
                   {"resizes", std::move(resizes)}});
  }
  return out;
}

std::string CapacityHtml(const std::string& title, const std::vector<NamedRun>& runs) {
  std::string out = CurvePageHead(title) + fmt::format("<pre>{}</pre>\n", HtmlEscaped(CapacityTable(runs)));
  double most_devices = 1;
  for (const auto& [name, r] : runs)
    for (const auto& sample : r.samples) most_devices = std::max<double>(most_devices, sample.devices);
  for (const auto& [name, r] : runs) {
    out += fmt::format("<h2>{}</h2>\n", HtmlEscaped(name));
    out += "<div class=\"curves\">\n";
    out += Figure({"Arrivals", "requests/s"}, r.samples, [](const auto& s) { return s.arrivals; });
    out += Figure({.label = "Devices", .steps = true, .top = most_devices}, r.samples,
                  [](const auto& s) { return s.devices; });
    out += Figure({"Requests that wait", ""}, r.samples, [](const auto& s) { return s.waiting; });
    out += Figure({"Requests that run", ""}, r.samples, [](const auto& s) { return s.running; });
    out += Figure({.label = "SLO attainment of the last window", .unit = "%", .top = 100.0}, r.samples,
                  [](const auto& s) { return s.attainment * 100; });
    out += Figure({"Worst TTFT", "s"}, r.samples, [](const auto& s) { return s.worst_ttft_s; });
    out += Figure({"Output", "tokens/s"}, r.samples, [](const auto& s) { return s.output_tokens; });
    out += "</div>\n<ol>";
    for (const auto& [d, ready_s, done_s] : r.resizes)
      out += fmt::format("<li>{:.0f} s: {} to {}, {:.1f} s: {}</li>\n", Seconds(d), d.from, d.to,
                         std::max(0.0, done_s - Seconds(d)), HtmlEscaped(d.reason));
    out += "</ol>\n";
  }
  return out;
}

}  // namespace elasticmoe::cli
