#include "model/config_reader.h"

#include <algorithm>
#include <limits>

#include "base/check.h"

namespace elasticmoe::model {
namespace {

constexpr std::size_t kShownBytes = 80;

// False where `value` is no integer or does not fit 64 bits.
bool ToInteger(const Json& value, std::int64_t& out) {
  if (value.is_number_unsigned()) {
    const auto number = value.get<std::uint64_t>();
    if (number > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) return false;
    out = static_cast<std::int64_t>(number);
    return true;
  }
  if (!value.is_number_integer()) return false;
  out = value.get<std::int64_t>();
  return true;
}

}  // namespace

std::string Shown(const Json& value) {
  std::string text = DumpJson(value);
  if (text.size() > kShownBytes) {
    std::size_t end = kShownBytes;
    while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xc0) == 0x80) --end;  // whole characters
    text.resize(end);
    text += "...";
  }
  return text;
}

Status IsObject(const Json& config) {
  if (config.is_object()) return {};
  return Fail(ErrorCode::kInvalidArgument, "found {} (expected a JSON object)", Shown(config));
}

const Json* ConfigReader::Find(const char* key) const {
  const auto it = config_.find(key);
  return it == config_.end() || it->is_null() ? nullptr : &*it;
}

Expected<int> ConfigReader::Int(const char* key, std::int64_t low, std::int64_t high) const {
  EM_CHECK(high <= std::numeric_limits<int>::max() && low >= std::numeric_limits<int>::min());
  const Json* value = Find(key);
  if (!value)
    return Fail(ErrorCode::kInvalidArgument, "{} is missing (expected an integer from {} to {})", key, low,
                high);
  std::int64_t number = 0;
  if (!ToInteger(*value, number) || number < low || number > high)
    return Fail(ErrorCode::kInvalidArgument, "{}={} (expected an integer from {} to {})", key, Shown(*value),
                low, high);
  return static_cast<int>(number);
}

Expected<int> ConfigReader::Int(const char* key, std::int64_t low, std::int64_t high, int fallback) const {
  if (!Find(key)) return fallback;
  return Int(key, low, high);
}

Expected<double> ConfigReader::Number(const char* key, double low, double high, double fallback) const {
  const Json* value = Find(key);
  if (!value) return fallback;
  if (value->is_number()) {
    const auto number = value->get<double>();
    if (number >= low && number <= high) return number;
  }
  return Fail(ErrorCode::kInvalidArgument, "{}={} (expected a number from {} to {})", key, Shown(*value), low,
              high);
}

Expected<bool> ConfigReader::Bool(const char* key, bool fallback) const {
  const Json* value = Find(key);
  if (!value) return fallback;
  if (value->is_boolean()) return value->get<bool>();
  return Fail(ErrorCode::kInvalidArgument, "{}={} (expected true or false)", key, Shown(*value));
}

Expected<std::vector<int>> ConfigReader::Ints(const char* key, std::int64_t low, std::int64_t high) const {
  EM_CHECK(high <= std::numeric_limits<int>::max() && low >= std::numeric_limits<int>::min());
  std::vector<int> numbers;
  const Json* value = Find(key);
  if (!value) return numbers;
  const auto add = [&](const Json& element) {
    std::int64_t number = 0;
    if (!ToInteger(element, number) || number < low || number > high) return false;
    numbers.push_back(static_cast<int>(number));
    return true;
  };
  const bool valid = value->is_array() ? std::ranges::all_of(*value, add) : add(*value);
  if (valid) return numbers;
  return Fail(ErrorCode::kInvalidArgument, "{}={} (expected integers from {} to {})", key, Shown(*value), low,
              high);
}

Status ConfigReader::Only(const char* key, const Json& supported) const {
  const Json* value = Find(key);
  if (!value || *value == supported) return {};
  return Unsupported("{}={} (supported: {})", key, Shown(*value), Shown(supported));
}

ConfigReader ConfigReader::Inside(const Json& object, std::string_view key) const {
  ConfigReader reader(object, unsupported_);
  reader.within_ = fmt::format("{}{}: ", within_, key);
  return reader;
}

Status ConfigReader::Refuse(std::string message) const {
  if (unsupported_ == nullptr) return Fail(ErrorCode::kUnimplemented, "{}", message);
  message.insert(0, within_);
  if (std::ranges::find(*unsupported_, message) == unsupported_->end())
    unsupported_->push_back(std::move(message));
  return {};
}

}  // namespace elasticmoe::model
