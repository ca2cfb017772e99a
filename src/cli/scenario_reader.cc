#include "cli/scenario_reader.h"

#include <cmath>

namespace elasticmoe::cli {

Expected<ScenarioReader> ScenarioReader::Make(const Json& json, std::string where,
                                              std::initializer_list<std::string_view> keys) {
  if (!json.is_object())
    return Fail(ErrorCode::kInvalidArgument, "reading the scenario: {} is no object", where);
  for (const auto& [key, value] : json.items()) {
    bool known = false;
    std::string all;
    for (const std::string_view one : keys) {
      known = known || one == key;
      all += fmt::format("{}{}", all.empty() ? "" : ", ", one);
    }
    if (!known)
      return Fail(ErrorCode::kInvalidArgument, "reading the scenario: unknown key {}.{} (one of {})", where,
                  key, all);
  }
  return ScenarioReader(json, std::move(where));
}

std::string ScenarioReader::Where(std::string_view key) const {
  return fmt::format("{}.{}", where_, key);
}

Expected<double> ScenarioReader::Number(const char* key, double low, double high,
                                        std::optional<double> fallback) const {
  if (!Has(key)) {
    if (fallback) return *fallback;
    return Fail(ErrorCode::kInvalidArgument, "reading the scenario: {} is missing", Where(key));
  }
  const Json& value = json_->at(key);
  if (!value.is_number() || value.get<double>() < low || value.get<double>() > high)
    return Fail(ErrorCode::kInvalidArgument, "reading the scenario: {}={} (limit={}..{})", Where(key),
                DumpJson(value), low, high);
  return value.get<double>();
}

Expected<int> ScenarioReader::Int(const char* key, int low, int high, std::optional<int> fallback) const {
  EM_ASSIGN_OR_RETURN(const double value, Number(key, low, high, fallback));
  if (value != std::floor(value))
    return Fail(ErrorCode::kInvalidArgument, "reading the scenario: {}={} (whole numbers only)", Where(key),
                value);
  return static_cast<int>(value);
}

Expected<std::string> ScenarioReader::Text(const char* key, std::optional<std::string> fallback) const {
  if (!Has(key) && fallback) return *fallback;
  if (!Has(key) || !json_->at(key).is_string())
    return Fail(ErrorCode::kInvalidArgument, "reading the scenario: {} must be a string", Where(key));
  return json_->at(key).get<std::string>();
}

Expected<bool> ScenarioReader::Bool(const char* key, bool fallback) const {
  if (!Has(key)) return fallback;
  if (!json_->at(key).is_boolean())
    return Fail(ErrorCode::kInvalidArgument, "reading the scenario: {} must be true or false", Where(key));
  return json_->at(key).get<bool>();
}

Expected<std::vector<Json>> ScenarioReader::List(const char* key) const {
  std::vector<Json> out;
  if (!Has(key)) return out;
  if (!json_->at(key).is_array())
    return Fail(ErrorCode::kInvalidArgument, "reading the scenario: {} must be a list", Where(key));
  for (const Json& one : json_->at(key)) out.push_back(one);
  return out;
}

}  // namespace elasticmoe::cli
