#include "cli/sse.h"

#include <algorithm>

namespace elasticmoe::cli {

Status SseParser::Feed(std::string_view bytes, const std::function<void(const SseEvent&)>& on_event) {
  while (!bytes.empty()) {
    if (after_cr_) {
      after_cr_ = false;
      if (bytes.front() == '\n') {
        bytes.remove_prefix(1);
        continue;
      }
    }
    const std::size_t end = std::min(bytes.find_first_of("\r\n"), bytes.size());
    if (line_.size() + event_.data.size() + end > limit_bytes_)
      return Fail(ErrorCode::kResourceExhausted, "reading events: one event is larger than {} bytes",
                  limit_bytes_);
    if (end == bytes.size()) {
      line_ += bytes;
      break;
    }
    after_cr_ = bytes[end] == '\r';
    if (line_.empty()) {
      Line(bytes.substr(0, end), on_event);
    } else {
      line_ += bytes.substr(0, end);
      Line(line_, on_event);
      line_.clear();
    }
    bytes.remove_prefix(end + 1);
  }
  return {};
}

void SseParser::Line(std::string_view line, const std::function<void(const SseEvent&)>& on_event) {
  if (first_line_ && line.starts_with("\xEF\xBB\xBF")) line.remove_prefix(3);
  first_line_ = false;
  if (line.empty()) {
    if (has_data_) on_event(event_);
    has_data_ = false;
    event_.name.clear();
    event_.data.clear();
    return;
  }
  const std::size_t colon = std::min(line.find(':'), line.size());
  const std::string_view field = line.substr(0, colon);
  std::string_view value = line.substr(std::min(colon + 1, line.size()));
  if (value.starts_with(' ')) value.remove_prefix(1);
  if (field == "data") {
    if (has_data_) event_.data += '\n';
    has_data_ = true;
    event_.data += value;
  } else if (field == "event") {
    event_.name = value;
  }
}

}  // namespace elasticmoe::cli
