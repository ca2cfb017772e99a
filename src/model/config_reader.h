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
  explicit ConfigReader(const Json& config) : config_(config) {}

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

  // kUnimplemented unless the key is absent, null or equal to `supported`.
  Status Only(const char* key, const Json& supported) const;

 private:
  const Json& config_;
};

// kInvalidArgument unless `config` is a JSON object.
Status IsObject(const Json& config);

}  // namespace elasticmoe::model
