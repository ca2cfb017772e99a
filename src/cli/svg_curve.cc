#include "cli/svg_curve.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace elasticmoe::cli {
namespace {

// Of the picture, in its own units; the plot lies right of and above the ticks' numbers.
constexpr double kWidth = 520, kHeight = 150, kLeft = 46, kRight = 12, kTop = 8, kBottom = 20;
constexpr double kPlotWidth = kWidth - kLeft - kRight, kPlotHeight = kHeight - kTop - kBottom;
constexpr double kTicksUp = 4, kTicksAlong = 7;  // about as many

// 1, 2 or 5 times a power of ten, so that about `ticks` of them make `range`.
double TickStep(double range, double ticks) {
  const double rough = std::max(range, 1e-12) / ticks;
  const double power = std::pow(10.0, std::floor(std::log10(rough)));
  for (const double times : {1.0, 2.0, 5.0})
    if (rough <= times * power * (1 + 1e-9)) return times * power;
  return 10 * power;
}

// Of a time axis: also parts of minutes and hours.
double TimeStep(double range_s, double ticks) {
  for (const double step : {60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0, 7200.0, 21600.0})
    if (range_s > 300 && range_s / ticks <= step) return step;
  return range_s > 300 ? 86400.0 : TickStep(range_s, ticks);
}

std::string TimeText(double at_s, double step_s) {
  if (at_s == 0) return "0";
  if (step_s >= 3600) return fmt::format("{:.4g} h", at_s / 3600);
  if (step_s >= 60) return fmt::format("{:.4g} min", at_s / 60);
  return fmt::format("{:.4g} s", at_s);
}

std::string NumberText(double value) {
  return value >= 10'000 ? fmt::format("{:.4g}k", value / 1000) : fmt::format("{:.4g}", value);
}

}  // namespace

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

std::string SvgCurve(const Curve& curve) {
  double most = curve.limit.value_or(0);
  for (const auto& [at_s, value] : curve.points) most = std::max(most, value);
  if (most <= 0) most = 1;
  const double step_up = TickStep(curve.top.value_or(most), kTicksUp);
  const double top = curve.top.value_or(std::ceil(most / step_up - 1e-9) * step_up);
  const double end_s = curve.points.empty() || curve.points.back().first <= 0 ? 1 : curve.points.back().first;
  const auto x = [&](double at_s) { return kLeft + std::clamp(at_s / end_s, 0.0, 1.0) * kPlotWidth; };
  const auto y = [&](double value) { return kTop + (1 - std::clamp(value / top, 0.0, 1.0)) * kPlotHeight; };
  const double floor = kTop + kPlotHeight;

  std::string out =
      fmt::format("<figure><figcaption>{}{}</figcaption><svg viewBox=\"0 0 {} {}\" role=\"img\">",
                  HtmlEscaped(curve.label),
                  curve.unit.empty() ? "" : fmt::format(" <small>[{}]</small>", HtmlEscaped(curve.unit)),
                  kWidth, kHeight);
  for (const auto& [from_s, to_s] : curve.shaded)
    out += fmt::format("<rect class=\"shade\" x=\"{:.1f}\" y=\"{}\" width=\"{:.1f}\" height=\"{}\"/>",
                       x(from_s), kTop, x(to_s) - x(from_s), kPlotHeight);
  for (double value = 0; value <= top * (1 + 1e-9); value += step_up)
    out += fmt::format(
        "<path class=\"grid\" d=\"M{} {:.1f}H{}\"/><text x=\"{}\" y=\"{:.1f}\" "
        "text-anchor=\"end\">{}</text>",
        kLeft, y(value), kWidth - kRight, kLeft - 5, y(value) + 3.5, NumberText(value));
  const double step_s = TimeStep(end_s, kTicksAlong);
  for (double at_s = 0; at_s <= end_s * (1 + 1e-9); at_s += step_s)
    out += fmt::format(
        "<path class=\"grid\" d=\"M{0:.1f} {1}V{2}\"/><text x=\"{0:.1f}\" y=\"{3}\" "
        "text-anchor=\"{4}\">{5}</text>",
        x(at_s), kTop, floor, kHeight - 5, at_s > 0.97 * end_s ? "end" : "middle", TimeText(at_s, step_s));
  std::string points =
      fmt::format("{:.1f},{}", curve.points.empty() ? kLeft : x(curve.points.front().first), floor);
  std::optional<double> last;
  for (const auto& [at_s, value] : curve.points) {
    if (curve.steps && last) points += fmt::format(" {:.1f},{:.1f}", x(at_s), *last);
    last = y(value);
    points += fmt::format(" {:.1f},{:.1f}", x(at_s), *last);
  }
  points += fmt::format(" {:.1f},{}", curve.points.empty() ? kLeft : x(curve.points.back().first), floor);
  out += fmt::format("<polygon points=\"{}\"/>", points);
  if (curve.limit)
    out +=
        fmt::format("<path class=\"limit\" d=\"M{} {:.1f}H{}\"/>", kLeft, y(*curve.limit), kWidth - kRight);
  return out + "</svg></figure>\n";
}

std::string CurvePageHead(std::string_view title) {
  return fmt::format(
      R"(<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{0}</title><style>
:root{{color-scheme:light dark;--text:#1d2733;--dim:#5b6775;--back:#fff;--plot:#f5f7f9;--grid:#dde3e9;--curve:#2f6fb0;--limit:#c0392b;--shade:#f3d9a4}}
@media(prefers-color-scheme:dark){{:root{{--text:#dfe6ee;--dim:#94a1b0;--back:#14191f;--plot:#1c232b;--grid:#303a45;--curve:#5b9bd8;--limit:#ff7b6b;--shade:#4d4023}}}}
body{{font:15px/1.45 system-ui,sans-serif;color:var(--text);background:var(--back);max-width:1120px;margin:2em auto;padding:0 1em}}
h1{{font-size:1.35em}}h2{{font-size:1.1em;margin:1.6em 0 .4em;border-top:1px solid var(--grid);padding-top:.8em}}
pre{{overflow:auto;font-size:12.5px;background:var(--plot);padding:.8em}}
.curves{{display:grid;grid-template-columns:repeat(auto-fit,minmax(400px,1fr));gap:.8em 1.2em}}
figure{{margin:0}}figcaption{{margin-bottom:.2em}}small{{color:var(--dim)}}
svg{{width:100%;background:var(--plot);display:block}}svg text{{font:10px system-ui,sans-serif;fill:var(--dim)}}
.grid{{stroke:var(--grid);stroke-width:.7}}.shade{{fill:var(--shade)}}
polygon{{fill:var(--curve);fill-opacity:.3;stroke:var(--curve);stroke-width:1.1;stroke-linejoin:round}}
.limit{{stroke:var(--limit);stroke-width:1.1;stroke-dasharray:5 3}}
ol{{font-size:13px;color:var(--dim)}}table{{border-collapse:collapse;font-size:13px}}td,th{{padding:.25em .6em}}
</style><h1>{0}</h1>
)",
      HtmlEscaped(title));
}

}  // namespace elasticmoe::cli
