// Filters: value | name(arguments).
#include <algorithm>
#include <cmath>
#include <unordered_map>
#include <unordered_set>

#include "model/jinja/builtins.h"
#include "model/jinja/operators.h"
#include "model/jinja/text.h"
#include "model/tokenizer/unicode.h"

namespace elasticmoe::model::jinja {
namespace {

constexpr std::int64_t kMaxIndent = 1000;

#define BIND(...) \
  EM_ASSIGN_OR_RETURN(const std::vector<const Value*> bound, Bind(__func__, args, {__VA_ARGS__}))

bool Flag(const Value* value, bool otherwise = false) {
  return value ? Truth(*value) : otherwise;
}

Expected<std::string> InputText(Context& context, const Value& input) {
  return ToText(context, input);
}

// What "attribute='a.b.0'" (or an index) takes from an item; the item itself where there is no attribute.
Expected<Value> Pick(Context& context, const Value& item, const Value* attribute) {
  if (attribute == nullptr || attribute->IsNone()) return item;
  EM_RETURN_IF_ERROR(context.Spend(1));
  if (const auto index = attribute->AsInt()) return GetItem(context, item, *attribute);
  EM_ASSIGN_OR_RETURN(const std::string_view path, RequireText(attribute, "attribute"));
  Value value = item;
  for (const std::string_view part : SplitBy(path, ".", -1, false)) {
    const auto index = ParseInteger(part, 10);
    const bool digits =
        !part.empty() && std::ranges::all_of(part, [](char c) { return c >= '0' && c <= '9'; });
    EM_ASSIGN_OR_RETURN(value,
                        GetItem(context, value, digits && index ? Value(*index) : Value(std::string(part))));
  }
  return value;
}

// What items are compared by: the picked value, texts in lower case unless case matters.
Expected<Value> SortKey(Context& context, const Value& item, const Value* attribute, bool case_sensitive) {
  EM_ASSIGN_OR_RETURN(Value key, Pick(context, item, attribute));
  if (const auto* text = key.AsText(); text != nullptr && !case_sensitive)
    return context.MakeText(Lower(*text));
  return key;
}

// Stable; an error of a comparison ends it.
Expected<std::vector<std::size_t>> SortedOrder(Context& context, const std::vector<Value>& keys,
                                               bool reverse) {
  std::vector<std::size_t> order(keys.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  // Merge sort from below, since a comparison may fail half way.
  std::vector<std::size_t> merged(order.size());
  for (std::size_t width = 1; width < order.size(); width *= 2) {
    for (std::size_t begin = 0; begin < order.size(); begin += 2 * width) {
      const std::size_t middle = std::min(begin + width, order.size()),
                        end = std::min(begin + 2 * width, order.size());
      std::size_t left = begin, right = middle;
      for (std::size_t to = begin; to < end; ++to) {
        bool take_right = left == middle;
        if (left < middle && right < end) {
          const Value &a = keys[order[left]], &b = keys[order[right]];
          EM_ASSIGN_OR_RETURN(take_right, reverse ? Less(context, a, b) : Less(context, b, a));
        }
        merged[to] = take_right ? order[right++] : order[left++];
      }
    }
    std::swap(order, merged);
  }
  return order;
}

Expected<Value> Reordered(Context& context, const std::vector<Value>& items,
                          const std::vector<std::size_t>& order) {
  std::vector<Value> out;
  out.reserve(order.size());
  for (const std::size_t i : order) out.push_back(items[i]);
  return context.MakeList(std::move(out));
}

Expected<Value> tojson(Context& context, const Value& input, const Args& args) {
  BIND("ensure_ascii", "indent", "separators", "sort_keys");
  JsonStyle style{.ascii = Flag(bound[0]), .sort_keys = Flag(bound[3])};
  EM_ASSIGN_OR_RETURN(const std::int64_t indent, IntegerOr(bound[1], -1, "indent"));
  style.indent = static_cast<int>(std::clamp<std::int64_t>(indent, -1, 1'000'000));
  if (bound[1] != nullptr && !bound[1]->IsNone()) {
    style.indent = std::max(style.indent, 0);
    style.item_separator = ",";
  }
  if (bound[2] != nullptr && !bound[2]->IsNone()) {
    const List* pair = bound[2]->AsList();
    if (pair == nullptr || pair->items.size() != 2) return TypeError("tojson: separators must be a pair");
    EM_ASSIGN_OR_RETURN(style.item_separator, RequireText(&pair->items[0], "separators"));
    EM_ASSIGN_OR_RETURN(style.key_separator, RequireText(&pair->items[1], "separators"));
  }
  EM_ASSIGN_OR_RETURN(std::string text, ToJsonText(context, input, style));
  return context.MakeText(std::move(text));
}

Expected<Value> length(Context&, const Value& input, const Args& args) {
  BIND();
  if (const auto* text = input.AsText()) return Value(static_cast<std::int64_t>(CountChars(*text)));
  if (const auto* list = input.AsList()) return Value(static_cast<std::int64_t>(list->items.size()));
  if (const auto* dict = input.AsDict()) return Value(static_cast<std::int64_t>(dict->Entries().size()));
  if (const auto* loop = input.AsLoop()) return Value(static_cast<std::int64_t>(loop->items->items.size()));
  if (input.AsUndefined()) return Value(std::int64_t{0});
  return TypeError(fmt::format("object of type '{}' has no len()", TypeName(input)));
}

Expected<Value> trim(Context& context, const Value& input, const Args& args) {
  BIND("chars");
  EM_ASSIGN_OR_RETURN(const std::string text, InputText(context, input));
  std::optional<std::string_view> chars;
  if (bound[0] != nullptr && !bound[0]->IsNone()) {
    EM_ASSIGN_OR_RETURN(chars, RequireText(bound[0], "chars"));
  }
  return context.MakeText(std::string(Strip(text, chars, true, true)));
}

Expected<Value> join(Context& context, const Value& input, const Args& args) {
  BIND("d", "attribute");
  std::string separator;
  if (bound[0] != nullptr) {
    EM_ASSIGN_OR_RETURN(separator, ToText(context, *bound[0]));
  }
  EM_ASSIGN_OR_RETURN(const auto items, Iterate(context, input));
  std::string out;
  for (std::size_t i = 0; i < items->items.size(); ++i) {
    EM_ASSIGN_OR_RETURN(const Value item, Pick(context, items->items[i], bound[1]));
    EM_ASSIGN_OR_RETURN(const std::string text, ToText(context, item));
    EM_RETURN_IF_ERROR(context.SpendBytes(text.size() + separator.size()));
    if (i > 0) out += separator;
    out += text;
    if (out.size() > Context::kMaxTextBytes) return context.MakeText(std::move(out));  // the error
  }
  return context.MakeText(std::move(out));
}

Expected<Value> string(Context& context, const Value& input, const Args& args) {
  BIND();
  EM_ASSIGN_OR_RETURN(std::string text, ToText(context, input));
  return Value(std::move(text));
}

Expected<Value> items(Context& context, const Value& input, const Args& args) {
  BIND();
  std::vector<Value> out;
  if (const auto* dict = input.AsDict()) {
    for (const Dict::Entry& entry : dict->Entries()) {
      EM_ASSIGN_OR_RETURN(Value pair, context.MakeList({entry.key, entry.value}, true));
      out.push_back(std::move(pair));
    }
  } else if (!input.AsUndefined()) {
    return TypeError("Can only get item pairs from a mapping.");
  }
  return context.MakeList(std::move(out));
}

Expected<Value> safe(Context&, const Value& input, const Args& args) {
  BIND();
  return input;
}

Expected<Value> escape(Context& context, const Value& input, const Args& args) {
  BIND();
  EM_ASSIGN_OR_RETURN(const std::string text, InputText(context, input));
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&#34;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += c;
    }
  }
  return context.MakeText(std::move(out));
}

Expected<Value> default_(Context&, const Value& input, const Args& args) {
  BIND("default_value", "boolean");
  const bool wanted = input.AsUndefined() || (Flag(bound[1]) && !Truth(input));
  if (!wanted) return input;
  return bound[0] != nullptr ? *bound[0] : Value(std::string());
}

Expected<Value> list(Context& context, const Value& input, const Args& args) {
  BIND();
  EM_ASSIGN_OR_RETURN(const auto items, Iterate(context, input));
  return Value(items);
}

Expected<Value> first(Context& context, const Value& input, const Args& args) {
  BIND();
  EM_ASSIGN_OR_RETURN(const auto items, Iterate(context, input));
  return items->items.empty() ? MakeUndefined("No first item, sequence was empty.") : items->items.front();
}

Expected<Value> last(Context& context, const Value& input, const Args& args) {
  BIND();
  EM_ASSIGN_OR_RETURN(const auto items, Iterate(context, input));
  return items->items.empty() ? MakeUndefined("No last item, sequence was empty.") : items->items.back();
}

Expected<Value> replace(Context& context, const Value& input, const Args& args) {
  BIND("old", "new", "count");
  EM_ASSIGN_OR_RETURN(const std::string text, InputText(context, input));
  if (bound[0] == nullptr || bound[1] == nullptr) return TypeError("replace: old and new are needed");
  EM_ASSIGN_OR_RETURN(const std::string old_text, ToText(context, *bound[0]));
  EM_ASSIGN_OR_RETURN(const std::string new_text, ToText(context, *bound[1]));
  EM_ASSIGN_OR_RETURN(const std::int64_t count, IntegerOr(bound[2], -1, "count"));
  EM_RETURN_IF_ERROR(context.SpendBytes(text.size() + CountOf(text, old_text) * new_text.size()));
  return Value(Replace(text, old_text, new_text, count));
}

template <std::string (*kFunction)(std::string_view)>
Expected<Value> WithText(Context& context, const Value& input, const Args& args) {
  EM_RETURN_IF_ERROR(Bind("filter", args, {}));
  EM_ASSIGN_OR_RETURN(const std::string text, InputText(context, input));
  return context.MakeText(kFunction(text));
}

// Words begin behind white space, hyphens and opening brackets, and nowhere else.
std::string TitleOfWords(std::string_view text) {
  std::string out;
  std::size_t begin = 0;
  const auto add = [&](std::string_view word) {
    if (word.empty()) return;
    const std::size_t bytes = CharBytes(word, 0);
    out += Upper(word.substr(0, bytes));
    out += Lower(word.substr(bytes));
  };
  for (std::size_t i = 0; i < text.size();) {
    const Utf8Step step = StepUtf8(text, i);
    const bool between =
        IsSpace(step.code) || std::u32string_view(U"-({[<").find(step.code) != std::u32string_view::npos;
    const auto bytes = static_cast<std::size_t>(step.bytes);
    if (between) {
      add(text.substr(begin, i - begin));
      out += text.substr(i, bytes);
      begin = i + bytes;
    }
    i += bytes;
  }
  add(text.substr(begin));
  return out;
}

Expected<Value> int_(Context&, const Value& input, const Args& args) {
  BIND("default", "base");
  EM_ASSIGN_OR_RETURN(const std::int64_t base, IntegerOr(bound[1], 10, "base"));
  const Value otherwise = bound[0] != nullptr ? *bound[0] : Value(std::int64_t{0});
  const auto from_float = [&](double value) {
    return std::fabs(value) < 0x1.0p63 ? Value(static_cast<std::int64_t>(value)) : otherwise;
  };
  if (const auto integer = input.Integer()) return Value(*integer);
  if (const auto* number = input.AsFloat()) return from_float(*number);
  if (const auto* undefined = input.AsUndefined()) return TypeError(*undefined->why);
  const auto* text = input.AsText();
  if (text == nullptr || base < 0 || base == 1 || base > 36) return otherwise;
  if (const auto value = ParseInteger(*text, static_cast<int>(base))) return Value(*value);
  if (const auto value = ParseFloat(*text); value && !std::isnan(*value)) return from_float(*value);
  return otherwise;
}

Expected<Value> float_(Context&, const Value& input, const Args& args) {
  BIND("default");
  if (const auto number = input.Number()) return Value(*number);
  if (const auto* undefined = input.AsUndefined()) return TypeError(*undefined->why);
  if (const auto* text = input.AsText())
    if (const auto value = ParseFloat(*text)) return Value(*value);
  return bound[0] != nullptr ? *bound[0] : Value(0.0);
}

Expected<Value> abs(Context&, const Value& input, const Args& args) {
  BIND();
  if (const auto integer = input.Integer())
    return *integer < 0 ? Negate(Value(*integer), true) : Value(*integer);
  if (const auto* number = input.AsFloat()) return Value(std::fabs(*number));
  if (const auto* undefined = input.AsUndefined()) return TypeError(*undefined->why);
  return TypeError(fmt::format("bad operand type for abs(): '{}'", TypeName(input)));
}

Expected<Value> round(Context&, const Value& input, const Args& args) {
  BIND("precision", "method");
  EM_ASSIGN_OR_RETURN(const std::int64_t precision, IntegerOr(bound[0], 0, "precision"));
  std::string_view method = "common";
  if (bound[1] != nullptr) {
    EM_ASSIGN_OR_RETURN(method, RequireText(bound[1], "method"));
  }
  if (method != "common" && method != "ceil" && method != "floor")
    return TypeError("method must be common, ceil or floor");
  const auto number = input.Number();
  if (!number) return TypeError(fmt::format("type {} cannot be rounded", TypeName(input)));
  if (precision < -300 || precision > 300) return TypeError("round: precision out of range (limit=300)");
  if (method != "common" || precision < 0) {
    const double scale = std::pow(10.0, static_cast<double>(precision));
    const double scaled = *number * scale;
    const double rounded = method == "ceil"    ? std::ceil(scaled)
                           : method == "floor" ? std::floor(scaled)
                                               : std::nearbyint(scaled);
    if (method == "common" && input.Integer() && std::fabs(rounded / scale) < 0x1.0p63)
      return Value(static_cast<std::int64_t>(rounded / scale));
    return Value(rounded / scale);
  }
  if (input.Integer()) return Value(*input.Integer());
  if (!std::isfinite(*number)) return Value(*number);
  // Printed with that many digits, the exact value is rounded half to even: so does Python.
  return Value(ParseFloat(fmt::format("{:.{}f}", *number, precision)).value_or(*number));
}

Expected<Value> sort(Context& context, const Value& input, const Args& args) {
  BIND("reverse", "case_sensitive", "attribute");
  EM_ASSIGN_OR_RETURN(const auto items, Iterate(context, input));
  std::vector<Value> keys;
  for (const Value& item : items->items) {
    EM_ASSIGN_OR_RETURN(Value key, SortKey(context, item, bound[2], Flag(bound[1])));
    keys.push_back(std::move(key));
  }
  EM_ASSIGN_OR_RETURN(const auto order, SortedOrder(context, keys, Flag(bound[0])));
  return Reordered(context, items->items, order);
}

Expected<Value> dictsort(Context& context, const Value& input, const Args& args) {
  BIND("case_sensitive", "by", "reverse");
  const Dict* dict = input.AsDict();
  if (dict == nullptr) return TypeError(fmt::format("dictsort needs a dict, not {}", TypeName(input)));
  std::string_view by = "key";
  if (bound[1] != nullptr) {
    EM_ASSIGN_OR_RETURN(by, RequireText(bound[1], "by"));
  }
  if (by != "key" && by != "value") return TypeError("You can only sort by either \"key\" or \"value\"");
  std::vector<Value> pairs, keys;
  for (const Dict::Entry& entry : dict->Entries()) {
    EM_ASSIGN_OR_RETURN(Value pair, context.MakeList({entry.key, entry.value}, true));
    pairs.push_back(std::move(pair));
    EM_ASSIGN_OR_RETURN(Value key,
                        SortKey(context, by == "key" ? entry.key : entry.value, nullptr, Flag(bound[0])));
    keys.push_back(std::move(key));
  }
  EM_ASSIGN_OR_RETURN(const auto order, SortedOrder(context, keys, Flag(bound[2])));
  return Reordered(context, pairs, order);
}

Expected<Value> unique(Context& context, const Value& input, const Args& args) {
  BIND("case_sensitive", "attribute");
  EM_ASSIGN_OR_RETURN(const auto items, Iterate(context, input));
  std::unordered_set<std::string> seen;
  std::vector<Value> out;
  for (const Value& item : items->items) {
    EM_ASSIGN_OR_RETURN(const Value key, SortKey(context, item, bound[1], Flag(bound[0])));
    EM_ASSIGN_OR_RETURN(std::string hash, HashOf(key));
    EM_RETURN_IF_ERROR(context.SpendBytes(hash.size()));
    if (seen.insert(std::move(hash)).second) out.push_back(item);
  }
  return context.MakeList(std::move(out));
}

Expected<Value> Extreme(Context& context, const Value& input, const Args& args, bool largest) {
  EM_ASSIGN_OR_RETURN(const auto bound, Bind(largest ? "max" : "min", args, {"case_sensitive", "attribute"}));
  EM_ASSIGN_OR_RETURN(const auto items, Iterate(context, input));
  if (items->items.empty()) return MakeUndefined("No aggregated item, sequence was empty.");
  const Value* best = nullptr;
  Value best_key;
  for (const Value& item : items->items) {
    EM_ASSIGN_OR_RETURN(Value key, SortKey(context, item, bound[1], Flag(bound[0])));
    if (best != nullptr) {
      EM_ASSIGN_OR_RETURN(const bool better,
                          largest ? Less(context, best_key, key) : Less(context, key, best_key));
      if (!better) continue;
    }
    best = &item;
    best_key = std::move(key);
  }
  return *best;
}

Expected<Value> min(Context& context, const Value& input, const Args& args) {
  return Extreme(context, input, args, false);
}
Expected<Value> max(Context& context, const Value& input, const Args& args) {
  return Extreme(context, input, args, true);
}

Expected<Value> sum(Context& context, const Value& input, const Args& args) {
  BIND("attribute", "start");
  EM_ASSIGN_OR_RETURN(const auto items, Iterate(context, input));
  Value total = bound[1] != nullptr ? *bound[1] : Value(std::int64_t{0});
  if (total.AsText()) return TypeError("sum() can't sum strings [use ''.join(seq) instead]");
  for (const Value& item : items->items) {
    EM_ASSIGN_OR_RETURN(const Value value, Pick(context, item, bound[0]));
    EM_ASSIGN_OR_RETURN(total, Binary(context, Op::kAdd, total, value));
  }
  return total;
}

Expected<Value> reverse(Context& context, const Value& input, const Args& args) {
  BIND();
  EM_ASSIGN_OR_RETURN(const auto items, Iterate(context, input));
  if (input.AsText()) {
    std::string out;
    for (auto item = items->items.rbegin(); item != items->items.rend(); ++item) out += *item->AsText();
    return context.MakeText(std::move(out));
  }
  return context.MakeList({items->items.rbegin(), items->items.rend()});
}

Expected<Value> indent(Context& context, const Value& input, const Args& args) {
  BIND("width", "first", "blank");
  if (const auto* undefined = input.AsUndefined()) return TypeError(*undefined->why);
  if (input.AsText() == nullptr)
    return TypeError(fmt::format("indent: '{}' object is no text", TypeName(input)));
  std::string text = *input.AsText();
  std::string space;
  if (bound[0] != nullptr && bound[0]->AsText()) {
    space = *bound[0]->AsText();
  } else {
    EM_ASSIGN_OR_RETURN(const std::int64_t width, IntegerOr(bound[0], 4, "width"));
    if (width > kMaxIndent) return TypeError(fmt::format("indent: width={} (limit={})", width, kMaxIndent));
    space.assign(static_cast<std::size_t>(std::max<std::int64_t>(width, 0)), ' ');
  }
  text += '\n';  // so that a line end at the end is kept
  const auto lines = SplitLines(text, false);
  EM_RETURN_IF_ERROR(context.SpendBytes(text.size() + lines.size() * space.size()));
  std::string out = Flag(bound[1]) ? space : "";
  for (std::size_t i = 0; i < lines.size(); ++i) {
    if (i > 0) out += '\n';
    if (i > 0 && (Flag(bound[2]) || !lines[i].empty())) out += space;
    out += lines[i];
  }
  return Value(std::move(out));
}

Expected<Value> format(Context& context, const Value& input, const Args& args) {
  if (!args.named.empty()) return TypeError("format: arguments by name are not supported");
  EM_ASSIGN_OR_RETURN(const std::string text, InputText(context, input));
  return FormatPercent(context, text, args.positional);
}

Expected<Value> attr(Context&, const Value& input, const Args& args) {
  BIND("name");
  EM_ASSIGN_OR_RETURN(const std::string_view name, RequireText(bound[0], "name"));
  // Unlike a dot, it does not look at items.
  if (const auto method = FindMethod(input, name)) return *method;
  return MakeUndefined(fmt::format("'{} object' has no attribute '{}'", TypeName(input), name));
}

// map: a filter by name with its arguments, or attribute=... with default=... As in Jinja2, none, false, zero
// and the like have no items, and then nothing else is looked at.
Expected<Value> map(Context& context, const Value& input, const Args& args) {
  if (!Truth(input)) return context.MakeList({});
  EM_ASSIGN_OR_RETURN(const auto items, Iterate(context, input));
  std::vector<Value> out;
  if (args.positional.empty()) {
    const auto bound = Bind("map", args, {"attribute", "default"});
    if (!bound) return tl::unexpected(bound.error());
    if ((*bound)[0] == nullptr) return TypeError("map requires a filter argument");
    for (const Value& item : items->items) {
      EM_ASSIGN_OR_RETURN(Value value, Pick(context, item, (*bound)[0]));
      if (value.AsUndefined() && (*bound)[1] != nullptr) value = *(*bound)[1];
      out.push_back(std::move(value));
    }
    return context.MakeList(std::move(out));
  }
  EM_ASSIGN_OR_RETURN(const std::string_view name, RequireText(&args.positional[0], "the filter's name"));
  const FilterFunction filter = FindFilter(name);
  if (filter == nullptr) return TypeError(fmt::format("No filter named '{}'.", name));
  Args rest = args;
  rest.positional.erase(rest.positional.begin());
  for (const Value& item : items->items) {
    EM_ASSIGN_OR_RETURN(Value value, filter(context, item, rest));
    out.push_back(std::move(value));
  }
  return context.MakeList(std::move(out));
}

// select, reject, selectattr, rejectattr: those items for which a test (truth, if none is named) is as
// wanted.
Expected<Value> Choose(Context& context, const Value& input, const Args& args, bool by_attribute,
                       bool wanted) {
  if (!Truth(input)) return context.MakeList({});  // as in map
  EM_ASSIGN_OR_RETURN(const auto items, Iterate(context, input));
  Args rest = args;
  std::optional<Value> attribute;
  if (by_attribute) {
    if (rest.positional.empty()) return TypeError("Missing parameter for attribute name");
    attribute = rest.positional[0];
    rest.positional.erase(rest.positional.begin());
  }
  TestFunction test = nullptr;
  if (!rest.positional.empty()) {
    EM_ASSIGN_OR_RETURN(const std::string_view name, RequireText(&rest.positional[0], "the test's name"));
    test = FindTest(name);
    if (test == nullptr) return TypeError(fmt::format("No test named '{}'.", name));
    rest.positional.erase(rest.positional.begin());
  }
  std::vector<Value> out;
  for (const Value& item : items->items) {
    EM_ASSIGN_OR_RETURN(const Value value, Pick(context, item, attribute ? &*attribute : nullptr));
    bool holds = Truth(value);
    if (test != nullptr) {
      EM_ASSIGN_OR_RETURN(holds, test(context, value, rest));
    }
    if (holds == wanted) out.push_back(item);
  }
  return context.MakeList(std::move(out));
}

Expected<Value> select(Context& context, const Value& input, const Args& args) {
  return Choose(context, input, args, false, true);
}
Expected<Value> reject(Context& context, const Value& input, const Args& args) {
  return Choose(context, input, args, false, false);
}
Expected<Value> selectattr(Context& context, const Value& input, const Args& args) {
  return Choose(context, input, args, true, true);
}
Expected<Value> rejectattr(Context& context, const Value& input, const Args& args) {
  return Choose(context, input, args, true, false);
}

#undef BIND

}  // namespace

