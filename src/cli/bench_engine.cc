#include "cli/bench_engine.h"

#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>

#include "base/clock.h"
#include "cli/load_plan.h"

namespace elasticmoe::cli {

// What comes of requests submitted together. The window opens when each has its first token and closes
// `steps` tokens a request later.
struct EngineBench::Window {
  std::mutex mutex;
  std::condition_variable closed;
  std::size_t without_token = 0;
  std::size_t left = 0;  // tokens until it closes
  TimeNs begin = 0, end = 0;
  Sequences generated;
  std::string error;

  void Add(std::size_t sequence, const core::TokenEvent& event) {
    const std::scoped_lock lock(mutex);
    if (event.finish == core::FinishReason::kError ||
        (event.finish == core::FinishReason::kAbort && end == 0))
      error = event.error.empty() ? "the request was aborted" : event.error;
    auto& tokens = generated[sequence];
    const bool first = tokens.empty() && !event.tokens.empty();
    tokens.insert(tokens.end(), event.tokens.begin(), event.tokens.end());
    if (first && --without_token == 0) {
      begin = Now();
    } else if (begin != 0 && end == 0) {
      left -= std::min(left, event.tokens.size());
    }
    if (begin != 0 && left == 0 && end == 0) end = Now();
    if (end != 0 || !error.empty()) closed.notify_one();
  }
};

Expected<std::unique_ptr<EngineBench>> EngineBench::Start(Options options) {
  std::unique_ptr<EngineBench> bench(new EngineBench());
  runtime::EngineOptions& engine = options.engine.options;
  engine.prefix_cache = false;  // every round computes all of its tokens
  engine.standby = 0;           // nobody dies here
  engine.max_running = std::max(engine.max_running, options.sequences);
  engine.log_level = "warn";
  const std::string name = fmt::format("bench-{}", ::getpid());
  EM_ASSIGN_OR_RETURN(bench->engine_, StartEngine(options.engine, name));
  EM_ASSIGN_OR_RETURN(const compute::Kernels* kernels, compute::FindKernels(bench->engine_->kernels()));
  const std::size_t devices = bench->engine_->Stats().devices.size();
  std::vector<int> cpus = runtime::AllowedCpus();
  const std::size_t threads = std::min(cpus.size(), devices * engine.threads_per_device);
  cpus.resize(std::max<std::size_t>(threads, 1));
  EM_ASSIGN_OR_RETURN(bench->alone_, ForwardAlone::Attach(bench->engine_->Spec(), *kernels,
                                                          {.hmm_socket = HmmSocketOf(name),
                                                           .cpus = cpus,
                                                           .max_rows = engine.max_step_rows,
                                                           .sequences = options.sequences,
                                                           .tokens_each = options.tokens_each}));
  bench->kernels_ = kernels;
  bench->probe_.emplace(bench->alone_->threads());
  bench->MeasureLimitsAgain();
  bench->options_ = std::move(options);
  return bench;
}

EngineBench::~EngineBench() = default;

void EngineBench::MeasureLimitsAgain() {
  limits_.Raise(MeasureLimits(*kernels_, engine_->Spec().weights, alone_->threads(), *probe_));
}

std::string EngineBench::About() const {
  const std::size_t devices = engine_->Stats().devices.size();
  return fmt::format("{} on {} device{} of {} thread{}", options_.engine.options.model.string(), devices,
                     devices == 1 ? "" : "s", options_.engine.options.threads_per_device,
                     options_.engine.options.threads_per_device == 1 ? "" : "s");
}

Sequences EngineBench::Prompts(int sequences, int tokens, std::uint64_t seed) const {
  LoadShape shape;
  shape.seed = seed;
  // The first ids of a vocabulary are often special.
  shape.first_id = engine_->Spec().vocab > 400 ? 100 : 0;
  shape.end_id = engine_->Spec().vocab;
  Sequences prompts;
  for (int i = 0; i < sequences; ++i)
    prompts.push_back(PromptIds(shape, static_cast<std::uint64_t>(i), tokens));
  return prompts;
}

Expected<std::shared_ptr<EngineBench::Window>> EngineBench::Submit(const Sequences& prompts, int steps,
                                                                   int max_tokens) {
  auto window = std::make_shared<Window>();
  window->without_token = prompts.size();
  window->left = prompts.size() * static_cast<std::size_t>(steps);
  window->generated.resize(prompts.size());
  const std::uint64_t first = next_request_;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    core::GenerationRequest request;
    request.id = RequestId(next_request_++);
    request.prompt = prompts[i];
    request.sampling = SamplingOf(static_cast<int>(i));
    request.max_tokens = max_tokens;
    request.ignore_eos = true;
    EM_RETURN_IF_ERROR(engine_->Submit(
        std::move(request), [window, i](const core::TokenEvent& event) { window->Add(i, event); }));
  }
  std::unique_lock lock(window->mutex);
  window->closed.wait(lock, [&] { return window->end != 0 || !window->error.empty(); });
  lock.unlock();
  for (std::uint64_t id = first; id < next_request_; ++id) engine_->Cancel(RequestId(id));
  while (!engine_->Idle()) ::usleep(1000);
  if (!window->error.empty()) return Fail(ErrorCode::kUnavailable, "generating: {}", window->error);
  return window;
}

