// What requests and steps have come to since somebody last looked: what the autoscaler learns from, and the
// totals that costs are told by. Thread-safe; holds a bounded number of each, the oldest are dropped.
#pragma once

#include <deque>
#include <map>
#include <mutex>
#include <vector>

#include "core/control/resize_values.h"
#include "core/policy/autoscaler.h"
#include "core/policy/step_cost.h"
#include "core/request.h"

namespace elasticmoe::runtime {

class ServingLog {
 public:
  struct Arrival {
    TimeNs at = 0;
    int prompt_tokens = 0;
  };
  struct Step {
    core::StepShape shape;
    double seconds = 0;
  };
  struct Batch {
    std::deque<Arrival> arrivals;
    std::deque<core::RequestOutcome> outcomes;
    std::deque<Step> steps;
    std::deque<core::ResizeReport> resizes;  // that ended
  };
  struct Totals {
    std::uint64_t requests = 0;  // that ended
    std::uint64_t output_tokens = 0;
    double busy_device_s = 0;
  };

  void Arrived(RequestId request, TimeNs at, int prompt_tokens);
  // It will have no events: `failed` where that is ours to answer for (an outcome), else it never was.
  void Refused(RequestId request, TimeNs at, bool failed);
  void Event(const core::TokenEvent& event, TimeNs at);  // of requests that have arrived; others are ignored
  void Stepped(const core::StepShape& shape, double seconds);
  void Resized(const core::ResizeReport& report);

  Batch Take();
  double WaitingPromptTokens() const;  // of requests without a first token
  Totals Sums() const;

 private:
  struct Request {
    TimeNs arrived = 0, first = 0, last = 0;
    int prompt_tokens = 0, output_tokens = 0;
  };

  mutable std::mutex mutex_;
  std::map<RequestId, Request> requests_;
  Batch batch_;
  Totals sums_;
  double waiting_prompt_tokens_ = 0;
};

}  // namespace elasticmoe::runtime
