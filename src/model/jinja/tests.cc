// Tests: value is name(arguments).
#include <unordered_map>

#include "model/jinja/builtins.h"
#include "model/jinja/operators.h"
#include "model/jinja/text.h"

namespace elasticmoe::model::jinja {
namespace {

// A test without arguments from a predicate.
template <bool (*kPredicate)(const Value&)>
Expected<bool> Plain(Context&, const Value& input, const Args& args) {
  EM_RETURN_IF_ERROR(Bind("a test", args, {}));
  return kPredicate(input);
}

template <Op kOp>
Expected<bool> Comparison(Context& context, const Value& input, const Args& args) {
  EM_ASSIGN_OR_RETURN(const auto bound, Bind("a test", args, {"other"}));
  if (bound[0] == nullptr) return TypeError("a test needs a value to compare with");
  return Compare(context, kOp, input, *bound[0]);
}

bool IsDefined(const Value& value) {
  return value.AsUndefined() == nullptr;
}
bool IsUndefined(const Value& value) {
  return value.AsUndefined() != nullptr;
}
bool IsNone(const Value& value) {
  return value.IsNone();
}
bool IsText(const Value& value) {
  return value.AsText() != nullptr;
}
bool IsMapping(const Value& value) {
  return value.AsDict() != nullptr;
}
bool IsSequence(const Value& value) {
  return value.AsText() || value.AsList() || value.AsDict() || value.AsUndefined();
}
bool IsIterable(const Value& value) {
  return IsSequence(value) || value.AsLoop();
}
bool IsNumber(const Value& value) {
  return value.Number().has_value();
}
bool IsInteger(const Value& value) {
  return value.AsInt() != nullptr;
}
bool IsFloat(const Value& value) {
  return value.AsFloat() != nullptr;
}
bool IsBoolean(const Value& value) {
  return value.AsBool() != nullptr;
}
bool IsTrue(const Value& value) {
  return value.AsBool() && *value.AsBool();
}
bool IsFalse(const Value& value) {
  return value.AsBool() && !*value.AsBool();
}
bool IsCallable(const Value& value) {
  return value.AsCallable() != nullptr;
}

Expected<bool> HasRest(Context& context, const Value& input, std::int64_t divisor, std::int64_t rest) {
  EM_ASSIGN_OR_RETURN(const Value found, Binary(context, Op::kMod, input, Value(divisor)));
  return Equals(context, found, Value(rest));
}

Expected<bool> Odd(Context& context, const Value& input, const Args&) {
  return HasRest(context, input, 2, 1);
}
Expected<bool> Even(Context& context, const Value& input, const Args&) {
  return HasRest(context, input, 2, 0);
}

Expected<bool> DivisibleBy(Context& context, const Value& input, const Args& args) {
  EM_ASSIGN_OR_RETURN(const auto bound, Bind("divisibleby", args, {"num"}));
  if (bound[0] == nullptr) return TypeError("divisibleby needs a number");
  EM_ASSIGN_OR_RETURN(const Value rest, Binary(context, Op::kMod, input, *bound[0]));
  return Equals(context, rest, Value(std::int64_t{0}));
}

Expected<bool> SameAs(Context& context, const Value& input, const Args& args) {
  EM_ASSIGN_OR_RETURN(const auto bound, Bind("sameas", args, {"other"}));
  if (bound[0] == nullptr) return TypeError("sameas needs a value");
  // Identity matters for None, True and False; equal values of one type are as good as the same.
  if (TypeName(input) != TypeName(*bound[0])) return false;
  return Equals(context, input, *bound[0]);
}

// All cased characters are in that case, and there is one.
Expected<bool> IsLower(Context& context, const Value& input, const Args&) {
  EM_ASSIGN_OR_RETURN(const std::string text, ToText(context, input));
  return Lower(text) == text && Upper(text) != text;
}
Expected<bool> IsUpper(Context& context, const Value& input, const Args&) {
  EM_ASSIGN_OR_RETURN(const std::string text, ToText(context, input));
  return Upper(text) == text && Lower(text) != text;
}

}  // namespace

TestFunction FindTest(std::string_view name) {
  static const std::unordered_map<std::string_view, TestFunction> tests = {
      {"!=", Comparison<Op::kNotEqual>},
      {"<", Comparison<Op::kLess>},
      {"<=", Comparison<Op::kLessEqual>},
      {"==", Comparison<Op::kEqual>},
      {">", Comparison<Op::kGreater>},
      {">=", Comparison<Op::kGreaterEqual>},
      {"boolean", Plain<IsBoolean>},
      {"callable", Plain<IsCallable>},
      {"defined", Plain<IsDefined>},
      {"divisibleby", DivisibleBy},
      {"eq", Comparison<Op::kEqual>},
      {"equalto", Comparison<Op::kEqual>},
      {"even", Even},
      {"false", Plain<IsFalse>},
      {"float", Plain<IsFloat>},
      {"ge", Comparison<Op::kGreaterEqual>},
      {"greaterthan", Comparison<Op::kGreater>},
      {"gt", Comparison<Op::kGreater>},
      {"in", Comparison<Op::kIn>},
      {"integer", Plain<IsInteger>},
      {"iterable", Plain<IsIterable>},
      {"le", Comparison<Op::kLessEqual>},
      {"lessthan", Comparison<Op::kLess>},
      {"lower", IsLower},
      {"lt", Comparison<Op::kLess>},
      {"mapping", Plain<IsMapping>},
      {"ne", Comparison<Op::kNotEqual>},
      {"none", Plain<IsNone>},
      {"number", Plain<IsNumber>},
      {"odd", Odd},
      {"sameas", SameAs},
      {"sequence", Plain<IsSequence>},
      {"string", Plain<IsText>},
      {"true", Plain<IsTrue>},
      {"undefined", Plain<IsUndefined>},
      {"upper", IsUpper},
  };
  const auto at = tests.find(name);
  return at == tests.end() ? nullptr : at->second;
}

}  // namespace elasticmoe::model::jinja
