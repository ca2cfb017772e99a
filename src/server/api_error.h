// Errors as OpenAI's clients read them: {"error":{"message","type","param","code"}}. Pure values.
#pragma once

#include <fmt/format.h>

#include <string>
#include <string_view>
#include <tl/expected.hpp>
#include <utility>

#include "base/error.h"
#include "base/json.h"
#include "server/http.h"

namespace elasticmoe::server {

struct ApiError {
  int status = 400;
  std::string message;
  std::string param;      // field at fault, "" = null
  std::string code;       // machine-readable, "" = null
  int retry_after_s = 0;  // 0 = no Retry-After header
};

template <class T>
using ApiResult = tl::expected<T, ApiError>;

// A 400 about the request's field `param`.
template <class... Args>
[[nodiscard]] tl::unexpected<ApiError> BadField(std::string_view param, fmt::format_string<Args...> format,
                                                Args&&... args) {
  return tl::unexpected<ApiError>(
      ApiError{.message = fmt::format(format, std::forward<Args>(args)...), .param = std::string(param)});
}

// An engine's or a library's error: kInvalidArgument 400, kNotFound 404, kResourceExhausted 429, kUnavailable
// 503, ... The last two carry Retry-After.
ApiError FromError(const Error& error);

// {"error": {...}}
Json ErrorJson(const ApiError& error);
HttpResponse ErrorResponse(const ApiError& error);

}  // namespace elasticmoe::server

// Like EM_RETURN_IF_ERROR and EM_ASSIGN_OR_RETURN, for ApiResult.
#define API_RETURN_IF_ERROR(expression)                                                     \
  do {                                                                                      \
    if (auto api_status = (expression); !api_status)                                        \
      return tl::unexpected<::elasticmoe::server::ApiError>(std::move(api_status.error())); \
  } while (false)
#define API_ASSIGN_OR_RETURN(left, expression) \
  API_ASSIGN_OR_RETURN_INNER(EM_CONCAT(api_result_, __LINE__), left, expression)
#define API_ASSIGN_OR_RETURN_INNER(result, left, expression)                                     \
  auto result = (expression);                                                                    \
  if (!result) return tl::unexpected<::elasticmoe::server::ApiError>(std::move(result.error())); \
  left = *std::move(result)
