// JSON behind a façade: the library throws, we do not. Objects keep the order of their keys, since
// templates print them. Pure.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "base/error.h"

namespace elasticmoe {

using Json = nlohmann::ordered_json;

// kInvalidArgument with the byte offset where `text` is not JSON, or where it nests deeper than
// `max_depth` (a bound for everything that walks values recursively).
Expected<Json> ParseJson(std::string_view text, int max_depth = 128);

// Compact text. Bytes that are not UTF-8 are replaced by U+FFFD, so it never fails.
std::string DumpJson(const Json& value);

}  // namespace elasticmoe
