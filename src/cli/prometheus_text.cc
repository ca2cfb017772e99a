#include "cli/prometheus_text.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>

namespace elasticmoe::cli {
namespace {

void SkipBlanks(std::string_view& text) {
  while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) text.remove_prefix(1);
}

bool IsNameByte(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == ':';
}

std::string TakeName(std::string_view& text) {
  std::size_t n = 0;
  while (n < text.size() && IsNameByte(text[n])) ++n;
  std::string name(text.substr(0, n));
  text.remove_prefix(n);
  return name;
}

// A quoted label value with its escapes \\ \" \n undone.
std::optional<std::string> TakeQuoted(std::string_view& text) {
  if (!text.starts_with('"')) return std::nullopt;
  std::string value;
  for (std::size_t i = 1; i < text.size(); ++i) {
    if (text[i] == '"') {
      text.remove_prefix(i + 1);
      return value;
    }
    if (text[i] == '\\' && i + 1 < text.size()) {
      ++i;
      value += text[i] == 'n' ? '\n' : text[i];
    } else {
      value += text[i];
    }
  }
  return std::nullopt;
}

bool TakeLabels(std::string_view& text, std::map<std::string, std::string>& labels) {
  text.remove_prefix(1);  // '{'
  for (;;) {
    SkipBlanks(text);
    if (text.starts_with('}')) {
      text.remove_prefix(1);
      return true;
    }
    std::string name = TakeName(text);
    SkipBlanks(text);
    if (name.empty() || !text.starts_with('=')) return false;
    text.remove_prefix(1);
    SkipBlanks(text);
    auto value = TakeQuoted(text);
    if (!value) return false;
    labels[std::move(name)] = *std::move(value);
    SkipBlanks(text);
    if (text.starts_with(','))
      text.remove_prefix(1);
    else if (!text.starts_with('}'))
      return false;
  }
}

std::optional<double> ParseValue(std::string_view text) {
  if (text.starts_with('+')) text.remove_prefix(1);
  if (text == "Inf") return std::numeric_limits<double>::infinity();
  if (text == "-Inf") return -std::numeric_limits<double>::infinity();
  if (text == "NaN") return std::nan("");
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::optional<MetricSample> ParseLine(std::string_view line) {
  MetricSample sample;
  sample.name = TakeName(line);
  if (sample.name.empty()) return std::nullopt;
  SkipBlanks(line);
  if (line.starts_with('{') && !TakeLabels(line, sample.labels)) return std::nullopt;
  SkipBlanks(line);
  const auto value = ParseValue(line.substr(0, std::min(line.find_first_of(" \t"), line.size())));
  if (!value) return std::nullopt;
  sample.value = *value;
  return sample;
}

}  // namespace

Expected<std::vector<MetricSample>> ParsePrometheusText(std::string_view text) {
  std::vector<MetricSample> samples;
  for (int number = 1; !text.empty(); ++number) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    std::string_view line = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    if (line.ends_with('\r')) line.remove_suffix(1);
    SkipBlanks(line);
    if (line.empty() || line.front() == '#') continue;
    auto sample = ParseLine(line);
    if (!sample)
      return Fail(ErrorCode::kInvalidArgument, "reading metrics: line {} is not 'name{{labels}} value': '{}'",
                  number, line.substr(0, 80));
    samples.push_back(*std::move(sample));
  }
  return samples;
}

std::optional<double> SumOf(const std::vector<MetricSample>& samples, std::string_view name) {
  std::optional<double> sum;
  for (const MetricSample& sample : samples)
    if (sample.name == name) sum = sum.value_or(0) + sample.value;
  return sum;
}

}  // namespace elasticmoe::cli
