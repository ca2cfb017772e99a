// Operating errors as values: one code for programs, one message for people.
// Our own bugs do not come this way: they die in EM_CHECK (check.h). Pure.
#pragma once

#include <fmt/format.h>

#include <string>
#include <string_view>
#include <tl/expected.hpp>
#include <utility>

namespace elasticmoe {

enum class ErrorCode {
  kInvalidArgument,  // the caller's input is wrong; the same call fails again
  kNotFound,
  kAlreadyExists,
  kFailedPrecondition,  // right input, wrong moment or state
  kResourceExhausted,   // a budget, limit or the machine is full
  kUnavailable,         // a peer is gone; trying again may help
  kDeadlineExceeded,
  kCancelled,
  kDataLoss,  // foreign bytes are cut off or lie about themselves
  kUnimplemented,
  kInternal,
};

std::string_view ToString(ErrorCode code);

// `message` reads `doing what: key=value found (limit=...); what to do`, lower case.
struct Error {
  ErrorCode code = ErrorCode::kInternal;
  std::string message;
};

template <class T>
using Expected = tl::expected<T, Error>;
using Status = Expected<void>;

template <class... Args>
[[nodiscard]] tl::unexpected<Error> Fail(ErrorCode code, fmt::format_string<Args...> format, Args&&... args) {
  return tl::unexpected<Error>(Error{code, fmt::format(format, std::forward<Args>(args)...)});
}

// The same error with what the caller was doing put before it: "loading model.safetensors: ...".
[[nodiscard]] tl::unexpected<Error> Within(std::string_view doing, Error error);

}  // namespace elasticmoe

#define EM_CONCAT_INNER(a, b) a##b
#define EM_CONCAT(a, b) EM_CONCAT_INNER(a, b)

// Returns the error of `expression` (a Status or Expected) from the enclosing function, if it is one.
#define EM_RETURN_IF_ERROR(expression)                                          \
  do {                                                                          \
    if (auto em_status = (expression); !em_status)                              \
      return tl::unexpected<::elasticmoe::Error>(std::move(em_status.error())); \
  } while (false)

// `EM_ASSIGN_OR_RETURN(auto x, F());`: x = the value of F(), or its error is returned.
#define EM_ASSIGN_OR_RETURN(left, expression) \
  EM_ASSIGN_OR_RETURN_INNER(EM_CONCAT(em_result_, __LINE__), left, expression)
#define EM_ASSIGN_OR_RETURN_INNER(result, left, expression)                           \
  auto result = (expression);                                                         \
  if (!result) return tl::unexpected<::elasticmoe::Error>(std::move(result.error())); \
  left = *std::move(result)
