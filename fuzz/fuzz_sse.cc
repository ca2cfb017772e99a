// A server's stream as bytes from anybody: the same events wherever it is cut, each read as an answer.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "cli/openai_answer.h"
#include "cli/sse.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace elasticmoe::cli;
  if (size == 0) return 0;
  const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
  const auto read = [](const std::vector<std::string_view>& pieces) {
    std::vector<std::string> events;
    SseParser parser;
    for (std::string_view piece : pieces)
      if (!parser.Feed(piece,
                       [&](const SseEvent& event) { events.push_back(event.name + '\0' + event.data); }))
        break;
    return events;
  };
  const std::size_t cut = size > 1 ? data[0] % size : 0;
  const auto whole = read({text});
  if (whole != read({text.substr(0, cut), text.substr(std::min(cut, text.size()))})) std::abort();
  for (const std::string& event : whole) (void)ParseAnswerPart(event);
  (void)ServerMessage(500, text);
  return 0;
}