Expected<Timed> EngineBench::PrefillEngine(const std::vector<TokenId>& prompt) {
  const TimeNs begin = Now();
  EM_ASSIGN_OR_RETURN(const auto window, Submit({prompt}, 0, 1));
  return Timed{static_cast<double>(window->begin - begin) * 1e-9, window->generated};
}

Expected<Timed> EngineBench::DecodeEngine(const Sequences& prompts, int steps) {
  // Those whose prompt came first are ahead by the steps that took in the others' prompts: at most all.
  const int ahead = static_cast<int>(prompts.size()) + 2;
  EM_ASSIGN_OR_RETURN(const auto window, Submit(prompts, steps, steps + ahead));
  for (auto& tokens : window->generated) tokens.resize(std::min<std::size_t>(tokens.size(), steps + 1));
  return Timed{static_cast<double>(window->end - window->begin) * 1e-9, window->generated};
}

// Chunk by chunk, as many rows a step as the engine takes.
void EngineBench::FillPrompts(const Sequences& prompts, std::vector<TokenId>& next) {
  alone_->Forget();
  const auto most = static_cast<std::size_t>(options_.engine.options.max_step_rows);
  next.assign(prompts.size(), 0);
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    for (std::size_t at = 0; at < prompts[i].size(); at += most) {
      const std::size_t count = std::min(most, prompts[i].size() - at);
      const ForwardAlone::Part part{static_cast<int>(i), {prompts[i].data() + at, count}};
      next[i] = alone_->Step({&part, 1})[0];
    }
  }
}

Timed EngineBench::PrefillAlone(const std::vector<TokenId>& prompt, Work& work) {
  std::vector<TokenId> next;
  (void)alone_->TakeWork();
  const TimeNs begin = Now();
  FillPrompts({prompt}, next);
  const TimeNs end = Now();
  work = alone_->TakeWork();
  return {static_cast<double>(end - begin) * 1e-9, {next}};
}

Timed EngineBench::DecodeAlone(const Sequences& prompts, int steps, Work& work) {
  std::vector<TokenId> next;
  FillPrompts(prompts, next);
  Timed timed;
  timed.generated.resize(prompts.size());
  std::vector<ForwardAlone::Part> parts(prompts.size());
  (void)alone_->TakeWork();
  const TimeNs begin = Now();
  for (int step = 0; step <= steps; ++step) {
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      timed.generated[i].push_back(next[i]);
      parts[i] = {static_cast<int>(i), {&next[i], 1}};
    }
    if (step == steps) break;
    next = alone_->Step(parts);
  }
  timed.seconds = static_cast<double>(Now() - begin) * 1e-9;
  work = alone_->TakeWork();
  return timed;
}

}  // namespace elasticmoe::cli
