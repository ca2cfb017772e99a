// Bodies of the API as bytes from anybody: parsed, checked, refused or made a request, never a crash.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "server/openai_request.h"
#include "server/stop_matcher.h"

namespace {

template <class T>
void Show(const elasticmoe::server::ApiResult<T>& result) {
  if (!result) (void)elasticmoe::server::ErrorResponse(result.error());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace elasticmoe::server;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const auto body = ParseBody(text);
  Show(body);
  if (!body) return 0;
  const RequestLimits limits{.vocab = 4096};
  const auto completion = ParseCompletionRequest(*body, limits);
  Show(completion);
  if (completion) {
    StopMatcher stops(completion->stop, completion->include_stop_str_in_output);
    (void)stops.Add(text);
    (void)stops.Finish();
  }
  Show(ParseChatRequest(*body, limits));
  Show(ParseTokenizeRequest(*body));
  Show(ParseDetokenizeRequest(*body, limits));
  return 0;
}
