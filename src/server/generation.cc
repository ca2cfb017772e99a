#include "server/generation.h"

#include <random>

#include "base/check.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/rng.h"

namespace elasticmoe::server {
namespace {

double Seconds(TimeNs ns) {
  return static_cast<double>(ns) * 1e-9;
}

class Generation : public std::enable_shared_from_this<Generation> {
 public:
  Generation(std::shared_ptr<ServingContext> context, std::shared_ptr<Exchange> exchange,
             PreparedRequest request)
      : context_(std::move(context)),
        exchange_(std::move(exchange)),
        arrival_ns_(exchange_->Request().arrival_ns),
        stream_(request.sampling.stream),
        n_(request.sampling.n) {
    ++context_->active;
    const auto& sampling = request.sampling;
    for (std::size_t p = 0; p < request.prompts.size(); ++p) {
      for (int i = 0; i < sampling.n; ++i) {
        ChoiceState state;
        state.index = static_cast<int>(states_.size());
        state.prompt = request.prompts[p];
        state.choice = std::make_unique<Choice>(context_->text.tokenizer, sampling);
        if (request.chat) state.parser = MakeOutputParser(context_->options.output, request.output);
        states_.push_back(std::move(state));
        runs_.push_back({.id = RequestId(context_->next_request++), .max_tokens = request.max_tokens[p]});
      }
    }
    request_ = std::move(request);
    writer_ = request_.chat ? AnswerWriter::Chat(request_.answer) : AnswerWriter::Completion(request_.answer);
  }

  ~Generation() { --context_->active; }

  Generation(const Generation&) = delete;
  Generation& operator=(const Generation&) = delete;

  void Launch() {
    auto self = shared_from_this();
    const SamplingRequest& s = request_.sampling;
    const std::uint64_t seed =
        s.seed_given ? s.sampling.seed : Mix64(context_->seed_base + runs_[0].id.value);
    unfinished_ = static_cast<int>(states_.size());
    for (std::size_t i = 0; i < states_.size(); ++i) {
      core::GenerationRequest request;
      request.id = runs_[i].id;
      request.prompt = states_[i].prompt;
      request.sampling = s.sampling;
      request.sampling.seed = seed + static_cast<std::uint64_t>(states_[i].index % n_);
      request.max_tokens = runs_[i].max_tokens;
      request.min_tokens = s.min_tokens;
      request.ignore_eos = s.ignore_eos;
      request.stop_token_ids = s.stop_token_ids;
      request.prompt_logprobs = s.prompt_logprobs;
      if (request_.answer.echo)
        request.prompt_logprobs = std::max(request.prompt_logprobs, s.sampling.logprobs);
      request.priority = s.priority;
      auto submitted = context_->engine.Submit(std::move(request), [self, i](const core::TokenEvent& event) {
        self->exchange_->Post([self, i, event, now = Now()] { self->OnEvent(i, event, now); });
      });
      if (!submitted) {
        for (std::size_t j = i; j < states_.size(); ++j) runs_[j].over = true;
        Fail(FromError(submitted.error()));
        return;
      }
    }
    exchange_->OnClosed([self] { self->CancelAll(); });
    if (stream_) {
      begun_ = true;
      exchange_->Begin({.content_type = "text/event-stream; charset=utf-8",
                        .headers = {{"Cache-Control", "no-cache"}, {"X-Accel-Buffering", "no"}}});
    }
  }

 private:
  struct Run {
    RequestId id;
    int max_tokens = 0;
    bool begun = false;  // its first event is here
    bool over = false;   // the engine is done with it, or never had it
    TimeNs queue_ns = -1;
    TimeNs first_ns = 0;
    TimeNs last_ns = 0;
  };

  void CancelAll() {
    for (Run& run : runs_)
      if (!run.over) context_->engine.Cancel(run.id);
  }

  // The answer becomes an error: as a response while nothing is sent, else as the stream's last event.
  void Fail(const ApiError& error) {
    if (failed_) return;
    failed_ = true;
    CancelAll();
    if (!begun_) {
      exchange_->Respond(ErrorResponse(error));
      return;
    }
    exchange_->Write(SseData(ErrorJson(error)));
    exchange_->Write(kSseDone);
    exchange_->End();
  }

  void OnEvent(std::size_t i, const core::TokenEvent& event, TimeNs now) {
    Run& run = runs_[i];
    ChoiceState& state = states_[i];
    if (event.finish) run.over = true;
    if (!std::exchange(run.begun, true) && event.finish != core::FinishReason::kAbort)
      context_->metrics.PromptDone(static_cast<int>(state.prompt.size()));
    if (event.queue_ns >= 0) run.queue_ns = event.queue_ns;
    if (!event.prompt_logprobs.empty()) state.prompt_logprobs = event.prompt_logprobs;
    state.cached_tokens = std::max(state.cached_tokens, event.cached_prompt_tokens);
    if (state.choice->Finished()) return;  // a stop string ended it before the engine knew
    CountTokens(run, static_cast<int>(event.tokens.size()), now);

    Choice::Delta delta = state.choice->Add(event);
    const bool finished = state.choice->Finished();
    if (finished) {
      if (!run.over) context_->engine.Cancel(run.id);
      Record(run, state, now);
      --unfinished_;
    }
    if (failed_ || exchange_->Closed()) return;
    if (state.choice->FinishReason() == "error") {
      LogError("request {}: the engine failed: {}", exchange_->Request().id, state.choice->ErrorText());
      Fail({.status = 500,
            .message = "the engine failed: " + state.choice->ErrorText(),
            .code = "engine_error"});
      return;
    }
    std::string sse;
    writer_->Add(state, std::move(delta), Usage(), sse);
    if (stream_) exchange_->Write(sse);
    if (unfinished_ == 0) Complete();
  }

