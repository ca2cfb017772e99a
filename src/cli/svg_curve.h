// A curve over time as inline SVG, for pages that load nothing. Pure.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace elasticmoe::cli {

// Text with what HTML would read as markup escaped.
std::string HtmlEscaped(std::string_view text);

// A figure: `label`, the range, and the area below points of [seconds, value], by time. Values below zero are
// drawn as zero.
std::string SvgCurve(std::string_view label, const std::vector<std::pair<double, double>>& points);

// The head of such a page, with the styles of its curves, and its title.
std::string CurvePageHead(std::string_view title);

}  // namespace elasticmoe::cli
