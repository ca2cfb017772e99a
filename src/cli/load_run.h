// Sends a planned load to an OpenAI server and measures every request. One thread, no polling: it shares the
// machine with the server that it measures. Effects: sockets, timers, the monotonic clock.
//
// Open loop (arrivals given): a request's time runs from the moment it was due, whether or not we could send
// it then, so a server that stalls cannot hide what those who wait behind the stall see. Closed loop: from
// its sending.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cli/http_client.h"
#include "cli/load_plan.h"
#include "cli/openai_answer.h"

namespace elasticmoe::cli {

struct LoadOptions {
  LoadShape shape;
  std::optional<Arrivals> arrivals;  // open loop
  int concurrency = 0;               // most requests at a time; 0 = no bound (open loop alone)
  std::uint64_t requests = 0;        // 0 = until `duration_ns` or the arrivals' end
  TimeNs duration_ns = 0;            // none is started later; those that run are awaited. 0 = no bound
  TimeNs timeout_ns = 600'000'000'000;

  std::string model;
  bool chat = false;  // /v1/chat/completions; prompts are text then
  bool text_prompts = false;
  bool stream = true;
  bool ignore_eos = true;
  bool return_token_ids = false;
  bool keep_outputs = false;  // RequestResult::token_ids and text
  double temperature = 0;
};

struct RequestResult {
  enum class State { kCompleted, kFailed, kCancelled };
  State state = State::kFailed;
  std::string
      error_kind;  // "connect", "timeout", "reset", "http 429", "server error", "cut short", "protocol"
  std::string error_message;
  RequestLength asked;
  int input_tokens = 0;   // as the server counts them, else as asked
  int output_tokens = 0;  // as the server counts them, else ids, else pieces of the stream
  TimeNs due_ns = 0, first_token_ns = 0, last_token_ns = 0, done_ns = 0;  // after the run's start; 0 = never
  std::vector<float> gaps_ms;      // between the pieces of the stream that bring tokens
  std::vector<TokenId> token_ids;  // where kept and returned
  std::string text;                // where kept and no ids are returned
};

struct LoadProgress {
  TimeNs elapsed_ns = 0;
  std::uint64_t started = 0, completed = 0, failed = 0;
  std::uint64_t running = 0, waiting = 0;  // waiting: due, but `concurrency` is reached
  std::uint64_t output_tokens = 0;         // pieces of streams so far: a count to watch, not the result
};

struct LoadResult {
  std::vector<RequestResult> requests;  // in the order in which they were due
  TimeNs duration_ns = 0;               // start to the last answer's end
  double client_cpu_s = 0;              // of this process meanwhile
  bool interrupted = false;
};

// One run. It may be used once.
class LoadRun {
 public:
  LoadRun(EventLoop& loop, HttpClient& client, LoadOptions options);
  ~LoadRun();

  // Calls `fn` every `interval_ns` while it runs.
  void OnProgress(TimeNs interval_ns, std::function<void(const LoadProgress&)> fn);
  // Starts nothing more; what runs is awaited.
  void StopStarting();
  // Starts nothing more and cancels what runs; Run returns soon.
  void Interrupt();
  LoadResult Run();

 private:
  struct Impl;
  std::shared_ptr<Impl> impl_;
};

// The body of a request, for what must be asked outside of a run too.
std::string RequestBody(const LoadOptions& options, std::uint64_t index);
std::string_view RequestTarget(const LoadOptions& options);

}  // namespace elasticmoe::cli
