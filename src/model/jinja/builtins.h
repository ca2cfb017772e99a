// What the language brings along: filters, tests, functions, the methods of texts, lists and dicts.
#pragma once

#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "model/jinja/value.h"

namespace elasticmoe::model::jinja {

using FilterFunction = Expected<Value> (*)(Context& context, const Value& input, const Args& args);
using TestFunction = Expected<bool> (*)(Context& context, const Value& input, const Args& args);

// nullptr where there is none of that name.
FilterFunction FindFilter(std::string_view name);
TestFunction FindTest(std::string_view name);

// A global function (range, dict, ...); nullptr where there is none.
std::shared_ptr<const Callable> FindFunction(std::string_view name);

// `object`.name and `object`[key] with Jinja's order of looking: methods first for a dot, items first for
// brackets.
Expected<Value> GetAttribute(Context& context, const Value& object, std::string_view name);
Expected<Value> GetItem(Context& context, const Value& object, const Value& key);
// `object`[start:stop:step]; nullopt where a part is left out.
struct SliceBounds {
  std::optional<std::int64_t> start, stop, step;
};
Expected<Value> GetSlice(Context& context, const Value& object, const SliceBounds& bounds);

// A method of `object` bound to it; nullopt where there is none.
std::optional<Value> FindMethod(const Value& object, std::string_view name);

// A function of ours as a value; `self` comes first.
using BuiltinFunction = Expected<Value> (*)(Context& context, const Value& self, const Args& args);
Value MakeFunction(BuiltinFunction function, Value self = Value());

// The arguments of a call in the order of `names`, nullptr where left out. kInvalidArgument where there are
// too many or one of another name.
Expected<std::vector<const Value*>> Bind(std::string_view function, const Args& args,
                                         std::initializer_list<std::string_view> names);

// An integer argument, `otherwise` where it is left out or None.
Expected<std::int64_t> IntegerOr(const Value* value, std::int64_t otherwise, std::string_view what);
Expected<std::string_view> RequireText(const Value* value, std::string_view what);

// "%s and %d" % values.
Expected<Value> FormatPercent(Context& context, std::string_view format, const std::vector<Value>& values);

}  // namespace elasticmoe::model::jinja
