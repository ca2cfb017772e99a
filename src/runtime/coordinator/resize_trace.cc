#include "runtime/coordinator/resize_trace.h"

#include <algorithm>
#include <map>

namespace elasticmoe::runtime {
namespace {

constexpr std::size_t kOperationsKept = 16;
constexpr std::size_t kSpansKept = 10'000;

}  // namespace

void ResizeTrace::Begin(const std::string& operation) {
  const std::scoped_lock lock(mutex_);
  if (!operations_.empty() && operations_.back().id == operation) return;
  operations_.push_back({operation, {}});
  if (operations_.size() > kOperationsKept) operations_.pop_front();
}

void ResizeTrace::Add(TraceSpan span) {
  const std::scoped_lock lock(mutex_);
  if (!operations_.empty() && operations_.back().spans.size() < kSpansKept)
    operations_.back().spans.push_back(std::move(span));
}

std::optional<Json> ResizeTrace::Find(const std::string& id) const {
  const std::scoped_lock lock(mutex_);
  const auto at = std::ranges::find(operations_, id, &Operation::id);
  if (at == operations_.end()) return std::nullopt;
  constexpr int kProcess = 1;
  Json events = Json::array();
  events.push_back({{"ph", "M"},
                    {"name", "process_name"},
                    {"pid", kProcess},
                    {"tid", 0},
                    {"args", {{"name", "resize " + id}}}});
  TimeNs origin = 0;
  for (const TraceSpan& span : at->spans) origin = origin == 0 ? span.begin : std::min(origin, span.begin);
  const auto microseconds = [](TimeNs ns) { return static_cast<double>(ns) / 1e3; };
  std::map<std::string, int> lanes;
  for (const TraceSpan& span : at->spans) {
    const auto [lane, fresh] = lanes.emplace(span.lane, static_cast<int>(lanes.size()) + 1);
    if (fresh)
      events.push_back({{"ph", "M"},
                        {"name", "thread_name"},
                        {"pid", kProcess},
                        {"tid", lane->second},
                        {"args", {{"name", span.lane}}}});
    Json event = {{"name", span.name},
                  {"cat", "resize"},
                  {"pid", kProcess},
                  {"tid", lane->second},
                  {"ts", microseconds(span.begin - origin)},
                  {"args", span.args}};
    if (span.end > span.begin) {
      event["ph"] = "X";
      event["dur"] = microseconds(span.end - span.begin);
    } else {
      event["ph"] = "i";
      event["s"] = "p";
    }
    events.push_back(std::move(event));
  }
  return Json{{"traceEvents", events}, {"displayTimeUnit", "ms"}};
}

}  // namespace elasticmoe::runtime
