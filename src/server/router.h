// Which handler answers a method and a path. Thread-safe: routes may be added while serving.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <shared_mutex>
#include <string>
#include <string_view>
#include <vector>

#include "server/http.h"

namespace elasticmoe::server {

struct Route {
  std::string method;
  std::string path;     // "/v1/models", or "/v1/models/*" for everything below (not empty)
  bool guarded = true;  // asks the guard first (API keys)
  Handler handler;
};

class Router {
 public:
  // Replaces the route of the same method and path.
  void Add(Route route);

  // `guard` returns the refusal of a request, or nothing where it may pass.
  using Guard = std::function<std::optional<HttpResponse>(const HttpRequest&)>;
  void SetGuard(Guard guard);

  struct Match {
    std::shared_ptr<const Route> route;  // nullptr: `refusal` is the answer
    std::string rest;                    // what '*' stands for
    HttpResponse refusal;                // 404, 405 with Allow, the guard's answer, or 204 for OPTIONS
  };
  // HEAD finds the route of GET.
  Match Find(const HttpRequest& request) const;

 private:
  struct Node {
    std::map<std::string, std::shared_ptr<const Route>, std::less<>> methods;
  };
  const Node* FindNode(std::string_view path, std::string* rest) const;

  mutable std::shared_mutex mutex_;
  std::map<std::string, Node, std::less<>> exact_;
  std::map<std::string, Node, std::less<>> prefixes_;  // key ends in '/'
  Guard guard_;
};

// A handler that answers at once.
Handler Plain(std::function<HttpResponse(const HttpRequest&)> answer);

}  // namespace elasticmoe::server
