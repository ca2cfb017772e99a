#include "cli/load_plan.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <iterator>

#include "base/check.h"
#include "base/hash.h"
#include "base/rng.h"

namespace elasticmoe::cli {
namespace {

constexpr std::string_view kWords[] = {
    "the",  "of",   "and",  "to",  "in",  "that",  "was",  "his",  "he",  "it",    "with",  "is",    "for",
    "as",   "had",  "you",  "not", "be",  "her",   "on",   "at",   "by",  "which", "have",  "or",    "from",
    "this", "him",  "but",  "all", "she", "they",  "were", "my",   "are", "me",    "one",   "their", "so",
    "an",   "said", "them", "we",  "who", "would", "been", "will", "no",  "when",  "there", "if",    "more",
    "out",  "up",   "into", "do",  "any", "your",  "what", "has",  "man", "could", "other", "than"};

// Streams of numbers that one seed gives, apart from each other.
enum class Stream : std::uint64_t { kInputLength = 1, kOutputLength, kPrompt, kArrival };

std::uint64_t SeedOf(std::uint64_t seed, Stream stream) {
  return HashCombine(seed, static_cast<std::uint64_t>(stream));
}

int Draw(const TokenRange& range, std::uint64_t seed, std::uint64_t index) {
  const auto span = static_cast<std::uint64_t>(range.max - range.min) + 1;
  return range.min + static_cast<int>(RandomAt(seed, index) % span);
}

template <class T>
bool ParseNumber(std::string_view text, T& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size();
}

}  // namespace

Expected<TokenRange> ParseTokenRange(std::string_view text) {
  const std::size_t dash = std::min(text.find('-'), text.size());
  TokenRange range;
  bool good = ParseNumber(text.substr(0, dash), range.min);
  range.max = range.min;
  if (dash < text.size()) good = ParseNumber(text.substr(dash + 1), range.max) && good;
  constexpr int kMost = 10'000'000;  // beyond any context; keeps sums of two in 32 bits
  if (!good || range.min < 1 || range.max < range.min || range.max > kMost)
    return Fail(ErrorCode::kInvalidArgument,
                "reading a range of tokens: '{}' is not N or MIN-MAX with 1 <= MIN <= MAX <= {}", text,
                kMost);
  return range;
}

Expected<std::vector<RateStep>> ParseRateSchedule(std::string_view text) {
  std::vector<RateStep> schedule;
  while (!text.empty()) {
    const std::size_t comma = std::min(text.find(','), text.size());
    const std::string_view item = text.substr(0, comma);
    const std::size_t colon = std::min(item.find(':'), item.size());
    RateStep step;
    if (colon == item.size() || !ParseNumber(item.substr(0, colon), step.per_s) ||
        !ParseNumber(item.substr(colon + 1), step.seconds) || !(step.per_s >= 0 && step.per_s <= 1e6) ||
        !(step.seconds > 0 && step.seconds <= 1e7))
      return Fail(ErrorCode::kInvalidArgument,
                  "reading a rate schedule: '{}' is not RATE:SECONDS; give for example 4:30,16:10,4:30",
                  item);
    schedule.push_back(step);
    text.remove_prefix(std::min(comma + 1, text.size()));
  }
  if (schedule.empty()) return Fail(ErrorCode::kInvalidArgument, "reading a rate schedule: it is empty");
  return schedule;
}

RequestLength LengthOf(const LoadShape& shape, std::uint64_t index) {
  RequestLength length;
  if (shape.trace.empty()) {
    length.input_tokens = Draw(shape.input, SeedOf(shape.seed, Stream::kInputLength), index);
    length.output_tokens = Draw(shape.output, SeedOf(shape.seed, Stream::kOutputLength), index);
  } else {
    const TraceRow& row = shape.trace[index % shape.trace.size()];
    length = {row.context_tokens, row.generated_tokens};
    if (shape.trace_max_tokens > 0) {
      length.input_tokens = std::min(length.input_tokens, shape.trace_max_tokens);
      length.output_tokens = std::min(length.output_tokens, shape.trace_max_tokens);
    }
  }
  length.input_tokens = std::max(length.input_tokens, 1);
  length.output_tokens = std::max(length.output_tokens, 1);
  return length;
}

std::vector<TokenId> PromptIds(const LoadShape& shape, std::uint64_t index, int tokens) {
  EM_CHECK(shape.end_id > shape.first_id && shape.first_id >= 0, "first={} end={}", shape.first_id,
           shape.end_id);
  const std::uint64_t seed = HashCombine(SeedOf(shape.seed, Stream::kPrompt), index);
  const auto span = static_cast<std::uint64_t>(shape.end_id - shape.first_id);
  std::vector<TokenId> ids(static_cast<std::size_t>(tokens));
  for (std::size_t i = 0; i < ids.size(); ++i)
    ids[i] = shape.first_id + static_cast<TokenId>(RandomAt(seed, i) % span);
  return ids;
}

std::string PromptText(const LoadShape& shape, std::uint64_t index, int words) {
  const std::uint64_t seed = HashCombine(SeedOf(shape.seed, Stream::kPrompt), index);
  std::string text;
  for (int i = 0; i < words; ++i) {
    if (i > 0) text += ' ';
    text += kWords[RandomAt(seed, static_cast<std::uint64_t>(i)) % std::size(kWords)];
  }
  return text;
}

Arrivals Arrivals::Poisson(std::vector<RateStep> schedule, std::uint64_t seed) {
  Arrivals arrivals;
  arrivals.schedule_ = std::move(schedule);
  arrivals.seed_ = SeedOf(seed, Stream::kArrival);
  return arrivals;
}

Arrivals Arrivals::FromTrace(const LoadShape& shape) {
  Arrivals arrivals;
  for (const TraceRow& row : shape.trace)
    arrivals.times_.push_back(static_cast<TimeNs>(static_cast<double>(row.at_ns) / shape.trace_speed));
  return arrivals;
}

std::optional<TimeNs> Arrivals::Next() {
  if (!times_.empty()) return drawn_ < times_.size() ? std::optional(times_[drawn_++]) : std::nullopt;
  // An exponential step of the unit process, walked through the rates: what a step does not use up is carried
  // over.
  double left = -std::log1p(-UniformAt(seed_, drawn_++));
  for (; step_ < schedule_.size(); ++step_) {
    const RateStep& step = schedule_[step_];
    const double end_s = step_start_s_ + step.seconds;
    const double expected = (end_s - now_s_) * step.per_s;
    if (left < expected) {
      now_s_ += left / step.per_s;
      return static_cast<TimeNs>(now_s_ * 1e9);
    }
    left -= expected;
    now_s_ = step_start_s_ = end_s;
  }
  return std::nullopt;
}

}  // namespace elasticmoe::cli
