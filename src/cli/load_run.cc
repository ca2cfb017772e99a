#include "cli/load_run.h"

#include <sys/resource.h>

#include <algorithm>
#include <deque>
#include <set>
#include <utility>

#include "base/check.h"
#include "cli/sse.h"

namespace elasticmoe::cli {
namespace {

constexpr std::size_t kErrorBodyBytes = 4096;  // more of an error's text helps nobody
constexpr TimeNs kPauseNs = 100'000'000;  // of a closed loop whose server takes no connection: no busy loop
constexpr std::size_t kAnswerBytes = std::size_t{64} << 20;  // of an answer that is not streamed

double CpuSeconds() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

std::string KindOf(ErrorCode code) {
  switch (code) {
    case ErrorCode::kUnavailable:
      return "connect";
    case ErrorCode::kDeadlineExceeded:
      return "timeout";
    case ErrorCode::kDataLoss:
      return "reset";
    default:
      return "protocol";
  }
}

// One request on its way: the answer's bytes become times and counts.
class Exchange {
 public:
  Exchange(const LoadOptions& options, RequestLength asked, TimeNs due_ns, TimeNs origin_ns)
      : options_(options), origin_ns_(origin_ns) {
    result_.asked = asked;
    result_.input_tokens = asked.input_tokens;
    result_.due_ns = due_ns;
  }

  std::shared_ptr<HttpCall> call;

  void Head(const HttpHead& head) {
    status_ = head.status;
    events_ = head.content_type.starts_with("text/event-stream");
  }

  // Returns the pieces with tokens that these bytes held.
  int Data(std::string_view bytes, TimeNs at_ns) {
    const int before = pieces_;
    if (status_ != 200) {
      body_ += bytes.substr(0, kErrorBodyBytes - std::min(kErrorBodyBytes, body_.size()));
    } else if (!events_) {
      if (body_.size() + bytes.size() > kAnswerBytes)
        return Refuse("protocol", "the answer is larger than 64 MiB");
      body_ += bytes;
    } else {
      Status fed = parser_.Feed(bytes, [&](const SseEvent& event) { Event(event, at_ns - origin_ns_); });
      if (!fed) Refuse("protocol", fed.error().message);
    }
    return pieces_ - before;
  }

  RequestResult Done(const Status& status, TimeNs now_ns) {
    result_.done_ns = now_ns - origin_ns_;
    if (status && status_ == 200 && !events_ && result_.error_kind.empty()) Whole();
    result_.state = RequestResult::State::kFailed;
    if (!result_.error_kind.empty()) {
      // already known: the stream said it, or what it said made no sense
    } else if (!status && status.error().code == ErrorCode::kCancelled) {
      result_.state = RequestResult::State::kCancelled;
    } else if (!status) {
      Refuse(KindOf(status.error().code), status.error().message);
    } else if (status_ != 200) {
      Refuse(fmt::format("http {}", status_), ServerMessage(status_, body_));
    } else if (!finished_) {
      Refuse("cut short", "the answer ended without a finish_reason");
    } else {
      result_.state = RequestResult::State::kCompleted;
    }
    Count();
    return std::move(result_);
  }

 private:
  int Refuse(std::string kind, std::string message) {
    if (result_.error_kind.empty()) {
      result_.error_kind = std::move(kind);
      result_.error_message = std::move(message);
      if (call) call->Cancel();
    }
    return 0;
  }

  void Event(const SseEvent& event, TimeNs at_ns) {
    if (event.data == "[DONE]" || !result_.error_kind.empty()) return;
    auto part = ParseAnswerPart(event.data);
    if (!part) {
      Refuse(part.error().code == ErrorCode::kInternal ? "server error" : "protocol", part.error().message);
      return;
    }
    Take(*std::move(part), at_ns);
  }

  void Whole() {
    auto part = ParseAnswerPart(body_);
    if (!part) {
      Refuse(part.error().code == ErrorCode::kInternal ? "server error" : "protocol", part.error().message);
      return;
    }
    Take(*std::move(part), result_.done_ns);
  }

  void Take(AnswerPart part, TimeNs at_ns) {
    if (part.usage) usage_ = part.usage;
    if (!part.has_choice) return;
    finished_ = finished_ || !part.finish_reason.empty();
    // A token may show no text yet (half a character), but not in the piece that only says why the answer
    // ended, and not in a chat's first piece, which only names the role.
    const bool has_tokens = !part.token_ids.empty() || !part.text.empty() ||
                            (!options_.chat && events_ && part.finish_reason.empty());
    if (!has_tokens) return;
    ++pieces_;
    ids_ += static_cast<int>(part.token_ids.size());
    if (result_.first_token_ns == 0)
      result_.first_token_ns = at_ns;
    else
      result_.gaps_ms.push_back(
          static_cast<float>(static_cast<double>(at_ns - result_.last_token_ns) * 1e-6));
    result_.last_token_ns = at_ns;
    if (!options_.keep_outputs) return;
    result_.token_ids.insert(result_.token_ids.end(), part.token_ids.begin(), part.token_ids.end());
    result_.text += part.text;
  }

