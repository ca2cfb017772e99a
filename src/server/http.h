// HTTP as values: a request, a response, and the Exchange through which a handler answers one request,
// at once or piece by piece. No sockets here (http_server.h) and no OpenAI (api_server.h).
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/ids.h"

namespace elasticmoe::server {

using HttpHeaders = std::vector<std::pair<std::string, std::string>>;

struct HttpRequest {
  std::string method;
  std::string path;     // percent-decoded, without the query
  std::string query;    // as sent, without '?'
  std::string rest;     // what the '*' of the route matched, percent-decoded
  HttpHeaders headers;  // names in lower case
  std::string body;
  std::string id;         // the client's x-request-id where it is printable and short, else ours
  TimeNs arrival_ns = 0;  // steady clock, when the header was complete

  // "" where the header is missing. REQUIRES: `name` in lower case.
  std::string_view Header(std::string_view name) const;
};

struct HttpResponse {
  int status = 200;
  std::string content_type = "application/json";
  std::string body;
  HttpHeaders headers = {};  // beyond content-type, content-length, date, x-request-id and CORS
};

std::string_view StatusPhrase(int status);

// "%41" to "A"; bad escapes stay as they are.
std::string PercentDecode(std::string_view text);

// One request and the way back to its client. A handler gets it on the I/O thread of the connection and keeps
// it as long as it likes. All calls on that thread, but for Post and Offload, which any thread may call.
// After the client is gone every call is a no-op.
class Exchange {
 public:
  virtual ~Exchange() = default;

  virtual const HttpRequest& Request() const = 0;

  // The whole answer. REQUIRES: no answer was begun.
  virtual void Respond(HttpResponse response) = 0;

  // A streamed answer: status and headers, then any number of pieces, then the end. What is written before
  // the connection's coroutine runs again goes out as one piece. A client that lets more than
  // HttpOptions::max_stream_buffer_bytes wait is disconnected.
  virtual void Begin(HttpResponse head) = 0;
  virtual void Write(std::string_view bytes) = 0;
  virtual void End() = 0;

  virtual bool Closed() const = 0;  // the client hung up, was too slow, or the server stops now

  // `closed` runs once, later, if the exchange closes before Respond or End.
  virtual void OnClosed(std::function<void()> closed) = 0;

  // `task` runs on the exchange's I/O thread after earlier posts; dropped where that thread has ended.
  virtual void Post(std::function<void()> task) = 0;

  // `work` runs on a helper thread: for what would hold up other connections (long prompts).
  virtual void Offload(std::function<void()> work) = 0;
};

using Handler = std::function<void(const std::shared_ptr<Exchange>&)>;

}  // namespace elasticmoe::server
