#include "model/jinja/operators.h"

#include <cmath>

#include "model/jinja/text.h"

namespace elasticmoe::model::jinja {
namespace {

constexpr std::string_view kSymbols[] = {"+", "-", "*", "/", "//", "%", "**"};

tl::unexpected<Error> Unsupported(Op op, const Value& left, const Value& right) {
  for (const Value* value : {&left, &right})
    if (const auto* undefined = value->AsUndefined()) return TypeError(*undefined->why);
  return TypeError(fmt::format("unsupported operand type(s) for {}: '{}' and '{}'",
                               kSymbols[static_cast<int>(op)], TypeName(left), TypeName(right)));
}

tl::unexpected<Error> TooLarge() {
  return TypeError("an integer is too large (limit=64 bits)");
}

Expected<std::int64_t> Power(std::int64_t base, std::int64_t exponent) {
  std::int64_t result = 1;
  while (true) {
    if ((exponent & 1) != 0 && __builtin_mul_overflow(result, base, &result)) return TooLarge();
    exponent >>= 1;
    if (exponent == 0) return result;
    if (__builtin_mul_overflow(base, base, &base)) return TooLarge();
  }
}

// The quotient is rounded down and the remainder has the divisor's sign, as in Python.
Expected<Value> IntegerOperation(Op op, std::int64_t a, std::int64_t b) {
  std::int64_t result = 0;
  switch (op) {
    case Op::kAdd:
      if (__builtin_add_overflow(a, b, &result)) return TooLarge();
      return Value(result);
    case Op::kSub:
      if (__builtin_sub_overflow(a, b, &result)) return TooLarge();
      return Value(result);
    case Op::kMul:
      if (__builtin_mul_overflow(a, b, &result)) return TooLarge();
      return Value(result);
    case Op::kPow: {
      if (b < 0) {
        if (a == 0) return TypeError("0.0 cannot be raised to a negative power");
        return Value(std::pow(static_cast<double>(a), static_cast<double>(b)));
      }
      EM_ASSIGN_OR_RETURN(result, Power(a, b));
      return Value(result);
    }
    default:
      break;
  }
  if (b == 0) return TypeError("division by zero");
  if (op == Op::kDiv) return Value(static_cast<double>(a) / static_cast<double>(b));
  if (b == -1) return op == Op::kMod ? Value(std::int64_t{0}) : IntegerOperation(Op::kSub, 0, a);
  const bool down = a % b != 0 && (a < 0) != (b < 0);
  if (op == Op::kFloorDiv) return Value(a / b - (down ? 1 : 0));
  return Value(a % b + (down ? b : 0));
}

Expected<Value> FloatOperation(Op op, double a, double b) {
  switch (op) {
    case Op::kAdd:
      return Value(a + b);
    case Op::kSub:
      return Value(a - b);
    case Op::kMul:
      return Value(a * b);
    case Op::kPow:
      if (a == 0 && b < 0) return TypeError("0.0 cannot be raised to a negative power");
      if (a < 0 && std::trunc(b) != b) return TypeError("complex numbers are not supported");
      return Value(std::pow(a, b));
    default:
      break;
  }
  if (b == 0) return TypeError("float division by zero");
  if (op == Op::kDiv) return Value(a / b);
  double rest = std::fmod(a, b);
  if (rest != 0 && (rest < 0) != (b < 0)) rest += b;
  if (op == Op::kMod) return Value(rest == 0 ? std::copysign(0.0, b) : rest);
  return Value(std::floor((a - rest) / b + 0.5));
}

Expected<Value> Repeat(Context& context, const Value& value, std::int64_t count) {
  const auto times = static_cast<std::size_t>(std::max<std::int64_t>(count, 0));
  if (const auto* text = value.AsText()) {
    if (text->empty()) return value;
    if (times > Context::kMaxTextBytes / text->size())
      return Fail(ErrorCode::kResourceExhausted, "a text times {} is too large (limit={} bytes)", count,
                  Context::kMaxTextBytes);
    std::string out;
    out.reserve(text->size() * times);
    for (std::size_t i = 0; i < times; ++i) out += *text;
    EM_RETURN_IF_ERROR(context.Spend(1 + times / 16));
    return context.MakeText(std::move(out));
  }
  const List& list = *value.AsList();
  if (!list.items.empty() && times > static_cast<std::size_t>(Context::kMaxSteps) / list.items.size())
    return Fail(ErrorCode::kResourceExhausted, "a list times {} is too large (limit={} items)", count,
                Context::kMaxSteps);
  EM_RETURN_IF_ERROR(context.Spend(list.items.size() * times));
  std::vector<Value> items;
  for (std::size_t i = 0; i < times && !list.items.empty(); ++i)
    items.insert(items.end(), list.items.begin(), list.items.end());
  return context.MakeList(std::move(items), list.tuple);
}

}  // namespace

Expected<Value> Binary(Context& context, Op op, const Value& left, const Value& right) {
  const auto* left_text = left.AsText();
  const auto* right_text = right.AsText();
  const auto* left_list = left.AsList();
  const auto* right_list = right.AsList();
  if (op == Op::kAdd && left_text && right_text) {
    EM_RETURN_IF_ERROR(context.SpendBytes(left_text->size() + right_text->size()));
    return Value(*left_text + *right_text);
  }
  if (op == Op::kAdd && left_list && right_list && left_list->tuple == right_list->tuple) {
    EM_RETURN_IF_ERROR(context.Spend(left_list->items.size() + right_list->items.size()));
    std::vector<Value> items = left_list->items;
    items.insert(items.end(), right_list->items.begin(), right_list->items.end());
    return context.MakeList(std::move(items), left_list->tuple);
  }
  if (op == Op::kMod && left_text) {
    const bool many = right_list && right_list->tuple;
    return FormatPercent(context, *left_text, many ? right_list->items : std::vector<Value>{right});
  }
  const auto left_integer = left.Integer(), right_integer = right.Integer();
  if (op == Op::kMul && (left_text || left_list) && right_integer)
    return Repeat(context, left, *right_integer);
  if (op == Op::kMul && (right_text || right_list) && left_integer)
    return Repeat(context, right, *left_integer);
  if (left_integer && right_integer) return IntegerOperation(op, *left_integer, *right_integer);
  const auto left_number = left.Number(), right_number = right.Number();
  if (left_number && right_number) return FloatOperation(op, *left_number, *right_number);
  return Unsupported(op, left, right);
}

Expected<bool> Equals(Context& context, const Value& left, const Value& right) {
  EM_RETURN_IF_ERROR(context.Spend(1));
  if (left.AsUndefined() || right.AsUndefined()) return left.AsUndefined() && right.AsUndefined();
  if (left.IsNone() || right.IsNone()) return left.IsNone() && right.IsNone();
  const auto left_integer = left.Integer(), right_integer = right.Integer();
  if (left_integer && right_integer) return *left_integer == *right_integer;
  const auto left_number = left.Number(), right_number = right.Number();
  if (left_number && right_number) return *left_number == *right_number;
  if (left.AsText() && right.AsText()) {
    EM_RETURN_IF_ERROR(context.Spend(left.AsText()->size() / 64));
    return *left.AsText() == *right.AsText();
  }
  if (const auto* a = left.AsList(), *b = right.AsList(); a && b) {
    if (a->tuple != b->tuple || a->items.size() != b->items.size()) return false;
    for (std::size_t i = 0; i < a->items.size(); ++i) {
      EM_ASSIGN_OR_RETURN(const bool same, Equals(context, a->items[i], b->items[i]));
      if (!same) return false;
    }
    return true;
  }
  if (const auto* a = left.AsDict(), *b = right.AsDict(); a && b) {
    if (a->Entries().size() != b->Entries().size()) return false;
    for (const Dict::Entry& entry : a->Entries()) {
      const Value* other = b->Find(entry.key);
      if (other == nullptr) return false;
      EM_ASSIGN_OR_RETURN(const bool same, Equals(context, entry.value, *other));
      if (!same) return false;
    }
    return true;
  }
  if (left.AsNamespace() || left.AsLoop() || left.AsCallable())
    return left.AsNamespace() == right.AsNamespace() && left.AsLoop() == right.AsLoop() &&
           left.AsCallable() == right.AsCallable();
  return false;
}

Expected<bool> Less(Context& context, const Value& left, const Value& right) {
  EM_RETURN_IF_ERROR(context.Spend(1));
  const auto left_integer = left.Integer(), right_integer = right.Integer();
  if (left_integer && right_integer) return *left_integer < *right_integer;
  const auto left_number = left.Number(), right_number = right.Number();
  if (left_number && right_number) return *left_number < *right_number;
  if (left.AsText() && right.AsText())
    return *left.AsText() < *right.AsText();  // UTF-8 sorts as its characters do
  if (const auto* a = left.AsList(), *b = right.AsList(); a && b && a->tuple == b->tuple) {
    for (std::size_t i = 0; i < a->items.size() && i < b->items.size(); ++i) {
      EM_ASSIGN_OR_RETURN(const bool same, Equals(context, a->items[i], b->items[i]));
      if (!same) return Less(context, a->items[i], b->items[i]);
    }
    return a->items.size() < b->items.size();
  }
  for (const Value* value : {&left, &right})
    if (const auto* undefined = value->AsUndefined()) return TypeError(*undefined->why);
  return TypeError(
      fmt::format("'<' not supported between instances of '{}' and '{}'", TypeName(left), TypeName(right)));
}

Expected<bool> Compare(Context& context, Op op, const Value& left, const Value& right) {
  const auto negated = [](Expected<bool> result) { return result ? Expected<bool>(!*result) : result; };
  // a <= b is not the same as not b < a where NaN is.
  const auto less_or_equal = [&](const Value& a, const Value& b) -> Expected<bool> {
    EM_ASSIGN_OR_RETURN(const bool less, Less(context, a, b));
    return less ? Expected<bool>(true) : Equals(context, a, b);
  };
  switch (op) {
    case Op::kEqual:
      return Equals(context, left, right);
    case Op::kNotEqual:
      return negated(Equals(context, left, right));
    case Op::kLess:
      return Less(context, left, right);
    case Op::kGreater:
      return Less(context, right, left);
    case Op::kLessEqual:
      return less_or_equal(left, right);
    case Op::kGreaterEqual:
      return less_or_equal(right, left);
    case Op::kNotIn:
      return negated(Compare(context, Op::kIn, left, right));
    default:
      break;
  }
  if (const auto* text = right.AsText()) {
    if (left.AsText() == nullptr)
      return TypeError(fmt::format("'in <string>' requires string as left operand, not {}", TypeName(left)));
    EM_RETURN_IF_ERROR(context.Spend(text->size() / 64));
    return text->find(*left.AsText()) != text->npos;
  }
  if (const auto* dict = right.AsDict()) {
    EM_ASSIGN_OR_RETURN(const std::string hash, HashOf(left));
    return dict->Find(left) != nullptr;
  }
  if (const auto* list = right.AsList()) {
    for (const Value& item : list->items) {
      EM_ASSIGN_OR_RETURN(const bool same, Equals(context, left, item));
      if (same) return true;
    }
    return false;
  }
  if (right.AsUndefined()) return false;  // an empty sequence
  return TypeError(fmt::format("argument of type '{}' is not iterable", TypeName(right)));
}

Expected<Value> Negate(const Value& value, bool negative) {
  if (const auto integer = value.Integer())
    return IntegerOperation(negative ? Op::kSub : Op::kAdd, 0, *integer);
  if (const auto* number = value.AsFloat()) return Value(negative ? -*number : *number);
  if (const auto* undefined = value.AsUndefined()) return TypeError(*undefined->why);
  return TypeError(fmt::format("bad operand type for unary {}: '{}'", negative ? '-' : '+', TypeName(value)));
}

}  // namespace elasticmoe::model::jinja
