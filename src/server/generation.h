// A generation over HTTP: body in, requests to the engine, events back, an answer out. Runs on the I/O thread
// of its connection; the engine's thread only posts to it.
//
//   body ─Prepare─► prompts, checks ─Launch─► Submit (one a choice) ─► events ─► chunks … end
//                      │ 400, 404                │ 400, 429, 503          ▲ client gone: Cancel
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "server/answer.h"
#include "server/api_server.h"
#include "server/metrics.h"

namespace elasticmoe::server {

// What handlers share. Generations keep it alive; `engine` is used only while the HTTP server runs.
struct ServingContext {
  ServerOptions options;
  runtime::Engine& engine;
  TextTools text;
  RequestLimits limits;
  Metrics metrics;
  std::uint64_t seed_base = 0;
  std::atomic<std::uint64_t> next_request{1};
  std::atomic<int> active{0};  // generations

  ServingContext(ServerOptions options, runtime::Engine& engine, TextTools text);

  // 404 where `model` is named and not served; else the name to show.
  ApiResult<std::string> ModelName(const std::string& model) const;
};

struct PreparedRequest {
  bool chat = false;
  SamplingRequest sampling;
  std::vector<std::vector<TokenId>> prompts;  // checked against vocabulary and context
  std::vector<int> max_tokens;                // one a prompt
  AnswerOptions answer;
  OutputParserOptions output;  // of chat
};

// Thread-safe.
ApiResult<PreparedRequest> PrepareChat(const ServingContext& context, const HttpRequest& request);
ApiResult<PreparedRequest> PrepareCompletion(const ServingContext& context, const HttpRequest& request);

// The handler of a generating route.
using Prepare = ApiResult<PreparedRequest> (*)(const ServingContext&, const HttpRequest&);
Handler GenerationHandler(std::shared_ptr<ServingContext> context, Prepare prepare);

// Runs `work` here, or on a helper thread where the body is large; `answer` then gets its result here.
template <class Result, class Work, class Answer>
void RunSized(const ServingContext& context, const std::shared_ptr<Exchange>& exchange, Work work,
              Answer answer) {
  if (exchange->Request().body.size() <= context.options.offload_bytes) {
    answer(work());
    return;
  }
  exchange->Offload([exchange, work = std::move(work), answer = std::move(answer)]() mutable {
    auto result = std::make_shared<Result>(
        tl::unexpected<ApiError>(ApiError{.status = 500, .message = "internal error"}));
    try {
      *result = work();
    } catch (const std::exception&) {  // bad_alloc: this request fails, not the server
    }
    exchange->Post([exchange, result, answer = std::move(answer)]() mutable {
      if (!exchange->Closed()) answer(std::move(*result));
    });
  });
}

}  // namespace elasticmoe::server
