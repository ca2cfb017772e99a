// Reads the fields of one JSON object with their types and ranges checked. The first error sticks and later
// reads return nothing, so that a parser reads like a list and looks at Status() once. Pure.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/ids.h"
#include "base/json.h"
#include "server/api_error.h"

namespace elasticmoe::server {

class JsonFields {
 public:
  // `prefix` comes before the names in errors: "stream_options.". REQUIRES: `object` is an object and
  // outlives this.
  explicit JsonFields(const Json& object, std::string prefix = "");

  // nullptr where the field is missing or null.
  const Json* Find(std::string_view name) const;

  // Nothing where the field is missing, null or wrong (then Status() says so).
  std::optional<double> Number(std::string_view name, double min, double max);
  std::optional<std::int64_t> Integer(std::string_view name, std::int64_t min, std::int64_t max);
  std::optional<bool> Bool(std::string_view name);
  std::optional<std::string> String(std::string_view name);
  std::optional<std::vector<TokenId>> TokenIds(std::string_view name, int vocab, std::size_t max_count);

  // Takes the value of a field into `target` where it is there.
  void Read(std::string_view name, bool& target);
  void Read(std::string_view name, float& target, double min, double max);
  void Read(std::string_view name, int& target, std::int64_t min, std::int64_t max);

  template <class... Args>
  void Refuse(std::string_view name, fmt::format_string<Args...> format, Args&&... args) {
    if (!error_)
      error_ = ApiError{
          .message = fmt::format("{}{}: {}", prefix_, name, fmt::format(format, std::forward<Args>(args)...)),
          .param = prefix_ + std::string(name)};
  }

  bool Ok() const { return !error_; }
  ApiResult<void> Status() const;

 private:
  const Json& object_;
  std::string prefix_;
  std::optional<ApiError> error_;
};

std::string_view TypeName(const Json& value);  // "a string", "an array", ... for messages

// Checked [0, vocab) ids of an array; the first bad element is named by `name`[index].
ApiResult<std::vector<TokenId>> ReadTokenIds(const Json& array, std::string_view name, int vocab);

}  // namespace elasticmoe::server
