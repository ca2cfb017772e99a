// What the load is: arrivals and token lengths over the past, in bins. Pure; not thread-safe.
#pragma once

#include <cstdint>
#include <deque>

#include "base/ids.h"

namespace elasticmoe::core {

struct Load {
  double requests_s = 0;     // arrivals a second
  double prompt_tokens = 0;  // mean of a request
  double output_tokens = 0;  // mean of a request
  double prompt_square = 0;  // mean of the square: long prompts make others wait
};

class LoadEstimator {
 public:
  // Keeps `keep_ns` of history in bins of `bin_ns`. REQUIRES: 0 < bin_ns <= keep_ns.
  LoadEstimator(TimeNs bin_ns, TimeNs keep_ns);

  void Arrived(TimeNs at, int prompt_tokens);
  void Finished(int output_tokens);
  void Advance(TimeNs now);

  // The load of the last `window_ns`, as high as `sigmas` standard deviations of a Poisson count allow:
  // (count + sigmas * sqrt(count)) / window. Time before the start counts as time without arrivals. Lengths
  // are means of the last few hundred requests, so that a few odd ones are no change.
  Load Upper(TimeNs now, TimeNs window_ns, double sigmas) const;
  // The load lately, over the longest past that agrees with its shorter ones: `shortest_ns`, twice that, ...
  // up to `longest_ns`. Two agree if their rates differ by no more than three standard deviations of
  // the shorter one (Lepski's choice of a bandwidth). So a steady load is known well, and a change is
  // believed before it has filled a window. `sigmas` as in Upper.
  Load Lately(TimeNs now, TimeNs shortest_ns, TimeNs longest_ns, double sigmas) const;
  // The highest Upper of any window of `window_ns` that ended within the last `since_ns`.
  Load Highest(TimeNs now, TimeNs window_ns, TimeNs since_ns, double sigmas) const;
  // Variance over mean of the arrivals lately: of 64 spans of eight bins, by the differences of neighbours,
  // so that a trend is none. 1 or more: a Poisson process has 1, clumps have more.
  double Dispersion(TimeNs now) const;
  TimeNs SinceLastArrival(TimeNs now) const;  // since the start where none came

 private:
  struct Bin {
    std::int64_t index = 0;
    std::uint64_t count = 0;
  };
  std::uint64_t CountIn(std::int64_t first, std::int64_t last) const;  // inclusive
  Load WithRate(double requests_s) const;

  TimeNs bin_ns_, keep_ns_;
  std::deque<Bin> bins_;  // those with arrivals
  TimeNs first_ = -1, last_arrival_ = -1;
  // Means that fade by the request: the last few hundred requests say what the next one is like.
  double prompt_ = 0, prompt_square_ = 0, output_ = 0;
  std::uint64_t prompts_ = 0, outputs_ = 0;
};

}  // namespace elasticmoe::core