FilterFunction FindFilter(std::string_view name) {
  static const std::unordered_map<std::string_view, FilterFunction> filters = {
      {"abs", abs},
      {"attr", attr},
      {"capitalize", WithText<Capitalize>},
      {"count", length},
      {"d", default_},
      {"default", default_},
      {"dictsort", dictsort},
      {"e", escape},
      {"escape", escape},
      {"first", first},
      {"float", float_},
      {"format", format},
      {"indent", indent},
      {"int", int_},
      {"items", items},
      {"join", join},
      {"last", last},
      {"length", length},
      {"list", list},
      {"lower", WithText<Lower>},
      {"map", map},
      {"max", max},
      {"min", min},
      {"reject", reject},
      {"rejectattr", rejectattr},
      {"replace", replace},
      {"reverse", reverse},
      {"round", round},
      {"safe", safe},
      {"select", select},
      {"selectattr", selectattr},
      {"sort", sort},
      {"string", string},
      {"sum", sum},
      {"title", WithText<TitleOfWords>},
      {"tojson", tojson},
      {"trim", trim},
      {"unique", unique},
      {"upper", WithText<Upper>},
  };
  const auto at = filters.find(name);
  return at == filters.end() ? nullptr : at->second;
}

}  // namespace elasticmoe::model::jinja
