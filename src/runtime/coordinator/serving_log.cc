#include "runtime/coordinator/serving_log.h"

#include <utility>

namespace elasticmoe::runtime {
namespace {

// A second or more of the fastest model at the most requests; whoever looks less often loses the oldest.
constexpr std::size_t kKept = 4096, kResizesKept = 64;

template <class T>
void Keep(std::deque<T>& entries, T entry, std::size_t kept = kKept) {
  entries.push_back(std::move(entry));
  if (entries.size() > kept) entries.pop_front();
}

}  // namespace

void ServingLog::Arrived(RequestId request, TimeNs at, int prompt_tokens) {
  const std::scoped_lock lock(mutex_);
  requests_[request] = {.arrived = at, .prompt_tokens = prompt_tokens};
  waiting_prompt_tokens_ += prompt_tokens;
  Keep(batch_.arrivals, {at, prompt_tokens});
}

void ServingLog::Refused(RequestId request, TimeNs at, bool failed) {
  const std::scoped_lock lock(mutex_);
  const auto found = requests_.find(request);
  if (found == requests_.end()) return;
  waiting_prompt_tokens_ -= found->second.prompt_tokens;
  if (!failed && !batch_.arrivals.empty() && batch_.arrivals.back().at == found->second.arrived)
    batch_.arrivals.pop_back();
  requests_.erase(found);
  if (failed) Keep(batch_.outcomes, {.at = at, .failed = true});
}

void ServingLog::Event(const core::TokenEvent& event, TimeNs at) {
  const std::scoped_lock lock(mutex_);
  const auto found = requests_.find(event.request);
  if (found == requests_.end()) return;
  Request& request = found->second;
  const auto waits_no_more = [&] {
    if (request.first == 0) waiting_prompt_tokens_ -= request.prompt_tokens;
  };
  if (!event.tokens.empty()) {
    waits_no_more();
    if (request.first == 0) request.first = at;
    request.last = at;
    request.output_tokens += static_cast<int>(event.tokens.size());
    sums_.output_tokens += event.tokens.size();
  }
  if (!event.finish) return;
  waits_no_more();
  ++sums_.requests;
  // A client that went away says nothing about our limits.
  if (*event.finish != core::FinishReason::kAbort) {
    core::RequestOutcome outcome{.at = at, .output_tokens = request.output_tokens};
    outcome.failed = *event.finish == core::FinishReason::kError;
    outcome.ttft_s = static_cast<double>((request.first == 0 ? at : request.first) - request.arrived) * 1e-9;
    if (request.output_tokens > 1)
      outcome.tpot_s = static_cast<double>(request.last - request.first) * 1e-9 / (request.output_tokens - 1);
    Keep(batch_.outcomes, outcome);
  }
  requests_.erase(found);
}

void ServingLog::Stepped(const core::StepShape& shape, double seconds) {
  const std::scoped_lock lock(mutex_);
  sums_.busy_device_s += seconds * shape.devices;
  Keep(batch_.steps, {shape, seconds});
}

void ServingLog::Resized(const core::ResizeReport& report) {
  const std::scoped_lock lock(mutex_);
  Keep(batch_.resizes, report, kResizesKept);
}

ServingLog::Batch ServingLog::Take() {
  const std::scoped_lock lock(mutex_);
  return std::exchange(batch_, {});
}

double ServingLog::WaitingPromptTokens() const {
  const std::scoped_lock lock(mutex_);
  return waiting_prompt_tokens_;
}

ServingLog::Totals ServingLog::Sums() const {
  const std::scoped_lock lock(mutex_);
  return sums_;
}

}  // namespace elasticmoe::runtime
