// Reading JSON objects of scenario files: every key is known, every value within its limits, and messages
// name the place. Pure.
#pragma once

#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/json.h"

namespace elasticmoe::cli {

class ScenarioReader {
 public:
  // `json` must outlive the reader. kInvalidArgument: no object, or a key that is none of `keys`.
  static Expected<ScenarioReader> Make(const Json& json, std::string where,
                                       std::initializer_list<std::string_view> keys);

  bool Has(const char* key) const { return json_->contains(key); }
  const Json& operator[](const char* key) const { return json_->at(key); }
  std::string Where(std::string_view key) const;

  // kInvalidArgument: missing without a fallback, of another type, out of low..high.
  Expected<double> Number(const char* key, double low, double high,
                          std::optional<double> fallback = {}) const;
  Expected<int> Int(const char* key, int low, int high, std::optional<int> fallback = {}) const;
  Expected<std::string> Text(const char* key, std::optional<std::string> fallback = {}) const;
  Expected<bool> Bool(const char* key, bool fallback) const;
  // The elements of a list; empty where the key is not there.
  Expected<std::vector<Json>> List(const char* key) const;

 private:
  ScenarioReader(const Json& json, std::string where) : json_(&json), where_(std::move(where)) {}
  const Json* json_;
  std::string where_;
};

}  // namespace elasticmoe::cli
