#include "cli/svg_curve.h"

#include <fmt/format.h>

#include <algorithm>

namespace elasticmoe::cli {

std::string HtmlEscaped(std::string_view text) {
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

std::string SvgCurve(std::string_view label, const std::vector<std::pair<double, double>>& curve) {
  constexpr double kWidth = 900, kHeight = 110;
  double most = 0;
  for (const auto& [at_s, value] : curve) most = std::max(most, value);
  const double end_s = std::max(1.0, curve.empty() ? 1.0 : curve.back().first);
  std::string points = fmt::format("0,{}", kHeight);
  double x = 0;
  for (const auto& [at_s, value] : curve) {
    x = at_s / end_s * kWidth;
    points +=
        fmt::format(" {:.1f},{:.1f}", x, kHeight - std::max(value, 0.0) / std::max(most, 1e-9) * kHeight);
  }
  points += fmt::format(" {:.1f},{}", x, kHeight);
  return fmt::format(
      "<figure><figcaption>{} <small>(0 to {:.4g}, over {:.0f} s)</small></figcaption><svg viewBox=\"0 0 {} "
      "{}\">"
      "<polygon points=\"{}\"/></svg></figure>\n",
      HtmlEscaped(label), most, end_s, kWidth, kHeight, points);
}

std::string CurvePageHead(std::string_view title) {
  return fmt::format(
      "<!doctype html><meta charset=\"utf-8\"><title>{0}</title><style>body{{font:15px "
      "system-ui;max-width:960px;margin:2em auto}}"
      "svg{{width:100%;background:#f4f6f8}}polygon{{fill:#4a7fb5}}figure{{margin:.6em "
      "0}}pre{{overflow:auto}}</style><h1>{0}</h1>",
      HtmlEscaped(title));
}

}  // namespace elasticmoe::cli
