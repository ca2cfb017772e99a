// A curve over time as inline SVG, for pages that load nothing; they follow the reader's light or dark
// scheme. Pure.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace elasticmoe::cli {

// Text with what HTML would read as markup escaped.
std::string HtmlEscaped(std::string_view text);

struct Curve {
  std::string label, unit;                          // the unit stands behind the label, empty: none
  std::vector<std::pair<double, double>> points{};  // [seconds, value], by time; below zero is drawn as zero
  bool steps = false;             // a value holds until the next, as a number of devices does
  std::optional<double> limit{};  // a line across, as of an SLO
  std::optional<double> top{};    // of the axis; without, a round number above all points
  std::vector<std::pair<double, double>> shaded{};  // [from, to] in seconds
};

// A figure with axes: `label`, ticks, and the area below the points.
std::string SvgCurve(const Curve& curve);

// The head of such a page, with the styles of its curves, and its title. Figures within <div class="curves">
// stand side by side where there is room.
std::string CurvePageHead(std::string_view title);

}  // namespace elasticmoe::cli
