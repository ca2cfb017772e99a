#include "model/jinja/value.h"

#include <cmath>
#include <limits>

#include "base/check.h"
#include "model/jinja/text.h"
#include "model/tokenizer/unicode.h"

namespace elasticmoe::model::jinja {
namespace {

constexpr std::size_t kLinearSearch = 8;        // up to here scanning beats hashing
constexpr std::size_t kMaxNamespaces = 10'000;  // they live until the end of the rendering

}  // namespace

std::optional<std::int64_t> Value::Integer() const {
  if (const auto* value = AsInt()) return *value;
  if (const auto* value = AsBool()) return *value ? 1 : 0;
  return std::nullopt;
}

std::optional<double> Value::Number() const {
  if (const auto* value = AsFloat()) return *value;
  if (const auto value = Integer()) return static_cast<double>(*value);
  return std::nullopt;
}

std::size_t Dict::At(const std::string& hash) const {
  if (!index_.empty()) {
    const auto at = index_.find(hash);
    return at == index_.end() ? entries_.size() : at->second;
  }
  std::size_t i = 0;
  while (i < entries_.size() && entries_[i].hash != hash) ++i;
  return i;
}

Status Dict::Set(Value key, Value value) {
  EM_ASSIGN_OR_RETURN(std::string hash, HashOf(key));
  depth = std::max({depth, 1 + Depth(key), 1 + Depth(value)});
  const std::size_t at = At(hash);
  if (at < entries_.size()) {
    entries_[at].value = std::move(value);
    return {};
  }
  entries_.push_back({std::move(hash), std::move(key), std::move(value)});
  if (entries_.size() <= kLinearSearch) return {};
  for (std::size_t i = index_.size(); i < entries_.size(); ++i) index_.emplace(entries_[i].hash, i);
  return {};
}

const Value* Dict::Find(const Value& key) const {
  const auto hash = HashOf(key);
  if (!hash) return nullptr;
  const std::size_t at = At(*hash);
  return at < entries_.size() ? &entries_[at].value : nullptr;
}

const Value* Dict::Find(std::string_view text) const {
  const std::size_t at = At(std::string("s").append(text));
  return at < entries_.size() ? &entries_[at].value : nullptr;
}

Status Context::Spend(std::size_t steps) {
  if (steps > static_cast<std::size_t>(kMaxSteps - steps_))
    return Fail(ErrorCode::kResourceExhausted, "the template takes too long (limit={} steps)", kMaxSteps);
  steps_ += static_cast<std::int64_t>(steps);
  return {};
}

Status Context::SpendBytes(std::size_t bytes) {
  if (bytes > kMaxTextBytes)
    return Fail(ErrorCode::kResourceExhausted, "the template makes a text of {} bytes (limit={})", bytes,
                kMaxTextBytes);
  if (bytes > kMaxBytes - bytes_)
    return Fail(ErrorCode::kResourceExhausted, "the template makes too much text (limit={} bytes)",
                kMaxBytes);
  bytes_ += bytes;
  return {};
}

Expected<Value> Context::MakeText(std::string text) {
  EM_RETURN_IF_ERROR(SpendBytes(text.size()));
  return Value(std::move(text));
}

Expected<Value> Context::MakeList(std::vector<Value> items, bool tuple) {
  EM_RETURN_IF_ERROR(Spend(items.size()));
  auto list = std::make_shared<List>();
  for (const Value& item : items) list->depth = std::max(list->depth, 1 + Depth(item));
  if (list->depth > kMaxDepth)
    return Fail(ErrorCode::kResourceExhausted, "lists nested deeper than {}", kMaxDepth);
  list->items = std::move(items);
  list->tuple = tuple;
  return Value(std::shared_ptr<const List>(std::move(list)));
}

Expected<Value> Context::MakeDict(Dict dict) {
  EM_RETURN_IF_ERROR(Spend(dict.Entries().size()));
  if (dict.depth > kMaxDepth)
    return Fail(ErrorCode::kResourceExhausted, "dicts nested deeper than {}", kMaxDepth);
  return Value(std::make_shared<const Dict>(std::move(dict)));
}

Expected<Value> Context::MakeNamespace(Dict values) {
  if (namespaces_.size() >= kMaxNamespaces)
    return Fail(ErrorCode::kResourceExhausted, "more than {} namespaces", kMaxNamespaces);
  namespaces_.push_back(std::make_shared<Namespace>(Namespace{std::move(values)}));
  return Value(namespaces_.back());
}

void Context::ClearNamespaces() {
  for (const auto& one : namespaces_) one->values = Dict();
}

Expected<Value> Context::FromJson(const Json& json) {
  EM_RETURN_IF_ERROR(Spend(1));
  switch (json.type()) {
    case Json::value_t::boolean:
      return Value(json.get<bool>());
    case Json::value_t::number_integer:
      return Value(json.get<std::int64_t>());
    case Json::value_t::number_unsigned: {
      const auto value = json.get<std::uint64_t>();
      if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()))
        return Value(static_cast<double>(value));
      return Value(static_cast<std::int64_t>(value));
    }
    case Json::value_t::number_float:
      return Value(json.get<double>());
    case Json::value_t::string: {
      const auto& text = json.get_ref<const std::string&>();
      return MakeText(IsUtf8(text) ? text : RepairUtf8(text));
    }
    case Json::value_t::array: {
      std::vector<Value> items;
      items.reserve(json.size());
      for (const Json& one : json) {
        EM_ASSIGN_OR_RETURN(Value item, FromJson(one));
        items.push_back(std::move(item));
      }
      return MakeList(std::move(items));
    }
    case Json::value_t::object: {
      Dict dict;
      for (const auto& [key, one] : json.items()) {
        EM_ASSIGN_OR_RETURN(Value value, FromJson(one));
        EM_RETURN_IF_ERROR(dict.Set(Value(RepairUtf8(key)), std::move(value)));
      }
      return MakeDict(std::move(dict));
    }
    case Json::value_t::null:
    case Json::value_t::binary:
    case Json::value_t::discarded:
      break;
  }
  return Value();
}

