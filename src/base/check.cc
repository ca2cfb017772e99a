#include "base/check.h"

#include <cstdio>
#include <cstdlib>

namespace elasticmoe {
namespace {
thread_local const std::string* check_note = nullptr;
}

CheckNote::CheckNote(std::string text) : text_(std::move(text)), outer_(check_note) {
  check_note = &text_;
}
CheckNote::~CheckNote() {
  check_note = outer_;
}

void CheckFailed(const char* file, int line, const char* condition, std::string_view message) {
  std::fprintf(stderr, "%s:%d: check failed: %s %.*s\n", file, line, condition,
               static_cast<int>(message.size()), message.data());
  if (check_note != nullptr) std::fprintf(stderr, "while: %s\n", check_note->c_str());
  std::fflush(stderr);
  std::abort();
}

}  // namespace elasticmoe
