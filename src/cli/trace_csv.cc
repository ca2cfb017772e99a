#include "cli/trace_csv.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <optional>

namespace elasticmoe::cli {
namespace {

constexpr std::int64_t kSecond = 1'000'000'000;
// Times within +-136 years of their origin: differences and sums of two of them fit in 64 bits.
constexpr double kMaxSeconds = 4.2e9;

std::string_view Trim(std::string_view text) {
  while (!text.empty() && (text.front() == ' ' || text.front() == '"')) text.remove_prefix(1);
  while (!text.empty() && (text.back() == ' ' || text.back() == '"' || text.back() == '\r'))
    text.remove_suffix(1);
  return text;
}

// Takes `digits` decimal digits from the front.
std::optional<int> Digits(std::string_view& text, std::size_t digits) {
  if (text.size() < digits) return std::nullopt;
  int value = 0;
  for (const char c : text.substr(0, digits)) {
    if (c < '0' || c > '9') return std::nullopt;
    value = value * 10 + (c - '0');
  }
  text.remove_prefix(digits);
  return value;
}

bool Take(std::string_view& text, std::string_view any_of) {
  if (text.empty() || any_of.find(text.front()) == any_of.npos) return false;
  text.remove_prefix(1);
  return true;
}

// Days since 1970-01-01 of the Gregorian calendar (Howard Hinnant, "days_from_civil").
std::int64_t Days(int year, int month, int day) {
  year -= month <= 2;
  const int era = year / 400;
  const int year_of_era = year - era * 400;
  const int day_of_year = (153 * (month + (month > 2 ? -3 : 9)) + 2) / 5 + day - 1;
  const int day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
  return std::int64_t{era} * 146097 + day_of_era - 719468;
}

std::optional<TimeNs> CalendarTime(std::string_view text) {
  const auto year = Digits(text, 4);
  if (!year || *year < 1900 || *year > 2100 || !Take(text, "-")) return std::nullopt;
  const auto month = Digits(text, 2);
  if (!month || *month < 1 || *month > 12 || !Take(text, "-")) return std::nullopt;
  const auto day = Digits(text, 2);
  if (!day || *day < 1 || *day > 31 || !Take(text, " T")) return std::nullopt;
  const auto hour = Digits(text, 2);
  if (!hour || *hour > 23 || !Take(text, ":")) return std::nullopt;
  const auto minute = Digits(text, 2);
  if (!minute || *minute > 59 || !Take(text, ":")) return std::nullopt;
  const auto second = Digits(text, 2);
  if (!second || *second > 60) return std::nullopt;
  std::int64_t nanoseconds = 0;
  if (Take(text, ".")) {
    std::int64_t unit = kSecond / 10;
    if (text.empty()) return std::nullopt;
    while (auto digit = Digits(text, 1)) {
      nanoseconds += *digit * unit;
      unit /= 10;
    }
  }
  if (!text.empty() && text != "Z" && text != "+00:00") return std::nullopt;
  return (Days(*year, *month, *day) * 86400 + *hour * 3600 + *minute * 60 + *second) * kSecond + nanoseconds;
}

std::optional<TimeNs> ParseTime(std::string_view text) {
  double seconds = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), seconds);
  if (error == std::errc() && end == text.data() + text.size()) {
    if (!(std::abs(seconds) <= kMaxSeconds)) return std::nullopt;
    return std::llround(seconds * 1e9);
  }
  return CalendarTime(text);
}

std::optional<int> ParseCount(std::string_view text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0) return std::nullopt;
  return value;
}

// The fields of `line` at `columns`; the field is empty where the line is too short.
std::array<std::string_view, 3> Fields(std::string_view line, const std::array<int, 3>& columns) {
  std::array<std::string_view, 3> fields;
  for (int column = 0;; ++column) {
    const std::size_t comma = std::min(line.find(','), line.size());
    for (std::size_t i = 0; i < 3; ++i)
      if (columns[i] == column) fields[i] = Trim(line.substr(0, comma));
    if (comma == line.size()) return fields;
    line.remove_prefix(comma + 1);
  }
}

Expected<std::array<int, 3>> ReadHeader(std::string_view line) {
  constexpr std::array<std::string_view, 3> kNames = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"};
  std::array<int, 3> columns = {-1, -1, -1};
  std::string_view rest = line;
  for (int column = 0;; ++column) {
    const std::size_t comma = std::min(rest.find(','), rest.size());
    for (std::size_t i = 0; i < 3; ++i)
      if (Trim(rest.substr(0, comma)) == kNames[i]) columns[i] = column;
    if (comma == rest.size()) break;
    rest.remove_prefix(comma + 1);
  }
  for (std::size_t i = 0; i < 3; ++i)
    if (columns[i] < 0)
      return Fail(ErrorCode::kInvalidArgument,
                  "reading a trace: line 1 names no column {} (found '{}'); the header must be "
                  "TIMESTAMP,ContextTokens,GeneratedTokens",
                  kNames[i], line.substr(0, 80));
  return columns;
}

}  // namespace

Expected<std::vector<TraceRow>> ParseTraceCsv(std::string_view text) {
  if (text.starts_with("\xEF\xBB\xBF")) text.remove_prefix(3);
  std::vector<TraceRow> rows;
  std::array<int, 3> columns{};
  for (int number = 1; !text.empty(); ++number) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    const std::string_view line = Trim(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
    if (number == 1) {
      EM_ASSIGN_OR_RETURN(columns, ReadHeader(line));
      continue;
    }
    if (line.empty()) continue;
    const auto [time, context, generated] = Fields(line, columns);
    const auto refuse = [&](std::string_view column, std::string_view found, std::string_view want) {
      return Fail(ErrorCode::kInvalidArgument, "reading a trace: line {}: {}='{}' is not {}", number, column,
                  found.substr(0, 80), want);
    };
    const auto at_ns = ParseTime(time);
    if (!at_ns) return refuse("TIMESTAMP", time, "a time (YYYY-MM-DD hh:mm:ss.fraction, or seconds)");
    const auto context_tokens = ParseCount(context);
    if (!context_tokens) return refuse("ContextTokens", context, "a count of tokens");
    const auto generated_tokens = ParseCount(generated);
    if (!generated_tokens) return refuse("GeneratedTokens", generated, "a count of tokens");
    rows.push_back({*at_ns, *context_tokens, *generated_tokens});
  }
  if (rows.empty()) return Fail(ErrorCode::kInvalidArgument, "reading a trace: it holds no request");
  std::ranges::stable_sort(rows, {}, &TraceRow::at_ns);
  const TimeNs first = rows.front().at_ns;
  for (TraceRow& row : rows) row.at_ns -= first;
  return rows;
}

}  // namespace elasticmoe::cli
