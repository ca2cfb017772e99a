#include "server/router.h"

#include <mutex>

#include "server/api_error.h"

namespace elasticmoe::server {

void Router::Add(Route route) {
  auto shared = std::make_shared<const Route>(std::move(route));
  const std::string& path = shared->path;
  const bool prefix = path.ends_with("/*");
  std::unique_lock lock(mutex_);
  Node& node = prefix ? prefixes_[path.substr(0, path.size() - 1)] : exact_[path];
  node.methods[shared->method] = shared;
}

void Router::SetGuard(Guard guard) {
  std::unique_lock lock(mutex_);
  guard_ = std::move(guard);
}

const Router::Node* Router::FindNode(std::string_view path, std::string* rest) const {
  if (auto it = exact_.find(path); it != exact_.end()) return &it->second;
  // The longest prefix that leaves something for the '*'.
  for (auto it = prefixes_.rbegin(); it != prefixes_.rend(); ++it) {
    if (path.size() > it->first.size() && path.starts_with(it->first)) {
      *rest = std::string(path.substr(it->first.size()));
      return &it->second;
    }
  }
  return nullptr;
}

Router::Match Router::Find(const HttpRequest& request) const {
  Match match;
  std::shared_lock lock(mutex_);
  const Node* node = FindNode(request.path, &match.rest);
  if (node == nullptr) {
    match.refusal =
        ErrorResponse({.status = 404,
                       .message = fmt::format("no such path: {} {}", request.method, request.path),
                       .code = "not_found"});
    return match;
  }
  std::string allow;
  for (const auto& [method, route] : node->methods) allow += method + (method == "GET" ? ", HEAD, " : ", ");
  allow += "OPTIONS";
  if (request.method == "OPTIONS") {
    match.refusal = {.status = 204, .content_type = "", .headers = {{"Allow", allow}}};
    return match;
  }
  auto it = node->methods.find(request.method == "HEAD" ? std::string_view("GET") : request.method);
  if (it == node->methods.end()) {
    match.refusal = ErrorResponse(
        {.status = 405,
         .message = fmt::format("{} is not allowed on {} (allowed: {})", request.method, request.path, allow),
         .code = "method_not_allowed"});
    match.refusal.headers.emplace_back("Allow", allow);
    return match;
  }
  if (guard_ && it->second->guarded) {
    if (auto refusal = guard_(request)) {
      match.refusal = *std::move(refusal);
      return match;
    }
  }
  match.route = it->second;
  return match;
}

Handler Plain(std::function<HttpResponse(const HttpRequest&)> answer) {
  return [answer = std::move(answer)](const std::shared_ptr<Exchange>& exchange) {
    exchange->Respond(answer(exchange->Request()));
  };
}

}  // namespace elasticmoe::server