Value MakeUndefined(std::string why) {
  return Value(Undefined{std::make_shared<const std::string>(std::move(why))});
}

tl::unexpected<Error> TypeError(std::string message) {
  return tl::unexpected<Error>(Error{ErrorCode::kInvalidArgument, std::move(message)});
}

bool Truth(const Value& value) {
  if (value.IsNone() || value.AsUndefined()) return false;
  if (const auto* b = value.AsBool()) return *b;
  if (const auto* i = value.AsInt()) return *i != 0;
  if (const auto* f = value.AsFloat()) return *f != 0;
  if (const auto* text = value.AsText()) return !text->empty();
  if (const auto* list = value.AsList()) return !list->items.empty();
  if (const auto* dict = value.AsDict()) return !dict->Entries().empty();
  return true;
}

std::string_view TypeName(const Value& value) {
  if (value.IsNone()) return "NoneType";
  if (value.AsUndefined()) return "Undefined";
  if (value.AsBool()) return "bool";
  if (value.AsInt()) return "int";
  if (value.AsFloat()) return "float";
  if (value.AsText()) return "str";
  if (const auto* list = value.AsList()) return list->tuple ? "tuple" : "list";
  if (value.AsDict()) return "dict";
  if (value.AsNamespace()) return "Namespace";
  if (value.AsLoop()) return "LoopContext";
  return "function";
}

int Depth(const Value& value) {
  if (const auto* list = value.AsList()) return list->depth;
  if (const auto* dict = value.AsDict()) return dict->depth;
  if (const auto* loop = value.AsLoop()) return 1 + loop->items->depth;
  if (const auto* callable = value.AsCallable()) return callable->Depth();
  return 0;
}

Expected<std::string> HashOf(const Value& value) {
  if (const auto* text = value.AsText()) return "s" + *text;
  if (value.IsNone()) return "None";
  if (const auto integer = value.Integer()) return fmt::format("n{}", *integer);
  if (const auto* number = value.AsFloat()) {
    // 1 and 1.0 are the same key. 2^63 is the first float that no int64 equals.
    if (std::trunc(*number) == *number && std::fabs(*number) < 0x1.0p63)
      return fmt::format("n{}", static_cast<std::int64_t>(*number));
    return "f" + FormatFloat(*number);
  }
  if (const auto* list = value.AsList(); list != nullptr && list->tuple) {
    std::string out = "(";
    for (const Value& item : list->items) {
      EM_ASSIGN_OR_RETURN(const std::string hash, HashOf(item));
      // Lengths keep ("a", "b") apart from ("a,b").
      out += fmt::format("{}:{}", hash.size(), hash);
      if (out.size() > Context::kMaxTextBytes)
        return Fail(ErrorCode::kResourceExhausted, "a tuple too large for a key");
    }
    return out;
  }
  return TypeError(fmt::format("unhashable type: '{}'", TypeName(value)));
}

Expected<std::shared_ptr<const List>> Iterate(Context& context, const Value& value) {
  auto list = std::make_shared<List>();
  if (const auto* text = value.AsText()) {
    EM_RETURN_IF_ERROR(context.Spend(text->size()));
    for (std::size_t i = 0; i < text->size();) {
      const std::size_t bytes = CharBytes(*text, i);
      list->items.emplace_back(text->substr(i, bytes));
      i += bytes;
    }
  } else if (const auto* items = value.AsList()) {
    EM_RETURN_IF_ERROR(context.Spend(items->items.size()));
    *list = *items;
  } else if (const auto* dict = value.AsDict()) {
    EM_RETURN_IF_ERROR(context.Spend(dict->Entries().size()));
    for (const Dict::Entry& entry : dict->Entries()) list->items.push_back(entry.key);
    list->depth = dict->depth;
  } else if (!value.AsUndefined()) {
    return TypeError(fmt::format("'{}' object is not iterable", TypeName(value)));
  }
  list->tuple = false;
  return list;
}

}  // namespace elasticmoe::model::jinja
