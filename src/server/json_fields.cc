#include "server/json_fields.h"

#include <cmath>

namespace elasticmoe::server {
namespace {

// An integer, or a float without fraction (5.0), as far as int64 holds it.
std::optional<std::int64_t> AsInteger(const Json& value) {
  if (value.is_number_unsigned()) {
    const auto v = value.get<std::uint64_t>();
    if (v > static_cast<std::uint64_t>(INT64_MAX)) return std::nullopt;
    return static_cast<std::int64_t>(v);
  }
  if (value.is_number_integer()) return value.get<std::int64_t>();
  if (value.is_number_float()) {
    const double v = value.get<double>();
    if (std::trunc(v) == v && std::abs(v) < 9.0e18) return static_cast<std::int64_t>(v);
  }
  return std::nullopt;
}

// Short text of a value for a message.
std::string Shown(const Json& value) {
  std::string text = DumpJson(value);
  if (text.size() > 40) {
    text.resize(40);
    while (!text.empty() && (static_cast<unsigned char>(text.back()) & 0x80U) != 0) text.pop_back();
    text += "...";
  }
  return text;
}

}  // namespace

std::string_view TypeName(const Json& value) {
  switch (value.type()) {
    case Json::value_t::null:
      return "null";
    case Json::value_t::object:
      return "an object";
    case Json::value_t::array:
      return "an array";
    case Json::value_t::string:
      return "a string";
    case Json::value_t::boolean:
      return "a boolean";
    case Json::value_t::number_integer:
    case Json::value_t::number_unsigned:
    case Json::value_t::number_float:
      return "a number";
    default:
      return "something else";
  }
}

JsonFields::JsonFields(const Json& object, std::string prefix)
    : object_(object), prefix_(std::move(prefix)) {}

const Json* JsonFields::Find(std::string_view name) const {
  const auto it = object_.find(std::string(name));
  return it == object_.end() || it->is_null() ? nullptr : &*it;
}

std::optional<double> JsonFields::Number(std::string_view name, double min, double max) {
  const Json* value = Find(name);
  if (value == nullptr) return std::nullopt;
  if (!value->is_number()) {
    Refuse(name, "must be a number, found {}", TypeName(*value));
    return std::nullopt;
  }
  const double number = value->get<double>();
  if (!std::isfinite(number) || number < min || number > max) {
    Refuse(name, "must be between {} and {}, found {}", min, max, Shown(*value));
    return std::nullopt;
  }
  return number;
}

std::optional<std::int64_t> JsonFields::Integer(std::string_view name, std::int64_t min, std::int64_t max) {
  const Json* value = Find(name);
  if (value == nullptr) return std::nullopt;
  if (!value->is_number()) {
    Refuse(name, "must be an integer, found {}", TypeName(*value));
    return std::nullopt;
  }
  const auto number = AsInteger(*value);
  if (!number || *number < min || *number > max) {
    Refuse(name, "must be an integer between {} and {}, found {}", min, max, Shown(*value));
    return std::nullopt;
  }
  return number;
}

std::optional<bool> JsonFields::Bool(std::string_view name) {
  const Json* value = Find(name);
  if (value == nullptr) return std::nullopt;
  if (!value->is_boolean()) {
    Refuse(name, "must be true or false, found {}", TypeName(*value));
    return std::nullopt;
  }
  return value->get<bool>();
}

std::optional<std::string> JsonFields::String(std::string_view name) {
  const Json* value = Find(name);
  if (value == nullptr) return std::nullopt;
  if (!value->is_string()) {
    Refuse(name, "must be a string, found {}", TypeName(*value));
    return std::nullopt;
  }
  return value->get<std::string>();
}

std::optional<std::vector<TokenId>> JsonFields::TokenIds(std::string_view name, int vocab,
                                                         std::size_t max_count) {
  const Json* value = Find(name);
  if (value == nullptr) return std::nullopt;
  if (!value->is_array()) {
    Refuse(name, "must be an array of token ids, found {}", TypeName(*value));
    return std::nullopt;
  }
  if (value->size() > max_count) {
    Refuse(name, "has {} entries (limit={})", value->size(), max_count);
    return std::nullopt;
  }
  auto ids = ReadTokenIds(*value, prefix_ + std::string(name), vocab);
  if (!ids) {
    if (!error_) error_ = ids.error();
    return std::nullopt;
  }
  return *std::move(ids);
}

void JsonFields::Read(std::string_view name, bool& target) {
  if (auto value = Bool(name)) target = *value;
}

void JsonFields::Read(std::string_view name, float& target, double min, double max) {
  if (auto value = Number(name, min, max)) target = static_cast<float>(*value);
}

void JsonFields::Read(std::string_view name, int& target, std::int64_t min, std::int64_t max) {
  if (auto value = Integer(name, min, max)) target = static_cast<int>(*value);
}

ApiResult<void> JsonFields::Status() const {
  if (error_) return tl::unexpected<ApiError>(*error_);
  return {};
}

ApiResult<std::vector<TokenId>> ReadTokenIds(const Json& array, std::string_view name, int vocab) {
  std::vector<TokenId> ids;
  ids.reserve(array.size());
  for (std::size_t i = 0; i < array.size(); ++i) {
    const Json& value = array[i];
    const auto id = AsInteger(value);
    if (!value.is_number() || !id)
      return BadField(name, "{}[{}]: must be a token id, found {}", name, i, Shown(value));
    if (*id < 0 || *id >= vocab)
      return BadField(name, "{}[{}]: token id {} is outside of the vocabulary (0..{})", name, i, *id,
                      vocab - 1);
    ids.push_back(static_cast<TokenId>(*id));
  }
  return ids;
}

}  // namespace elasticmoe::server