  void Count() {
    result_.output_tokens = ids_ > 0 ? ids_ : pieces_;
    if (!usage_) return;
    result_.input_tokens = usage_->prompt_tokens;
    result_.output_tokens = usage_->completion_tokens;
  }

  const LoadOptions& options_;
  const TimeNs origin_ns_;
  RequestResult result_;
  SseParser parser_;
  std::string body_;
  int status_ = 0;
  bool events_ = false;
  bool finished_ = false;
  int pieces_ = 0;
  int ids_ = 0;
  std::optional<AnswerUsage> usage_;
};

}  // namespace

std::string_view RequestTarget(const LoadOptions& options) {
  return options.chat ? "/v1/chat/completions" : "/v1/completions";
}

std::string RequestBody(const LoadOptions& options, std::uint64_t index) {
  const RequestLength length = LengthOf(options.shape, index);
  Json body = {{"model", options.model}};
  std::string ids;  // ahead of the JSON library: a prompt of 10,000 ids is only a list of numbers
  if (options.chat) {
    Json message = {{"role", "user"}, {"content", PromptText(options.shape, index, length.input_tokens)}};
    body["messages"] = Json::array({std::move(message)});
  } else if (options.text_prompts) {
    body["prompt"] = PromptText(options.shape, index, length.input_tokens);
  } else {
    ids = fmt::format(",\"prompt\":[{}]}}",
                      fmt::join(PromptIds(options.shape, index, length.input_tokens), ","));
  }
  body["max_tokens"] = length.output_tokens;
  body["temperature"] = options.temperature;
  body["seed"] = options.shape.seed % 1'000'000'007 + index;  // within every server's integer
  if (options.stream) {
    body["stream"] = true;
    body["stream_options"] = {{"include_usage", true}};
  }
  if (options.ignore_eos) body["ignore_eos"] = true;
  if (options.return_token_ids) body["return_token_ids"] = true;
  std::string text = DumpJson(body);
  if (!ids.empty()) text.replace(text.size() - 1, 1, ids);
  return text;
}

struct LoadRun::Impl : std::enable_shared_from_this<Impl> {
  Impl(EventLoop& l, HttpClient& c, LoadOptions o)
      : loop(l), client(c), options(std::move(o)), arrival(l), ending(l), ticking(l) {}

  bool Bounded() const { return options.concurrency > 0; }
  bool MayPlan() const {
    return !stopped && !stopped_starting && (options.requests == 0 || planned < options.requests) &&
           (options.duration_ns == 0 || loop.Now() - origin_ns < options.duration_ns);
  }

  void Start() {
    origin_ns = loop.Now();
    if (options.duration_ns > 0) {
      ending.At(origin_ns + options.duration_ns, [this] {
        EndArrivals();
        StopIfIdle();
      });
    }
    if (progress) Tick();
    if (options.arrivals) {
      PlanArrival();
    } else {
      arrivals_ended = true;
      FillClosedLoop();
    }
    StopIfIdle();
  }

  void Tick() {
    ticking.At(loop.Now() + progress_interval_ns, [this] {
      progress(Progress());
      Tick();
    });
  }

  LoadProgress Progress() const {
    return {.elapsed_ns = loop.Now() - origin_ns,
            .started = planned - waiting.size(),
            .completed = completed,
            .failed = failed,
            .running = running.size(),
            .waiting = waiting.size(),
            .output_tokens = pieces};
  }

  void PlanArrival() {
    const auto next = MayPlan() ? options.arrivals->Next() : std::nullopt;
    if (!next || (options.duration_ns > 0 && *next >= options.duration_ns)) {
      arrivals_ended = true;
      return;
    }
    arrival.At(origin_ns + *next, [this, due_ns = *next] {
      waiting.emplace_back(planned++, due_ns);
      PlanArrival();
      Drain();
      StopIfIdle();
    });
  }

  void EndArrivals() {
    arrival.Cancel();
    arrivals_ended = true;
    pausing = false;
  }

  void Drain() {
    while (!waiting.empty() &&
           (!Bounded() || running.size() < static_cast<std::size_t>(options.concurrency))) {
      const auto [index, due_ns] = waiting.front();
      waiting.pop_front();
      Send(index, due_ns);
    }
  }

