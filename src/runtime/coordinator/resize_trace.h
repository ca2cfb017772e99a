// What a resize did when: spans on lanes, kept for the last operations, as a trace that Chrome's
// about:tracing and https://ui.perfetto.dev open. Format: Trace Event Format (JSON object form, events "X",
// "i" and "M"). Thread-safe.
#pragma once

#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/ids.h"
#include "base/json.h"

namespace elasticmoe::runtime {

struct TraceSpan {
  std::string name;
  std::string lane;  // "operation", "engine", "memory", "device 2", ...
  TimeNs begin = 0;  // monotonic
  TimeNs end = 0;    // = begin: a moment
  Json args = Json::object();
};

class ResizeTrace {
 public:
  // Spans added from now on belong to it. The oldest operation is forgotten where there are too many.
  void Begin(const std::string& operation);
  // Into the last operation; dropped where it has very many, or where there is none.
  void Add(TraceSpan span);
  // {"traceEvents": [...], "displayTimeUnit": "ms"}; times are microseconds after the first span's begin.
  std::optional<Json> Find(const std::string& operation) const;

 private:
  struct Operation {
    std::string id;
    std::vector<TraceSpan> spans;
  };
  mutable std::mutex mutex_;
  std::deque<Operation> operations_;
};

}  // namespace elasticmoe::runtime
