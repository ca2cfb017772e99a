// Rows of published or measured numbers beside simulated ones.
#include <algorithm>
#include <array>
#include <cmath>

#include "cli/capacity_report.h"
#include "cli/svg_curve.h"

namespace elasticmoe::cli {
namespace {

std::string Number(double value) {
  if (value == 0) return "0";
  if (std::abs(value) >= 1000) return fmt::format("{:.0f}", value);
  return fmt::format("{:.{}f}", value, std::abs(value) >= 100 ? 1 : std::abs(value) >= 0.1 ? 2 : 4);
}

std::string Published(const ComparedRow& row) {
  if (!row.row.published) return "-";
  return row.row.bound.empty() ? Number(*row.row.published)
                               : row.row.bound + " " + Number(*row.row.published);
}

std::string DeviationText(const ComparedRow& row) {
  const std::optional<double> deviation = Deviation(row);
  if (!deviation) return "-";
  if (row.row.fitted) return "fitted";
  if (!row.row.bound.empty() && *deviation == 0) return "holds";
  return fmt::format("{:+.0f} %", *deviation * 100);
}

std::vector<std::array<std::string, 6>> Cells(const std::vector<ComparedRow>& rows) {
  std::vector<std::array<std::string, 6>> out;
  for (const ComparedRow& one : rows)
    out.push_back({one.row.name, one.row.unit, Published(one), Number(one.value.simulated),
                   DeviationText(one), Number(one.value.ours)});
  return out;
}

constexpr std::array<const char*, 6> kHead = {"row", "unit", "paper", "simulated", "deviation", "ours"};

}  // namespace

std::optional<double> Deviation(const ComparedRow& row) {
  if (!row.row.published) return {};
  const double published = *row.row.published, simulated = row.value.simulated;
  if (row.row.bound == ">=" && simulated >= published) return 0;
  if (row.row.bound == "<=" && simulated <= published) return 0;
  if (published == 0) return simulated == 0 ? 0.0 : 1.0;
  return simulated / published - 1;
}

std::string ComparisonTable(const std::vector<ComparedRow>& rows) {
  const auto cells = Cells(rows);
  std::size_t wide = 4, unit = 4;
  for (const auto& row : cells) wide = std::max(wide, row[0].size()), unit = std::max(unit, row[1].size());
  std::string out;
  const auto line = [&](const auto& row) {
    out += fmt::format("{:<{}}  {:<{}} {:>10} {:>10} {:>10} {:>10}\n", row[0], wide, row[1], unit, row[2],
                       row[3], row[4], row[5]);
  };
  line(kHead);
  for (const auto& row : cells) line(row);
  return out;
}

Json ComparisonJson(const std::vector<ComparedRow>& rows) {
  Json out = Json::array();
  for (const ComparedRow& one : rows) {
    Json row = {{"name", one.row.name},
                {"unit", one.row.unit},
                {"measure", std::string(sim::ToString(one.row.measure))},
                {"paper", one.row.published ? Json(*one.row.published) : Json()},
                {"simulated", one.value.simulated},
                {"ours", one.value.ours},
                {"fitted", one.row.fitted}};
    if (!one.row.bound.empty()) row["bound"] = one.row.bound;
    const std::optional<double> deviation = Deviation(one);
    row["deviation"] = deviation ? Json(*deviation) : Json();
    out.push_back(std::move(row));
  }
  return out;
}

std::string ComparisonHtml(const std::string& title, const std::vector<std::string>& notes,
                           const std::vector<ComparedRow>& rows) {
  std::string out =
      CurvePageHead(title) +
      "<style>td,th{padding:.2em .8em;text-align:right}td:first-child,th:first-child{text-align:left}"
      "tr:nth-child(even){background:var(--plot)}</style><table><tr>";
  for (const char* one : kHead) out += fmt::format("<th>{}</th>", one);
  out += "</tr>\n";
  for (const auto& row : Cells(rows)) {
    out += "<tr>";
    for (const std::string& cell : row) out += fmt::format("<td>{}</td>", HtmlEscaped(cell));
    out += "</tr>\n";
  }
  out += "</table>\n";
  for (const std::string& note : notes) out += fmt::format("<p>{}</p>\n", HtmlEscaped(note));
  return out;
}

std::string MeasuredTable(const std::vector<MeasuredRow>& rows) {
  std::string out =
      fmt::format("{:<34} {:<6} {:>10} {:>10} {:>10}\n", "", "unit", "measured", "simulated", "deviation");
  for (const MeasuredRow& one : rows)
    out += fmt::format("{:<34} {:<6} {:>10} {:>10} {:>+8.0f} %\n", one.name, one.unit, Number(one.measured),
                       Number(one.simulated), one.Deviation() * 100);
  return out;
}

Json MeasuredJson(const std::vector<MeasuredRow>& rows) {
  Json out = Json::array();
  for (const MeasuredRow& one : rows)
    out.push_back({{"name", one.name},
                   {"unit", one.unit},
                   {"measured", one.measured},
                   {"simulated", one.simulated},
                   {"deviation", one.Deviation()}});
  return out;
}

}  // namespace elasticmoe::cli