  void FillClosedLoop() {
    while (MayPlan() && running.size() < static_cast<std::size_t>(options.concurrency))
      Send(planned++, loop.Now() - origin_ns);
  }

  void Send(std::uint64_t index, TimeNs due_ns) {
    auto exchange = std::make_shared<Exchange>(options, LengthOf(options.shape, index), due_ns, origin_ns);
    running.insert(exchange);
    HttpHandlers handlers;
    handlers.head = [exchange](const HttpHead& head) { exchange->Head(head); };
    handlers.data = [this, exchange](std::string_view bytes, TimeNs at_ns) {
      pieces += static_cast<std::uint64_t>(exchange->Data(bytes, at_ns));
    };
    handlers.done = [this, exchange, index](Status status) { Done(exchange, index, status); };
    exchange->call = client.Send({.method = "POST",
                                  .target = std::string(RequestTarget(options)),
                                  .body = RequestBody(options, index),
                                  .timeout_ns = options.timeout_ns},
                                 std::move(handlers));
  }

  void Done(const std::shared_ptr<Exchange>& exchange, std::uint64_t index, const Status& status) {
    exchange->call.reset();
    running.erase(exchange);
    if (results.size() <= index) results.resize(index + 1);
    RequestResult& result = results[index] = exchange->Done(status, loop.Now());
    last_done_ns = std::max(last_done_ns, result.done_ns);
    completed += result.state == RequestResult::State::kCompleted;
    failed += result.state == RequestResult::State::kFailed;
    if (options.arrivals)
      Drain();
    else if (result.error_kind == "connect")
      Pause();
    else
      FillClosedLoop();
    StopIfIdle();
  }

  void Pause() {
    if (!MayPlan() || std::exchange(pausing, true)) return;
    arrival.At(loop.Now() + kPauseNs, [this] {
      pausing = false;
      FillClosedLoop();
      StopIfIdle();
    });
  }

  void StopIfIdle() {
    if (arrivals_ended && !pausing && running.empty() && waiting.empty()) {
      ticking.Cancel();
      ending.Cancel();
      finished = true;
      loop.Stop();
    }
  }

  EventLoop& loop;
  HttpClient& client;
  LoadOptions options;
  Timer arrival, ending, ticking;
  std::function<void(const LoadProgress&)> progress;
  TimeNs progress_interval_ns = 0;

  TimeNs origin_ns = 0, last_done_ns = 0;
  std::uint64_t planned = 0, completed = 0, failed = 0, pieces = 0;
  std::deque<std::pair<std::uint64_t, TimeNs>> waiting;  // index, due
  std::set<std::shared_ptr<Exchange>> running;
  std::vector<RequestResult> results;
  bool arrivals_ended = false, pausing = false, stopped = false, stopped_starting = false, finished = false;
};

LoadRun::LoadRun(EventLoop& loop, HttpClient& client, LoadOptions options)
    : impl_(std::make_shared<Impl>(loop, client, std::move(options))) {
  EM_CHECK(impl_->options.arrivals || impl_->options.concurrency > 0, "a closed loop needs a concurrency");
  EM_CHECK(impl_->options.arrivals || impl_->options.requests > 0 || impl_->options.duration_ns > 0,
           "a closed loop needs an end");
}

LoadRun::~LoadRun() = default;

void LoadRun::OnProgress(TimeNs interval_ns, std::function<void(const LoadProgress&)> fn) {
  impl_->progress_interval_ns = interval_ns;
  impl_->progress = std::move(fn);
}

void LoadRun::StopStarting() {
  impl_->stopped_starting = true;
  impl_->EndArrivals();
  impl_->StopIfIdle();
}

void LoadRun::Interrupt() {
  if (std::exchange(impl_->stopped, true)) return;
  impl_->EndArrivals();
  impl_->planned -= impl_->waiting.size();  // the last ones due: never sent, so no results of this run
  impl_->waiting.clear();
  for (const auto& exchange : impl_->running)
    if (exchange->call) exchange->call->Cancel();
  impl_->StopIfIdle();
}

LoadResult LoadRun::Run() {
  const double cpu_before_s = CpuSeconds();
  impl_->Start();
  while (!impl_->finished) impl_->loop.Run();
  LoadResult result;
  result.requests = std::move(impl_->results);
  result.duration_ns = impl_->last_done_ns;
  result.client_cpu_s = CpuSeconds() - cpu_before_s;
  result.interrupted = impl_->stopped;
  return result;
}

}  // namespace elasticmoe::cli
