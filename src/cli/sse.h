// Server-sent events from bytes that come in any pieces (WHATWG HTML, "event stream interpretation").
// Pure; foreign bytes may be anything.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <string_view>

#include "base/error.h"

namespace elasticmoe::cli {

struct SseEvent {
  std::string name;  // of the `event` field; "" where there is none
  std::string data;  // its `data` lines, joined by '\n'
};

class SseParser {
 public:
  // `limit_bytes` of one line and of one event's data: a server that never ends an event must not fill our
  // memory.
  explicit SseParser(std::size_t limit_bytes = std::size_t{16} << 20) : limit_bytes_(limit_bytes) {}

  // Calls `on_event` for each event that ends in `bytes`. Events without data are dropped, as the standard
  // says. kResourceExhausted beyond the limit; the parser is of no use afterwards.
  Status Feed(std::string_view bytes, const std::function<void(const SseEvent&)>& on_event);

 private:
  void Line(std::string_view line, const std::function<void(const SseEvent&)>& on_event);

  std::size_t limit_bytes_;
  std::string line_;        // the part of a line that has come
  bool after_cr_ = false;   // a '\n' now belongs to the '\r' before it
  bool first_line_ = true;  // may begin with a byte order mark
  bool has_data_ = false;
  SseEvent event_;
};

}  // namespace elasticmoe::cli
