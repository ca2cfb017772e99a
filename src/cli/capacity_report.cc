#include "cli/capacity_report.h"

#include <algorithm>

namespace elasticmoe::cli {
namespace {

// One curve of [seconds, value], filled below.
template <class Value>
std::string Curve(std::string_view label, const std::vector<sim::CapacitySample>& samples, Value value) {
  constexpr double kWidth = 900, kHeight = 110;
  double most = 0;
  for (const auto& sample : samples) most = std::max(most, static_cast<double>(value(sample)));
  const double end_s = std::max(1.0, samples.empty() ? 1.0 : samples.back().at_s);
  std::string points = fmt::format("0,{}", kHeight);
  double x = 0;
  for (const auto& sample : samples) {
    x = sample.at_s / end_s * kWidth;
    points += fmt::format(" {:.1f},{:.1f}", x,
                          kHeight - static_cast<double>(value(sample)) / std::max(most, 1e-9) * kHeight);
  }
  points += fmt::format(" {:.1f},{}", x, kHeight);
  return fmt::format(
      "<figure><figcaption>{} <small>(0 to {}, over {:.0f} s)</small></figcaption><svg viewBox=\"0 0 {} "
      "{}\">"
      "<polygon points=\"{}\"/></svg></figure>\n",
      label, most >= 1000 ? fmt::format("{:.0f}", most) : fmt::format("{:.4g}", most), end_s, kWidth, kHeight,
      points);
}

double Seconds(const core::Decision& decision) {
  return static_cast<double>(decision.at) * 1e-9;
}

double PerToken(double sum, const sim::CapacityResult& r) {
  return r.output_tokens > 0 ? sum / r.output_tokens : 0;
}

}  // namespace

std::string HtmlText(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '<')
      out += "&lt;";
    else if (c == '>')
      out += "&gt;";
    else if (c == '&')
      out += "&amp;";
    else
      out += c;
  }
  return out;
}

std::string HtmlHead(const std::string& title) {
  return fmt::format(
      "<!doctype html><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">"
      "<title>{0}</title><style>body{{font:15px system-ui;max-width:960px;margin:2em auto;padding:0 1em}}"
      "svg{{width:100%;background:#f4f6f8}}polygon{{fill:#4a7fb5}}figure{{margin:.6em 0}}"
      "pre{{overflow:auto;font-size:13px}}td,th{{padding:.2em "
      ".8em;text-align:right}}td:first-child,th:first-child"
      "{{text-align:left}}tr:nth-child(even){{background:#f4f6f8}}</style><h1>{0}</h1>\n",
      HtmlText(title));
}

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
  std::string out = HtmlHead(title) + fmt::format("<pre>{}</pre>\n", HtmlText(CapacityTable(runs)));
  for (const auto& [name, r] : runs) {
    out += fmt::format("<h2>{}</h2>\n", HtmlText(name));
    out += Curve("Arrivals a second", r.samples, [](const auto& s) { return s.arrivals; });
    out += Curve("Devices", r.samples, [](const auto& s) { return s.devices; });
    out += Curve("Waiting requests", r.samples, [](const auto& s) { return s.waiting; });
    out += Curve("Running requests", r.samples, [](const auto& s) { return s.running; });
    out += Curve("SLO attainment", r.samples, [](const auto& s) { return s.attainment; });
    out += Curve("Worst TTFT, seconds", r.samples, [](const auto& s) { return s.worst_ttft_s; });
    out += Curve("Output tokens a second", r.samples, [](const auto& s) { return s.output_tokens; });
    out += "<ol>";
    for (const auto& [d, ready_s, done_s] : r.resizes)
      out += fmt::format("<li>{:.0f} s: {} to {}, {:.1f} s: {}</li>\n", Seconds(d), d.from, d.to,
                         std::max(0.0, done_s - Seconds(d)), HtmlText(d.reason));
    out += "</ol>\n";
  }
  return out;
}

}  // namespace elasticmoe::cli
