// The metrics page: vLLM's names, labels and buckets, so that its dashboards work. Thread-safe.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "core/control/resize_values.h"
#include "runtime/engine.h"

namespace elasticmoe::server {

// A request (one choice) that is over. Times in seconds; nothing where the request never got that far.
struct RequestRecord {
  std::string_view finish_reason;  // "stop", "length", "abort", "error"
  int prompt_tokens = 0;
  int cached_tokens = 0;
  int generation_tokens = 0;
  int max_tokens = 0;
  int n = 1;
  double e2e_s = 0.0;
  std::optional<double> queue_s = {};    // waiting for the first step
  std::optional<double> prefill_s = {};  // first step to first token
  std::optional<double> decode_s = {};   // first to last token
};

class Metrics {
 public:
  Metrics(std::string model_name, int max_model_len);
  ~Metrics();

  void PromptDone(int tokens);
  void FirstToken(double seconds_since_arrival);
  void NextTokens(double seconds_since_last, int tokens);
  void RequestDone(const RequestRecord& record);
  void ResizeDone(const core::ResizeReport& report);
  void HttpResponse(std::string_view method, std::string_view route, int status);

  // The page in Prometheus' text format. `connections`: open HTTP connections.
  std::string Page(const runtime::EngineStats& stats, int connections) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace elasticmoe::server
