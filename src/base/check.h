// Assertions that stay on in release: a broken invariant of ours ends the process with its place and values.
#pragma once

#include <fmt/format.h>

#include <string_view>

namespace elasticmoe {

[[noreturn]] void CheckFailed(const char* file, int line, const char* condition, std::string_view message);

}  // namespace elasticmoe

// EM_CHECK(condition) or EM_CHECK(condition, "format {}", values...).
#define EM_CHECK(condition, ...)                                                                   \
  do {                                                                                             \
    if (!(condition)) [[unlikely]]                                                                 \
      ::elasticmoe::CheckFailed(__FILE__, __LINE__, #condition, ::fmt::format("" __VA_ARGS__));    \
  } while (false)
