// Global functions, argument binding and %-formatting.
#include <algorithm>
#include <cmath>
#include <ctime>
#include <unordered_map>

#include "model/jinja/builtins.h"
#include "model/jinja/text.h"

namespace elasticmoe::model::jinja {
namespace {

constexpr std::int64_t kMaxRange = 100'000;  // as in Jinja's sandbox
constexpr std::size_t kMaxTimeFormat = 256;

class Function : public Callable {
 public:
  Function(BuiltinFunction function, Value self) : function_(function), self_(std::move(self)) {}
  Expected<Value> Call(Context& context, Args args) const override { return function_(context, self_, args); }
  int Depth() const override { return 1 + jinja::Depth(self_); }

 private:
  BuiltinFunction function_;
  Value self_;
};

Expected<Value> Range(Context& context, const Value&, const Args& args) {
  if (!args.named.empty() || args.positional.empty() || args.positional.size() > 3)
    return TypeError("range takes one to three integers");
  std::int64_t numbers[3] = {0, 0, 1};
  for (std::size_t i = 0; i < args.positional.size(); ++i) {
    const auto integer = args.positional[i].Integer();
    if (!integer)
      return TypeError(
          fmt::format("'{}' object cannot be interpreted as an integer", TypeName(args.positional[i])));
    numbers[args.positional.size() == 1 ? 1 : i] = *integer;
  }
  const auto [start, stop, step] = numbers;
  if (step == 0) return TypeError("range() arg 3 must not be zero");
  std::vector<Value> out;
  for (std::int64_t at = start; step > 0 ? at < stop : at > stop;) {
    if (out.size() >= static_cast<std::size_t>(kMaxRange))
      return Fail(ErrorCode::kResourceExhausted, "a range of more than {} numbers", kMaxRange);
    out.emplace_back(at);
    if (__builtin_add_overflow(at, step, &at)) break;
  }
  return context.MakeList(std::move(out));
}

// dict(pairs or dict, name=value ...).
Expected<Dict> DictOf(Context& context, const Args& args) {
  Dict dict;
  if (args.positional.size() > 1) return TypeError("dict takes at most one positional argument");
  if (!args.positional.empty()) {
    const Value& from = args.positional[0];
    if (const Dict* other = from.AsDict()) {
      EM_RETURN_IF_ERROR(context.Spend(other->Entries().size()));
      dict = *other;
    } else {
      EM_ASSIGN_OR_RETURN(const auto items, Iterate(context, from));
      for (const Value& item : items->items) {
        EM_ASSIGN_OR_RETURN(const auto pair, Iterate(context, item));
        if (pair->items.size() != 2) return TypeError("dict needs pairs");
        EM_RETURN_IF_ERROR(dict.Set(pair->items[0], pair->items[1]));
      }
    }
  }
  for (const auto& [name, value] : args.named) EM_RETURN_IF_ERROR(dict.Set(Value(name), value));
  return dict;
}

Expected<Value> MakeDictValue(Context& context, const Value&, const Args& args) {
  EM_ASSIGN_OR_RETURN(Dict dict, DictOf(context, args));
  return context.MakeDict(std::move(dict));
}

Expected<Value> MakeNamespaceValue(Context& context, const Value&, const Args& args) {
  EM_ASSIGN_OR_RETURN(Dict dict, DictOf(context, args));
  EM_RETURN_IF_ERROR(context.Spend(dict.Entries().size()));
  return context.MakeNamespace(std::move(dict));
}

Expected<Value> RaiseException(Context& context, const Value&, const Args& args) {
  EM_ASSIGN_OR_RETURN(const auto bound, Bind("raise_exception", args, {"message"}));
  if (bound[0] == nullptr) return TypeError("raise_exception needs a message");
  EM_ASSIGN_OR_RETURN(std::string message, ToText(context, *bound[0]));
  context.NoteRaised();
  return TypeError(std::move(message));
}

// In UTC: what a server's place is must not change a prompt.
Expected<Value> StrftimeNow(Context& context, const Value&, const Args& args) {
  EM_ASSIGN_OR_RETURN(const auto bound, Bind("strftime_now", args, {"format"}));
  EM_ASSIGN_OR_RETURN(const std::string_view format, RequireText(bound[0], "format"));
  if (format.empty()) return Value(std::string());
  if (format.find('\0') != format.npos) return TypeError("strftime_now: embedded null character");
  if (format.size() > kMaxTimeFormat)
    return TypeError(
        fmt::format("strftime_now: a format of {} bytes (limit={})", format.size(), kMaxTimeFormat));
  const std::time_t now = context.NowUnixSeconds();
  std::tm parts{};
  if (gmtime_r(&now, &parts) == nullptr) return TypeError("strftime_now: the time is out of range");
  // One character more, so that 0 bytes mean too long and never an empty result.
  const std::string with_mark = std::string(format) + "|";
  std::string out(16 * kMaxTimeFormat, '\0');
  const std::size_t bytes = std::strftime(out.data(), out.size(), with_mark.c_str(), &parts);
  if (bytes == 0) return TypeError("strftime_now: the result is too long");
  out.resize(bytes - 1);
  return context.MakeText(std::move(out));
}

std::string Padded(std::string text, bool left, bool zeros, std::size_t width) {
  const std::size_t count = CountChars(text);
  if (count >= width) return text;
  const std::size_t missing = width - count;
  if (left) return text + std::string(missing, ' ');
  if (!zeros) return std::string(missing, ' ') + text;
  const std::size_t sign = text.starts_with('-') || text.starts_with('+') ? 1 : 0;
  return text.insert(sign, missing, '0');
}

}  // namespace

Value MakeFunction(BuiltinFunction function, Value self) {
  return Value(std::shared_ptr<const Callable>(std::make_shared<Function>(function, std::move(self))));
}

std::shared_ptr<const Callable> FindFunction(std::string_view name) {
  static const std::unordered_map<std::string_view, std::shared_ptr<const Callable>> functions = [] {
    std::unordered_map<std::string_view, std::shared_ptr<const Callable>> made;
    const auto add = [&](std::string_view n, BuiltinFunction f) {
      made[n] = std::make_shared<Function>(f, Value());
    };
    add("dict", MakeDictValue);
    add("namespace", MakeNamespaceValue);
    add("raise_exception", RaiseException);
    add("range", Range);
    add("strftime_now", StrftimeNow);
    return made;
  }();
  const auto at = functions.find(name);
  return at == functions.end() ? nullptr : at->second;
}

Expected<std::vector<const Value*>> Bind(std::string_view function, const Args& args,
                                         std::initializer_list<std::string_view> names) {
  if (function.ends_with('_')) function.remove_suffix(1);
  std::vector<const Value*> bound(names.size(), nullptr);
  if (args.positional.size() > names.size())
    return TypeError(
        fmt::format("{} takes at most {} arguments, not {}", function, names.size(), args.positional.size()));
  for (std::size_t i = 0; i < args.positional.size(); ++i) bound[i] = &args.positional[i];
  for (const auto& [name, value] : args.named) {
    const auto at = std::find(names.begin(), names.end(), name);
    if (at == names.end())
      return TypeError(fmt::format("{} got an unexpected argument '{}'", function, name));
    const Value*& slot = bound[static_cast<std::size_t>(at - names.begin())];
    if (slot != nullptr)
      return TypeError(fmt::format("{} got multiple values for argument '{}'", function, name));
    slot = &value;
  }
  return bound;
}

Expected<std::int64_t> IntegerOr(const Value* value, std::int64_t otherwise, std::string_view what) {
  if (value == nullptr || value->IsNone()) return otherwise;
  const auto integer = value->Integer();
  if (!integer) return TypeError(fmt::format("{} must be an integer, not {}", what, TypeName(*value)));
  return *integer;
}

Expected<std::string_view> RequireText(const Value* value, std::string_view what) {
  if (value == nullptr) return TypeError(fmt::format("{} is missing", what));
  const auto* text = value->AsText();
  if (text == nullptr) return TypeError(fmt::format("{} must be str, not {}", what, TypeName(*value)));
  return std::string_view(*text);
}

Expected<Value> FormatPercent(Context& context, std::string_view format, const std::vector<Value>& values) {
  std::string out;
  std::size_t next = 0;
  for (std::size_t i = 0; i < format.size(); ++i) {
    if (format[i] != '%') {
      out += format[i];
      continue;
    }
    bool left = false, zeros = false, plus = false;
    for (++i; i < format.size() && std::string_view("-0+ #").find(format[i]) != std::string_view::npos; ++i) {
      left |= format[i] == '-';
      zeros |= format[i] == '0';
      plus |= format[i] == '+';
    }
    const auto number = [&](std::size_t limit) -> std::optional<std::size_t> {
      std::size_t n = 0;
      for (; i < format.size() && format[i] >= '0' && format[i] <= '9'; ++i)
        n = std::min<std::size_t>(n * 10 + static_cast<std::size_t>(format[i] - '0'), limit + 1);
      return n > limit ? std::nullopt : std::optional(n);
    };
    const auto width = number(1000);
    std::optional<std::size_t> precision;
    if (i < format.size() && format[i] == '.') {
      ++i;
      precision = number(100);
      if (!precision) return TypeError("a format's precision is too large (limit=100)");
    }
    if (!width) return TypeError("a format's width is too large (limit=1000)");
    if (i >= format.size()) return TypeError("incomplete format");
    const char kind = format[i];
    if (kind == '%') {
      out += '%';
      continue;
    }
    if (next >= values.size()) return TypeError("not enough arguments for format string");
    const Value& value = values[next++];
    std::string text;
    if (kind == 's' || kind == 'r') {
      EM_ASSIGN_OR_RETURN(text, kind == 's' ? ToText(context, value) : ToRepr(context, value));
      if (precision) text.resize(OffsetOf(text, *precision));
      zeros = false;
    } else if (kind == 'd' || kind == 'i' || kind == 'x' || kind == 'X' || kind == 'o') {
      auto integer = value.Integer();
      if (const auto* f = value.AsFloat();
          f != nullptr && (kind == 'd' || kind == 'i') && std::fabs(*f) < 0x1.0p63)
        integer = static_cast<std::int64_t>(*f);
      if (!integer)
        return TypeError(fmt::format("%{} format: a number is required, not {}", kind, TypeName(value)));
      text = kind == 'x'   ? fmt::format("{:x}", *integer)
             : kind == 'X' ? fmt::format("{:X}", *integer)
             : kind == 'o' ? fmt::format("{:o}", *integer)
                           : fmt::format("{}", *integer);
      if (plus && *integer >= 0) text.insert(0, 1, '+');
    } else if (kind == 'f' || kind == 'F' || kind == 'e' || kind == 'g') {
      const auto f = value.Number();
      if (!f) return TypeError(fmt::format("must be real number, not {}", TypeName(value)));
      const auto digits = precision.value_or(6);
      text = kind == 'e'   ? fmt::format("{:.{}e}", *f, digits)
             : kind == 'g' ? fmt::format("{:.{}g}", *f, std::max<std::size_t>(digits, 1))
                           : fmt::format("{:.{}f}", *f, digits);
      if (plus && *f >= 0) text.insert(0, 1, '+');
    } else {
      return TypeError("unsupported format character (supported: d i o x X e f F g s r %)");
    }
    out += Padded(std::move(text), left, zeros, *width);
    if (out.size() > Context::kMaxTextBytes) break;  // MakeText has the error
  }
  if (next < values.size()) return TypeError("not all arguments converted during string formatting");
  return context.MakeText(std::move(out));
}

}  // namespace elasticmoe::model::jinja
