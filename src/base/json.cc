#include "base/json.h"

namespace elasticmoe {
namespace {

// Nesting is counted on the text, ahead of the parser: brackets outside of strings.
Status CheckDepth(std::string_view text, int max_depth) {
  int depth = 0;
  bool in_string = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      if (c == '"') in_string = false;
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      if (++depth > max_depth)
        return Fail(ErrorCode::kInvalidArgument, "parsing JSON: nested deeper than {} at byte {}", max_depth, i);
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return {};
}

}  // namespace

Expected<Json> ParseJson(std::string_view text, int max_depth) {
  EM_RETURN_IF_ERROR(CheckDepth(text, max_depth));
  try {
    return Json::parse(text.begin(), text.end());
  } catch (const nlohmann::json::parse_error& e) {
    std::string_view what = e.what();
    // "[json.exception.parse_error.101] parse error at line 1, column 2: ..." without the library's tag.
    if (auto at = what.find("] "); at != what.npos) what.remove_prefix(at + 2);
    return Fail(ErrorCode::kInvalidArgument, "parsing JSON: {}", what);
  } catch (const nlohmann::json::exception& e) {
    return Fail(ErrorCode::kInvalidArgument, "parsing JSON: {}", e.what());
  }
}

std::string DumpJson(const Json& value) {
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace elasticmoe
