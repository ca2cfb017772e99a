#include "server/api_server.h"

#include <ctime>
#include <mutex>

#include "base/check.h"
#include "server/generation.h"

namespace elasticmoe::server {
namespace {

// Takes the same time wherever the two differ.
bool EqualSecrets(std::string_view given, std::string_view key) {
  unsigned difference = given.size() == key.size() ? 0U : 1U;
  for (std::size_t i = 0; i < key.size(); ++i)
    difference |=
        static_cast<unsigned char>(key[i]) ^ static_cast<unsigned char>(i < given.size() ? given[i] : 0);
  return difference == 0;
}

Router::Guard KeyGuard(std::vector<std::string> keys) {
  return [keys = std::move(keys)](const HttpRequest& request) -> std::optional<HttpResponse> {
    std::string_view given = request.Header("authorization");
    constexpr std::string_view kBearer = "bearer ";
    bool bearer = given.size() > kBearer.size();
    for (std::size_t i = 0; bearer && i < kBearer.size(); ++i)
      bearer = (given[i] | 0x20) == kBearer[i] || given[i] == kBearer[i];
    given.remove_prefix(bearer ? kBearer.size() : given.size());
    bool found = false;
    for (const std::string& key : keys) found = EqualSecrets(given, key) || found;
    if (found) return std::nullopt;
    return ErrorResponse(
        {.status = 401,
         .message = bearer ? "wrong API key" : "an API key is needed: Authorization: Bearer KEY",
         .code = "invalid_api_key"});
  };
}

Json ModelJson(const ServingContext& context, const std::string& name, std::int64_t created_s) {
  return Json{{"id", name},
              {"object", "model"},
              {"created", created_s},
              {"owned_by", "elasticmoe"},
              {"root", context.options.model_root.empty() ? name : context.options.model_root},
              {"parent", nullptr},
              {"max_model_len", context.engine.MaxModelLen()},
              {"permission", Json::array()}};
}

HttpResponse JsonResponse(const Json& json) {
  return {.body = DumpJson(json)};
}

ApiResult<Json> Tokenize(const ServingContext& context, const std::string& body_text) {
  API_ASSIGN_OR_RETURN(const Json body, ParseBody(body_text));
  API_ASSIGN_OR_RETURN(const TokenizeRequest request, ParseTokenizeRequest(body));
  API_RETURN_IF_ERROR(context.ModelName(request.model));
  std::vector<TokenId> ids;
  if (const auto* chat = std::get_if<ChatPrompt>(&request.input)) {
    API_ASSIGN_OR_RETURN(ids,
                         EncodeChat(context.text, *chat, request.add_special_tokens, std::time(nullptr)));
  } else {
    API_ASSIGN_OR_RETURN(ids, EncodeText(context.text, "prompt", std::get<std::string>(request.input),
                                         request.add_special_tokens));
  }
  Json out = {{"count", ids.size()}, {"max_model_len", context.engine.MaxModelLen()}, {"tokens", ids}};
  out["token_strs"] = nullptr;
  if (request.return_token_strs) {
    Json texts = Json::array();
    for (TokenId id : ids) texts.push_back(context.text.tokenizer->TokenText(id));
    out["token_strs"] = std::move(texts);
  }
  return out;
}

ApiResult<Json> Detokenize(const ServingContext& context, const std::string& body_text) {
  API_ASSIGN_OR_RETURN(const Json body, ParseBody(body_text));
  API_ASSIGN_OR_RETURN(const DetokenizeRequest request, ParseDetokenizeRequest(body, context.limits));
  API_RETURN_IF_ERROR(context.ModelName(request.model));
  if (context.text.tokenizer == nullptr) return BadField("tokens", "tokens: this model has no tokenizer");
  return Json{{"prompt", context.text.tokenizer->Decode(request.tokens, false)}};
}

using JsonWork = ApiResult<Json> (*)(const ServingContext&, const std::string& body);
Handler JsonHandler(std::shared_ptr<ServingContext> context, JsonWork work) {
  return [context, work](const std::shared_ptr<Exchange>& exchange) {
    RunSized<ApiResult<Json>>(
        *context, exchange, [context, exchange, work] { return work(*context, exchange->Request().body); },
        [exchange](ApiResult<Json> result) {
          exchange->Respond(result ? JsonResponse(*result) : ErrorResponse(result.error()));
        });
  };
}

}  // namespace

struct ApiServer::Impl {
  std::shared_ptr<ServingContext> context;
  Router router;
  std::mutex metrics_mutex;
  std::vector<std::function<std::string()>> more_metrics;
  std::unique_ptr<HttpServer> http;  // last: its threads use the rest

