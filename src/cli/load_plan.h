// What a load asks of a server, decided by a seed before anything is sent: how many tokens the n-th request
// brings and wants, which ones, and when it comes. Two runs with one plan send the same requests. Pure.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/ids.h"
#include "cli/trace_csv.h"

namespace elasticmoe::cli {

struct TokenRange {
  int min = 0;
  int max = 0;  // inclusive
};

// "128" or "64-256". kInvalidArgument otherwise.
Expected<TokenRange> ParseTokenRange(std::string_view text);

// `per_s` requests a second for `seconds`; the arrivals of a rate of 0 are none.
struct RateStep {
  double per_s = 0;
  double seconds = 0;
};

// "4:30,16:10,4:30": requests a second, and for how many seconds.
Expected<std::vector<RateStep>> ParseRateSchedule(std::string_view text);

struct LoadShape {
  std::uint64_t seed = 0;
  TokenRange input{128, 128};
  TokenRange output{128, 128};
  TokenId first_id = 100;  // prompts draw their ids from [first_id, end_id)
  TokenId end_id = 2000;
  std::vector<TraceRow> trace;  // lengths and times of the requests, instead of the ranges and the schedule
  double trace_speed = 1;       // 2 = twice as fast
  int trace_max_tokens = 0;     // prompt and output are cut to it; 0 = as they are
};

struct RequestLength {
  int input_tokens = 0;   // at least 1
  int output_tokens = 0;  // at least 1
};

// Of request `index`; a trace begins anew after its end.
RequestLength LengthOf(const LoadShape& shape, std::uint64_t index);

std::vector<TokenId> PromptIds(const LoadShape& shape, std::uint64_t index, int tokens);
// `words` common English words, which most vocabularies hold as one token each.
std::string PromptText(const LoadShape& shape, std::uint64_t index, int words);

// Arrival times of an open loop, in nanoseconds after its start, in order.
class Arrivals {
 public:
  // A Poisson process whose rate follows `schedule`; it ends with the last step.
  static Arrivals Poisson(std::vector<RateStep> schedule, std::uint64_t seed);
  // As the trace says, once.
  static Arrivals FromTrace(const LoadShape& shape);

  std::optional<TimeNs> Next();

 private:
  std::vector<RateStep> schedule_;
  std::vector<TimeNs> times_;
  std::uint64_t seed_ = 0;
  std::uint64_t drawn_ = 0;
  std::size_t step_ = 0;
  double step_start_s_ = 0;
  double now_s_ = 0;
};

}  // namespace elasticmoe::cli
