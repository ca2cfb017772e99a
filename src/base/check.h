// Assertions that stay on in release: a broken invariant of ours ends the process with its place and values.
#pragma once

#include <fmt/format.h>

#include <string>
#include <string_view>

namespace elasticmoe {

[[noreturn]] void CheckFailed(const char* file, int line, const char* condition, std::string_view message);

// While it lives, a failed check of this thread prints `text` too: what to run again to see it (a seed).
// They nest; the innermost is printed.
class CheckNote {
 public:
  explicit CheckNote(std::string text);
  ~CheckNote();
  CheckNote(const CheckNote&) = delete;
  CheckNote& operator=(const CheckNote&) = delete;

 private:
  std::string text_;
  const std::string* outer_;
};

}  // namespace elasticmoe

// EM_CHECK(condition) or EM_CHECK(condition, "format {}", values...).
#define EM_CHECK(condition, ...)                                                                \
  do {                                                                                          \
    if (!(condition)) [[unlikely]]                                                              \
      ::elasticmoe::CheckFailed(__FILE__, __LINE__, #condition, ::fmt::format("" __VA_ARGS__)); \
  } while (false)