  void AddRoutes() {
    const auto add = [this](std::string method, std::string path, Handler handler) {
      const bool guarded = path.starts_with("/v1/");
      router.Add({.method = std::move(method),
                  .path = std::move(path),
                  .guarded = guarded,
                  .handler = std::move(handler)});
    };
    const std::int64_t started_s = std::time(nullptr);
    add("POST", "/v1/chat/completions", GenerationHandler(context, PrepareChat));
    add("POST", "/v1/completions", GenerationHandler(context, PrepareCompletion));
    add("GET", "/v1/models", Plain([c = context, started_s](const HttpRequest&) {
          Json data = Json::array();
          for (const std::string& name : c->options.served_model_names)
            data.push_back(ModelJson(*c, name, started_s));
          return JsonResponse(Json{{"object", "list"}, {"data", std::move(data)}});
        }));
    add("GET", "/v1/models/*", Plain([c = context, started_s](const HttpRequest& request) {
          auto name = c->ModelName(request.rest);
          return name ? JsonResponse(ModelJson(*c, *name, started_s)) : ErrorResponse(name.error());
        }));
    add("POST", "/tokenize", JsonHandler(context, Tokenize));
    add("POST", "/detokenize", JsonHandler(context, Detokenize));
    const Handler health = Plain([c = context](const HttpRequest&) {
      const bool healthy = !c->options.healthy || c->options.healthy();
      return HttpResponse{.status = healthy ? 200 : 503, .content_type = ""};
    });
    add("GET", "/health", health);
    add("GET", "/ping", health);
    add("POST", "/ping", health);
    add("GET", "/version", Plain([c = context](const HttpRequest&) {
          return JsonResponse(Json{{"version", c->options.version}});
        }));
    add("GET", "/load", Plain([c = context](const HttpRequest&) {
          return JsonResponse(Json{{"server_load", c->active.load()}});
        }));
    add("GET", "/metrics", Plain([this](const HttpRequest&) {
          std::string page = context->metrics.Page(context->engine.Stats(), http->Connections());
          std::lock_guard lock(metrics_mutex);
          for (auto& lines : more_metrics) page += lines();
          return HttpResponse{.content_type = "text/plain; version=0.0.4; charset=utf-8",
                              .body = std::move(page)};
        }));
  }
};

ApiServer::ApiServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
ApiServer::~ApiServer() = default;

Expected<std::unique_ptr<ApiServer>> ApiServer::Start(ServerOptions options, runtime::Engine& engine,
                                                      TextTools text) {
  EM_CHECK(!options.served_model_names.empty(), "a served model needs a name");
  auto impl = std::make_unique<Impl>();
  impl->context = std::make_shared<ServingContext>(std::move(options), engine, std::move(text));
  const ServerOptions& kept = impl->context->options;
  if (!kept.api_keys.empty()) impl->router.SetGuard(KeyGuard(kept.api_keys));
  HttpOptions http = kept.http;
  http.on_response = [context = impl->context](std::string_view method, std::string_view route, int status) {
    context->metrics.HttpResponse(method, route, status);
  };
  impl->AddRoutes();
  EM_ASSIGN_OR_RETURN(impl->http, HttpServer::Listen(std::move(http), impl->router));
  impl->http->Run();
  return std::unique_ptr<ApiServer>(new ApiServer(std::move(impl)));
}

int ApiServer::Port() const {
  return impl_->http->Port();
}

void ApiServer::AddRoute(std::string method, std::string path, Handler handler, bool guarded) {
  impl_->router.Add({.method = std::move(method),
                     .path = std::move(path),
                     .guarded = guarded,
                     .handler = std::move(handler)});
}

Metrics& ApiServer::metrics() {
  return impl_->context->metrics;
}

void ApiServer::AddMetrics(std::function<std::string()> lines) {
  std::lock_guard lock(impl_->metrics_mutex);
  impl_->more_metrics.push_back(std::move(lines));
}

void ApiServer::BeginStop() {
  impl_->http->BeginStop();
}
void ApiServer::StopNow() {
  impl_->http->StopNow();
}
void ApiServer::Wait() {
  impl_->http->Wait();
}

}  // namespace elasticmoe::server