  void Complete() {
    if (stream_) {
      exchange_->Write(writer_->StreamEnd(Usage()));
      exchange_->End();
    } else {
      exchange_->Respond({.body = DumpJson(writer_->Whole(states_, Usage()))});
    }
  }

  // Prompts count once, whatever n is.
  UsageCount Usage() const {
    UsageCount usage;
    for (std::size_t i = 0; i < states_.size(); ++i) {
      usage.completion_tokens += states_[i].choice->TokenCount();
      if (i % static_cast<std::size_t>(n_) != 0) continue;
      usage.prompt_tokens += static_cast<int>(states_[i].prompt.size());
      usage.cached_tokens += states_[i].cached_tokens;
    }
    return usage;
  }

  void CountTokens(Run& run, int tokens, TimeNs now) {
    if (tokens == 0) return;
    if (run.first_ns == 0) {
      run.first_ns = now;
      context_->metrics.FirstToken(Seconds(now - arrival_ns_));
      --tokens;
    }
    context_->metrics.NextTokens(Seconds(now - (run.last_ns == 0 ? now : run.last_ns)), tokens);
    run.last_ns = now;
  }

  void Record(const Run& run, const ChoiceState& state, TimeNs now) {
    RequestRecord record{.finish_reason = state.choice->FinishReason(),
                         .prompt_tokens = static_cast<int>(state.prompt.size()),
                         .cached_tokens = state.cached_tokens,
                         .generation_tokens = state.choice->TokenCount(),
                         .max_tokens = run.max_tokens,
                         .n = n_,
                         .e2e_s = Seconds(now - arrival_ns_)};
    if (run.queue_ns >= 0) record.queue_s = Seconds(run.queue_ns);
    if (run.first_ns != 0) {
      record.decode_s = Seconds(run.last_ns - run.first_ns);
      if (run.queue_ns >= 0)
        record.prefill_s = std::max(0.0, Seconds(run.first_ns - arrival_ns_ - run.queue_ns));
    }
    context_->metrics.RequestDone(record);
  }

  std::shared_ptr<ServingContext> context_;
  std::shared_ptr<Exchange> exchange_;
  TimeNs arrival_ns_;
  bool stream_;
  int n_;
  PreparedRequest request_;
  std::vector<ChoiceState> states_;
  std::vector<Run> runs_;
  std::unique_ptr<AnswerWriter> writer_;
  int unfinished_ = 0;
  bool begun_ = false;  // a stream's head is out
  bool failed_ = false;
};

}  // namespace

ServingContext::ServingContext(ServerOptions o, runtime::Engine& e, TextTools t)
    : options(std::move(o)),
      engine(e),
      text(std::move(t)),
      limits{.vocab = e.Spec().vocab, .max_choices = options.max_choices, .defaults = options.defaults},
      metrics(options.served_model_names.front(), e.MaxModelLen()),
      seed_base((std::uint64_t{std::random_device{}()} << 32) | std::random_device{}()) {}

ApiResult<std::string> ServingContext::ModelName(const std::string& model) const {
  if (model.empty()) return options.served_model_names.front();
  for (const std::string& name : options.served_model_names)
    if (name == model) return name;
  return tl::unexpected<ApiError>(ApiError{
      .status = 404,
      .message = fmt::format("the model {} does not exist here; served: {}", DumpJson(model).substr(0, 200),
                             fmt::join(options.served_model_names, ", ")),
      .param = "model",
      .code = "model_not_found"});
}

Handler GenerationHandler(std::shared_ptr<ServingContext> context, Prepare prepare) {
  return [context, prepare](const std::shared_ptr<Exchange>& exchange) {
    if (context->active >= context->options.max_streams) {
      exchange->Respond(ErrorResponse(
          {.status = 429,
           .message = fmt::format("too many requests at a time (limit={})", context->options.max_streams),
           .code = "too_many_requests",
           .retry_after_s = 1}));
      return;
    }
    RunSized<ApiResult<PreparedRequest>>(
        *context, exchange, [context, exchange, prepare] { return prepare(*context, exchange->Request()); },
        [context, exchange](ApiResult<PreparedRequest> prepared) {
          if (!prepared) {
            exchange->Respond(ErrorResponse(prepared.error()));
            return;
          }
          std::make_shared<Generation>(context, exchange, *std::move(prepared))->Launch();
        });
  };
}

}  // namespace elasticmoe::server
