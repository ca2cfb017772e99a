// Reads typed, range-checked values from a JSON object that others wrote (config.json,
// generation_config.json). Errors read `key=found (expected ...)`; the caller puts the file's name before.
// Pure.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/json.h"

namespace elasticmoe::model {

// Foreign values as shown in errors: compact JSON on one line, cut to 80 bytes.
std::string Shown(const Json& value);

class ConfigReader {
 public:
  // `config` must be an object and outlive the reader: check with IsObject first.
  // What is not supported goes to `unsupported`, each once, and reading goes on as if it were not there, so
  // that all of it can be told at once; without one it is an error like others.
  explicit ConfigReader(const Json& config, std::vector<std::string>* unsupported = nullptr)
      : config_(config), unsupported_(unsupported) {}

  // A reader of an object inside of this one; what it does not support is told as "key: ...".
  ConfigReader Inside(const Json& object, std::string_view key) const;

  // All keys and values.
  auto Items() const { return config_.items(); }

  // The value, or nullptr where the key is absent or null.
  const Json* Find(const char* key) const;

  // kInvalidArgument where the value is of another type or outside of [low, high]. Without `fallback`
  // the key is required.
  Expected<int> Int(const char* key, std::int64_t low, std::int64_t high) const;
  Expected<int> Int(const char* key, std::int64_t low, std::int64_t high, int fallback) const;
  Expected<double> Number(const char* key, double low, double high, double fallback) const;
  Expected<bool> Bool(const char* key, bool fallback) const;

  // One integer, a list of them, or none where the key is absent; each in [low, high].
  Expected<std::vector<int>> Ints(const char* key, std::int64_t low, std::int64_t high) const;

  // Unsupported unless the key is absent, null or equal to `supported`.
  Status Only(const char* key, const Json& supported) const;

  // Tells of a setting that is not supported: kUnimplemented, or success where they are gathered.
  template <class... Args>
  Status Unsupported(fmt::format_string<Args...> text, Args&&... args) const {
    return Refuse(fmt::format(text, std::forward<Args>(args)...));
  }

 private:
  Status Refuse(std::string message) const;

  const Json& config_;
  std::vector<std::string>* unsupported_;
  std::string within_;  // "key: "
};

// kInvalidArgument unless `config` is a JSON object.
Status IsObject(const Json& config);

}  // namespace elasticmoe::model
