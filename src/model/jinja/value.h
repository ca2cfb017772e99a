// Values of the template language, as Python has them. Strings, lists and dicts never change once made (as in
// Jinja's immutable sandbox), so they are shared; only a namespace can be assigned to. Texts are UTF-8.
//
// Invariants: 1. a list, dict or bound method is nested at most kMaxDepth deep, so walks over values may
// recurse;
// 2. all that a template makes is paid for in a Context, so it ends in bounded time and memory.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "base/error.h"
#include "base/json.h"

namespace elasticmoe::model::jinja {

class Value;
class Context;
struct List;
class Dict;
struct Namespace;
struct Loop;
class Callable;

using Text = std::shared_ptr<const std::string>;

// What a missing name, attribute or item gives: prints as "" and is false, but most other uses are errors.
struct Undefined {
  Text why;  // what to say then
};

class Value {
 public:
  Value() : data_(std::monostate{}) {}  // None
  explicit Value(bool value) : data_(value) {}
  explicit Value(std::int64_t value) : data_(value) {}
  explicit Value(double value) : data_(value) {}
  explicit Value(Text value) : data_(std::move(value)) {}
  explicit Value(std::string value) : data_(std::make_shared<const std::string>(std::move(value))) {}
  explicit Value(Undefined value) : data_(std::move(value)) {}
  explicit Value(std::shared_ptr<const List> value) : data_(std::move(value)) {}
  explicit Value(std::shared_ptr<const Dict> value) : data_(std::move(value)) {}
  explicit Value(std::shared_ptr<Namespace> value) : data_(std::move(value)) {}
  explicit Value(std::shared_ptr<Loop> value) : data_(std::move(value)) {}
  explicit Value(std::shared_ptr<const Callable> value) : data_(std::move(value)) {}

  bool IsNone() const { return std::holds_alternative<std::monostate>(data_); }
  const Undefined* AsUndefined() const { return std::get_if<Undefined>(&data_); }
  const bool* AsBool() const { return std::get_if<bool>(&data_); }
  const std::int64_t* AsInt() const { return std::get_if<std::int64_t>(&data_); }
  const double* AsFloat() const { return std::get_if<double>(&data_); }
  const std::string* AsText() const {
    const Text* text = std::get_if<Text>(&data_);
    return text ? text->get() : nullptr;
  }
  const List* AsList() const { return Pointer<const List>(); }  // a list or a tuple
  const Dict* AsDict() const { return Pointer<const Dict>(); }
  Namespace* AsNamespace() const { return Pointer<Namespace>(); }
  Loop* AsLoop() const { return Pointer<Loop>(); }
  const Callable* AsCallable() const { return Pointer<const Callable>(); }

  // An int or bool as int, as in Python.
  std::optional<std::int64_t> Integer() const;
  // An int, bool or float.
  std::optional<double> Number() const;

 private:
  template <class T>
  T* Pointer() const {
    const auto* at = std::get_if<std::shared_ptr<T>>(&data_);
    return at ? at->get() : nullptr;
  }

  std::variant<std::monostate, Undefined, bool, std::int64_t, double, Text, std::shared_ptr<const List>,
               std::shared_ptr<const Dict>, std::shared_ptr<Namespace>, std::shared_ptr<Loop>,
               std::shared_ptr<const Callable>>
      data_;
};

struct List {
  std::vector<Value> items;
  bool tuple = false;
  int depth = 1;
};

// Keeps the order in which keys came.
class Dict {
 public:
  struct Entry {
    std::string hash;  // equal for equal keys
    Value key, value;
  };

  // Sets `key`, in its old place if it is there. kInvalidArgument where the key is not hashable.
  Status Set(Value key, Value value);
  const Value* Find(const Value& key) const;  // nullptr also for keys that are not hashable
  const Value* Find(std::string_view text) const;
  const std::vector<Entry>& Entries() const { return entries_; }
  int depth = 1;

 private:
  std::size_t At(const std::string& hash) const;  // entries_.size() if it is not there

  std::vector<Entry> entries_;
  std::unordered_map<std::string, std::size_t> index_;  // filled when linear search gets slow
};

struct Namespace {
  Dict values;
};

struct Loop {
  std::shared_ptr<const List> items;
  std::size_t index0 = 0;
  int depth0 = 0;
  const void* statement = nullptr;  // the recursive loop that loop(...) runs again
};

struct Args {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;
};

class Callable {
 public:
  virtual ~Callable() = default;
  virtual Expected<Value> Call(Context& context, Args args) const = 0;
  virtual int Depth() const { return 0; }
};

// What a rendering may still spend, and how values are made. One per rendering; not thread-safe.
class Context {
 public:
  static constexpr int kMaxDepth = 200;                  // of nested values; JSON comes with at most 128
  static constexpr std::int64_t kMaxSteps = 10'000'000;  // about a second
  static constexpr std::size_t kMaxBytes = std::size_t{512} << 20;     // of all texts made
  static constexpr std::size_t kMaxTextBytes = std::size_t{16} << 20;  // of one text

  explicit Context(std::int64_t now_unix_s) : now_unix_s_(now_unix_s) {}
  virtual ~Context() = default;

  // kResourceExhausted when the budget is spent. Call ahead of the work.
  Status Spend(std::size_t steps);
  Status SpendBytes(std::size_t bytes);

  Expected<Value> MakeText(std::string text);
  Expected<Value> MakeList(std::vector<Value> items, bool tuple = false);
  Expected<Value> MakeDict(Dict dict);
  Expected<Value> MakeNamespace(Dict values);
  Expected<Value> FromJson(const Json& json);

  std::int64_t NowUnixSeconds() const { return now_unix_s_; }

  // The error that is under way has the words of raise_exception.
  void NoteRaised() { raised_ = true; }
  bool WasRaised() const { return raised_; }

  // Empties all namespaces: they alone can hold themselves.
  void ClearNamespaces();

 private:
  std::int64_t steps_ = 0;
  std::size_t bytes_ = 0;
  std::int64_t now_unix_s_;
  bool raised_ = false;
  std::vector<std::shared_ptr<Namespace>> namespaces_;
};

Value MakeUndefined(std::string why);
tl::unexpected<Error> TypeError(std::string message);

bool Truth(const Value& value);
std::string_view TypeName(const Value& value);  // Python's name of the type
int Depth(const Value& value);

// Equal keys have equal texts. kInvalidArgument for what Python cannot hash.
Expected<std::string> HashOf(const Value& value);

// str(value), repr(value), json.dumps(value).
Expected<std::string> ToText(Context& context, const Value& value);
Expected<std::string> ToRepr(Context& context, const Value& value);
struct JsonStyle {
  int indent = -1;  // -1 = on one line
  bool ascii = false, sort_keys = false;
  std::string item_separator = ", ", key_separator = ": ";
};
Expected<std::string> ToJsonText(Context& context, const Value& value, const JsonStyle& style);

// What a loop walks over: items, keys, characters. An error where the value cannot be walked over.
Expected<std::shared_ptr<const List>> Iterate(Context& context, const Value& value);

}  // namespace elasticmoe::model::jinja
