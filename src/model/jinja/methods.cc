// Attributes, items and the methods of texts, lists and dicts.
#include <unicode/uchar.h>

#include <algorithm>
#include <unordered_map>

#include "model/jinja/builtins.h"
#include "model/jinja/operators.h"
#include "model/jinja/text.h"
#include "model/tokenizer/unicode.h"

namespace elasticmoe::model::jinja {
namespace {

using MethodTable = std::unordered_map<std::string_view, BuiltinFunction>;

// The text that a method is called on.
const std::string& Self(const Value& self) {
  return *self.AsText();
}

Expected<std::optional<std::string_view>> CharsArgument(const Value* value) {
  if (value == nullptr || value->IsNone()) return std::nullopt;
  EM_ASSIGN_OR_RETURN(const std::string_view chars, RequireText(value, "chars"));
  return std::optional(chars);
}

template <bool kLeft, bool kRight>
Expected<Value> StripMethod(Context& context, const Value& self, const Args& args) {
  EM_ASSIGN_OR_RETURN(const auto bound, Bind("strip", args, {"chars"}));
  EM_ASSIGN_OR_RETURN(const auto chars, CharsArgument(bound[0]));
  return context.MakeText(std::string(Strip(Self(self), chars, kLeft, kRight)));
}

Expected<Value> MakeTexts(Context& context, const std::vector<std::string_view>& parts, bool tuple = false) {
  std::vector<Value> out;
  out.reserve(parts.size());
  for (const std::string_view part : parts) {
    EM_ASSIGN_OR_RETURN(Value text, context.MakeText(std::string(part)));
    out.push_back(std::move(text));
  }
  return context.MakeList(std::move(out), tuple);
}

template <bool kFromRight>
Expected<Value> SplitMethod(Context& context, const Value& self, const Args& args) {
  EM_ASSIGN_OR_RETURN(const auto bound, Bind("split", args, {"sep", "maxsplit"}));
  EM_ASSIGN_OR_RETURN(const auto separator, CharsArgument(bound[0]));
  EM_ASSIGN_OR_RETURN(const std::int64_t limit, IntegerOr(bound[1], -1, "maxsplit"));
  EM_RETURN_IF_ERROR(context.Spend(Self(self).size() / 16));
  if (!separator) return MakeTexts(context, SplitAtSpace(Self(self), limit, kFromRight));
  if (separator->empty()) return TypeError("empty separator");
  return MakeTexts(context, SplitBy(Self(self), *separator, limit, kFromRight));
}

Expected<Value> SplitLinesMethod(Context& context, const Value& self, const Args& args) {
  EM_ASSIGN_OR_RETURN(const auto bound, Bind("splitlines", args, {"keepends"}));
  return MakeTexts(context, SplitLines(Self(self), bound[0] != nullptr && Truth(*bound[0])));
}

template <bool kFromRight>
Expected<Value> PartitionMethod(Context& context, const Value& self, const Args& args) {
  EM_ASSIGN_OR_RETURN(const auto bound, Bind("partition", args, {"sep"}));
  EM_ASSIGN_OR_RETURN(const std::string_view separator, RequireText(bound[0], "sep"));
  if (separator.empty()) return TypeError("empty separator");
  const std::string_view text = Self(self);
  const auto at = kFromRight ? text.rfind(separator) : text.find(separator);
  if (at != text.npos)
    return MakeTexts(context, {text.substr(0, at), separator, text.substr(at + separator.size())}, true);
  if (kFromRight) return MakeTexts(context, {"", "", text}, true);
  return MakeTexts(context, {text, "", ""}, true);
}

// The part of a text that start and end (in characters, as in slices) leave, and where it begins in bytes.
struct Window {
  std::string_view text;
  std::size_t offset = 0;
  bool valid = true;  // false: start lies behind the end of the text, where not even "" is found
};

Expected<Window> WindowOf(std::string_view text, const Value* start, const Value* end) {
  if (start == nullptr && end == nullptr) return Window{text};
  const auto count = static_cast<std::int64_t>(CountChars(text));
  EM_ASSIGN_OR_RETURN(std::int64_t from, IntegerOr(start, 0, "start"));
  EM_ASSIGN_OR_RETURN(std::int64_t to, IntegerOr(end, count, "end"));
  if (from < 0) from = std::max<std::int64_t>(from + count, 0);
  if (to < 0) to = std::max<std::int64_t>(to + count, 0);
  to = std::min(to, count);
  if (from > to) return Window{.valid = false};
  const std::size_t begin = OffsetOf(text, static_cast<std::size_t>(from));
  return Window{text.substr(begin, OffsetOf(text, static_cast<std::size_t>(to)) - begin), begin};
}

template <bool kAtStart>
Expected<Value> AffixMethod(Context& context, const Value& self, const Args& args) {
  EM_ASSIGN_OR_RETURN(const auto bound,
                      Bind(kAtStart ? "startswith" : "endswith", args, {"affix", "start", "end"}));
  if (bound[0] == nullptr) return TypeError("startswith and endswith need a text");
  EM_ASSIGN_OR_RETURN(const Window window, WindowOf(Self(self), bound[1], bound[2]));
  std::vector<Value> affixes = {*bound[0]};
  if (const auto* list = bound[0]->AsList(); list != nullptr && list->tuple) {
    EM_RETURN_IF_ERROR(context.Spend(list->items.size()));
    affixes = list->items;
  }
  bool found = false;
  for (const Value& affix : affixes) {
    EM_ASSIGN_OR_RETURN(const std::string_view text, RequireText(&affix, "the text to look for"));
    found |= window.valid && (kAtStart ? window.text.starts_with(text) : window.text.ends_with(text));
  }
  return Value(found);
}

template <bool kFromRight, bool kMustExist>
Expected<Value> FindMethodOfText(Context& context, const Value& self, const Args& args) {
  EM_ASSIGN_OR_RETURN(const auto bound, Bind("find", args, {"sub", "start", "end"}));
  EM_ASSIGN_OR_RETURN(const std::string_view part, RequireText(bound[0], "sub"));
  EM_RETURN_IF_ERROR(context.Spend(Self(self).size() / 16));
  EM_ASSIGN_OR_RETURN(const Window window, WindowOf(Self(self), bound[1], bound[2]));
  const auto at = !window.valid ? window.text.npos
                  : kFromRight  ? window.text.rfind(part)
                                : window.text.find(part);
  if (at != window.text.npos)
    return Value(
        static_cast<std::int64_t>(CountChars(std::string_view(Self(self)).substr(0, window.offset + at))));
  if (kMustExist) return TypeError("substring not found");
  return Value(std::int64_t{-1});
}

Expected<Value> CountMethod(Context& context, const Value& self, const Args& args) {
  EM_ASSIGN_OR_RETURN(const auto bound, Bind("count", args, {"sub", "start", "end"}));
  EM_ASSIGN_OR_RETURN(const std::string_view part, RequireText(bound[0], "sub"));
  EM_RETURN_IF_ERROR(context.Spend(Self(self).size() / 16));
  EM_ASSIGN_OR_RETURN(const Window window, WindowOf(Self(self), bound[1], bound[2]));
  return Value(static_cast<std::int64_t>(window.valid ? CountOf(window.text, part) : 0));
}

Expected<Value> ReplaceMethod(Context& context, const Value& self, const Args& args) {
  EM_ASSIGN_OR_RETURN(const auto bound, Bind("replace", args, {"old", "new", "count"}));
  EM_ASSIGN_OR_RETURN(const std::string_view old_text, RequireText(bound[0], "old"));
  EM_ASSIGN_OR_RETURN(const std::string_view new_text, RequireText(bound[1], "new"));
  EM_ASSIGN_OR_RETURN(const std::int64_t count, IntegerOr(bound[2], -1, "count"));
  EM_RETURN_IF_ERROR(context.SpendBytes(Self(self).size() + CountOf(Self(self), old_text) * new_text.size()));
  return Value(Replace(Self(self), old_text, new_text, count));
}

Expected<Value> JoinMethod(Context& context, const Value& self, const Args& args) {
  EM_ASSIGN_OR_RETURN(const auto bound, Bind("join", args, {"iterable"}));
  if (bound[0] == nullptr) return TypeError("join needs a list");
  EM_ASSIGN_OR_RETURN(const auto items, Iterate(context, *bound[0]));
  std::string out;
  for (std::size_t i = 0; i < items->items.size(); ++i) {
    EM_ASSIGN_OR_RETURN(const std::string_view text, RequireText(&items->items[i], "an item to join"));
    EM_RETURN_IF_ERROR(context.SpendBytes(text.size() + Self(self).size()));
    if (i > 0) out += Self(self);
    out += text;
    if (out.size() > Context::kMaxTextBytes) break;  // MakeText has the error
  }
  return context.MakeText(std::move(out));
}

template <std::string (*kFunction)(std::string_view)>
Expected<Value> TextMethod(Context& context, const Value& self, const Args& args) {
  EM_RETURN_IF_ERROR(Bind("a method of str", args, {}));
  return context.MakeText(kFunction(Self(self)));
}

// True if there are characters and all are of the class.
template <bool (*kClass)(char32_t)>
Expected<Value> AllMethod(Context& context, const Value& self, const Args& args) {
  EM_RETURN_IF_ERROR(Bind("a method of str", args, {}));
  EM_RETURN_IF_ERROR(context.Spend(Self(self).size() / 16));
  const std::string& text = Self(self);
  for (std::size_t i = 0; i < text.size(); i += CharBytes(text, i))
    if (!kClass(StepUtf8(text, i).code)) return Value(false);
  return Value(!text.empty());
}

bool IsLetter(char32_t code) {
  return (U_GET_GC_MASK(static_cast<UChar32>(code)) & U_GC_L_MASK) != 0;
}
bool IsDecimalDigit(char32_t code) {
  const auto type = u_getIntPropertyValue(static_cast<UChar32>(code), UCHAR_NUMERIC_TYPE);
  return type == U_NT_DECIMAL || type == U_NT_DIGIT;
}
bool IsLetterOrNumber(char32_t code) {
  return IsLetter(code) || u_getIntPropertyValue(static_cast<UChar32>(code), UCHAR_NUMERIC_TYPE) != U_NT_NONE;
}

template <bool kUpper>
Expected<Value> CaseMethod(Context& context, const Value& self, const Args& args) {
  EM_RETURN_IF_ERROR(Bind("a method of str", args, {}));
  EM_RETURN_IF_ERROR(context.Spend(Self(self).size() / 16));
  const std::string &text = Self(self), upper = Upper(text), lower = Lower(text);
  return Value(kUpper ? upper == text && lower != text : lower == text && upper != text);
}

template <bool kPrefix>
Expected<Value> RemoveAffixMethod(Context& context, const Value& self, const Args& args) {
  EM_ASSIGN_OR_RETURN(const auto bound, Bind(kPrefix ? "removeprefix" : "removesuffix", args, {"affix"}));
  EM_ASSIGN_OR_RETURN(const std::string_view affix, RequireText(bound[0], "affix"));
  std::string_view text = Self(self);
  if (kPrefix && text.starts_with(affix)) text.remove_prefix(affix.size());
  if (!kPrefix && text.ends_with(affix)) text.remove_suffix(affix.size());
  return context.MakeText(std::string(text));
}

enum class Side { kLeft, kRight, kBoth, kZeros };
template <Side kSide>
Expected<Value> PadMethod(Context& context, const Value& self, const Args& args) {
  EM_ASSIGN_OR_RETURN(const auto bound, Bind("a method of str", args, {"width", "fillchar"}));
  EM_ASSIGN_OR_RETURN(const std::int64_t width, IntegerOr(bound[0], 0, "width"));
  std::string_view fill = kSide == Side::kZeros ? "0" : " ";
  if (bound[1] != nullptr) {
    EM_ASSIGN_OR_RETURN(fill, RequireText(bound[1], "fillchar"));
    if (CountChars(fill) != 1) return TypeError("the fill character must be exactly one character long");
  }
  const std::string& text = Self(self);
  const auto count = static_cast<std::int64_t>(CountChars(text));
  if (width <= count) return self;
  const auto missing = static_cast<std::size_t>(width - count);
  if (missing > Context::kMaxTextBytes / 4)
    return Fail(ErrorCode::kResourceExhausted, "padding to {} characters", width);
  // The odd one goes left where both the width and what is missing are odd, as in Python.
  std::size_t left = kSide == Side::kLeft ? 0 : missing;
  if (kSide == Side::kBoth) left = missing / 2 + (missing & static_cast<std::size_t>(width) & 1);
  std::string_view sign;
  std::string_view rest = text;
  if (kSide == Side::kZeros && (text.starts_with('-') || text.starts_with('+'))) {
    sign = rest.substr(0, 1);
    rest.remove_prefix(1);
  }
  std::string out(sign);
  for (std::size_t i = 0; i < left; ++i) out += fill;
  out += rest;
  for (std::size_t i = left; i < missing; ++i) out += fill;
  return context.MakeText(std::move(out));
}

// "{} {0} {name}".format(...), without format specifications.
Expected<Value> FormatMethod(Context& context, const Value& self, const Args& args) {
  const std::string_view text = Self(self);
  std::string out;
  std::size_t next = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '{' && text[i] != '}') {
      out += text[i];
      continue;
    }
    if (i + 1 < text.size() && text[i + 1] == text[i]) {
      out += text[i++];
      continue;
    }
    const auto end = text.find('}', i);
    if (text[i] == '}' || end == text.npos) return TypeError("a single brace in a format text");
    const std::string_view field = text.substr(i + 1, end - i - 1);
    i = end;
    const Value* value = nullptr;
    const auto index = field.empty() ? std::optional<std::int64_t>(static_cast<std::int64_t>(next++))
                                     : ParseInteger(field, 10);
    if (index && *index >= 0 && static_cast<std::size_t>(*index) < args.positional.size())
      value = &args.positional[static_cast<std::size_t>(*index)];
    for (const auto& [name, named] : args.named)
      if (name == field) value = &named;
    if (value == nullptr) return TypeError(fmt::format("format has no argument for {{{}}}", field));
    EM_ASSIGN_OR_RETURN(const std::string part, ToText(context, *value));
    out += part;
    if (out.size() > Context::kMaxTextBytes) break;  // MakeText has the error
  }
  return context.MakeText(std::move(out));
}

const MethodTable& TextMethods() {
  static const MethodTable methods = {
      {"capitalize", TextMethod<Capitalize>},
      {"center", PadMethod<Side::kBoth>},
      {"count", CountMethod},
      {"endswith", AffixMethod<false>},
      {"find", FindMethodOfText<false, false>},
      {"format", FormatMethod},
      {"index", FindMethodOfText<false, true>},
      {"isalnum", AllMethod<IsLetterOrNumber>},
      {"isalpha", AllMethod<IsLetter>},
      {"isdigit", AllMethod<IsDecimalDigit>},
      {"islower", CaseMethod<false>},
      {"isspace", AllMethod<IsSpace>},
      {"isupper", CaseMethod<true>},
      {"join", JoinMethod},
      {"ljust", PadMethod<Side::kLeft>},
      {"lower", TextMethod<Lower>},
      {"lstrip", StripMethod<true, false>},
      {"partition", PartitionMethod<false>},
      {"removeprefix", RemoveAffixMethod<true>},
      {"removesuffix", RemoveAffixMethod<false>},
      {"replace", ReplaceMethod},
      {"rfind", FindMethodOfText<true, false>},
      {"rindex", FindMethodOfText<true, true>},
      {"rjust", PadMethod<Side::kRight>},
      {"rpartition", PartitionMethod<true>},
      {"rsplit", SplitMethod<true>},
      {"rstrip", StripMethod<false, true>},
      {"split", SplitMethod<false>},
      {"splitlines", SplitLinesMethod},
      {"startswith", AffixMethod<true>},
      {"strip", StripMethod<true, true>},
      {"title", TextMethod<Title>},
      {"upper", TextMethod<Upper>},
      {"zfill", PadMethod<Side::kZeros>},
  };
  return methods;
}

Expected<Value> DictGet(Context&, const Value& self, const Args& args) {
  EM_ASSIGN_OR_RETURN(const auto bound, Bind("get", args, {"key", "default"}));
  if (bound[0] == nullptr) return TypeError("get needs a key");
  EM_RETURN_IF_ERROR(HashOf(*bound[0]));
  if (const Value* found = self.AsDict()->Find(*bound[0])) return *found;
  return bound[1] != nullptr ? *bound[1] : Value();
}

enum class Part { kKeys, kValues, kItems };
template <Part kPart>
Expected<Value> DictParts(Context& context, const Value& self, const Args& args) {
  EM_RETURN_IF_ERROR(Bind("a method of dict", args, {}));
  std::vector<Value> out;
  for (const Dict::Entry& entry : self.AsDict()->Entries()) {
    if (kPart == Part::kItems) {
      EM_ASSIGN_OR_RETURN(Value pair, context.MakeList({entry.key, entry.value}, true));
      out.push_back(std::move(pair));
    } else {
      out.push_back(kPart == Part::kKeys ? entry.key : entry.value);
    }
  }
  return context.MakeList(std::move(out));
}

Expected<Value> Copy(Context&, const Value& self, const Args& args) {
  EM_RETURN_IF_ERROR(Bind("copy", args, {}));
  return self;
}

const MethodTable& DictMethods() {
  static const MethodTable methods = {
      {"copy", Copy},
      {"get", DictGet},
      {"items", DictParts<Part::kItems>},
      {"keys", DictParts<Part::kKeys>},
      {"values", DictParts<Part::kValues>},
  };
  return methods;
}

Expected<Value> ListIndex(Context& context, const Value& self, const Args& args) {
  EM_ASSIGN_OR_RETURN(const auto bound, Bind("index", args, {"value"}));
  if (bound[0] == nullptr) return TypeError("index needs a value");
  const auto& items = self.AsList()->items;
  for (std::size_t i = 0; i < items.size(); ++i) {
    EM_ASSIGN_OR_RETURN(const bool same, Equals(context, items[i], *bound[0]));
    if (same) return Value(static_cast<std::int64_t>(i));
  }
  return TypeError("the value is not in the list");
}

Expected<Value> ListCount(Context& context, const Value& self, const Args& args) {
  EM_ASSIGN_OR_RETURN(const auto bound, Bind("count", args, {"value"}));
  if (bound[0] == nullptr) return TypeError("count needs a value");
  std::int64_t count = 0;
  for (const Value& item : self.AsList()->items) {
    EM_ASSIGN_OR_RETURN(const bool same, Equals(context, item, *bound[0]));
    count += same ? 1 : 0;
  }
  return Value(count);
}

const MethodTable& ListMethods() {
  static const MethodTable methods = {{"copy", Copy}, {"count", ListCount}, {"index", ListIndex}};
  return methods;
}

// Methods that change their object are there, but the sandbox forbids them.
bool IsForbidden(const Value& object, std::string_view name) {
  constexpr std::string_view kOfLists[] = {"append", "clear",  "extend",  "insert",
                                           "pop",    "remove", "reverse", "sort"};
  constexpr std::string_view kOfDicts[] = {"clear", "pop", "popitem", "setdefault", "update"};
  if (const auto* list = object.AsList())
    return !list->tuple && std::ranges::find(kOfLists, name) != std::end(kOfLists);
  return object.AsDict() && std::ranges::find(kOfDicts, name) != std::end(kOfDicts);
}

Expected<Value> Cycle(Context&, const Value& self, const Args& args) {
  if (args.positional.empty()) return TypeError("no items for cycling given");
  return args.positional[self.AsLoop()->index0 % args.positional.size()];
}

std::optional<Value> LoopAttribute(const Value& object, std::string_view name) {
  const Loop& loop = *object.AsLoop();
  const auto number = [](std::size_t n) { return Value(static_cast<std::int64_t>(n)); };
  const std::size_t count = loop.items->items.size();
  if (name == "index") return number(loop.index0 + 1);
  if (name == "index0") return number(loop.index0);
  if (name == "revindex") return number(count - loop.index0);
  if (name == "revindex0") return number(count - loop.index0 - 1);
  if (name == "first") return Value(loop.index0 == 0);
  if (name == "last") return Value(loop.index0 + 1 == count);
  if (name == "length") return number(count);
  if (name == "depth") return number(static_cast<std::size_t>(loop.depth0) + 1);
  if (name == "depth0") return number(static_cast<std::size_t>(loop.depth0));
  if (name == "previtem")
    return loop.index0 > 0 ? loop.items->items[loop.index0 - 1] : MakeUndefined("there is no previous item");
  if (name == "nextitem")
    return loop.index0 + 1 < count ? loop.items->items[loop.index0 + 1]
                                   : MakeUndefined("there is no next item");
  if (name == "cycle") return MakeFunction(Cycle, object);
  return std::nullopt;
}

Value Missing(const Value& object, std::string_view name) {
  return MakeUndefined(fmt::format("'{} object' has no attribute '{}'", TypeName(object), name));
}

}  // namespace

std::optional<Value> FindMethod(const Value& object, std::string_view name) {
  const MethodTable* table = object.AsText()   ? &TextMethods()
                             : object.AsDict() ? &DictMethods()
                             : object.AsList() ? &ListMethods()
                                               : nullptr;
  if (table != nullptr)
    if (const auto at = table->find(name); at != table->end()) return MakeFunction(at->second, object);
  if (IsForbidden(object, name))
    return MakeUndefined(
        fmt::format("access to attribute '{}' of '{}' object is unsafe.", name, TypeName(object)));
  if (object.AsLoop()) return LoopAttribute(object, name);
  if (const Namespace* space = object.AsNamespace())
    if (const Value* found = space->values.Find(name)) return *found;
  return std::nullopt;
}

Expected<Value> GetAttribute(Context&, const Value& object, std::string_view name) {
  if (const auto* undefined = object.AsUndefined()) return TypeError(*undefined->why);
  if (auto method = FindMethod(object, name)) return *std::move(method);
  if (const Dict* dict = object.AsDict())
    if (const Value* found = dict->Find(name)) return *found;
  return Missing(object, name);
}

Expected<Value> GetItem(Context& context, const Value& object, const Value& key) {
  if (const auto* undefined = object.AsUndefined()) return TypeError(*undefined->why);
  if (const Dict* dict = object.AsDict())
    if (const Value* found = dict->Find(key)) return *found;
  if (const auto index = key.Integer()) {
    const auto* text = object.AsText();
    const auto* list = object.AsList();
    if (text || list) {
      const auto count = static_cast<std::int64_t>(list ? list->items.size() : CountChars(*text));
      if (text) EM_RETURN_IF_ERROR(context.Spend(text->size() / 64));
      const std::int64_t at = *index < 0 ? *index + count : *index;
      if (at < 0 || at >= count)
        return MakeUndefined(fmt::format("{} object has no element {}", TypeName(object), *index));
      if (list) return list->items[static_cast<std::size_t>(at)];
      const std::size_t offset = OffsetOf(*text, static_cast<std::size_t>(at));
      return context.MakeText(text->substr(offset, CharBytes(*text, offset)));
    }
  }
  if (const auto* name = key.AsText()) {
    if (auto method = FindMethod(object, *name)) return *std::move(method);
    return Missing(object, *name);
  }
  return MakeUndefined(fmt::format("{} object has no such element", TypeName(object)));
}

Expected<Value> GetSlice(Context& context, const Value& object, const SliceBounds& bounds) {
  if (const auto* undefined = object.AsUndefined()) return TypeError(*undefined->why);
  const auto* text = object.AsText();
  const auto* list = object.AsList();
  if (!text && !list) return TypeError(fmt::format("'{}' object cannot be sliced", TypeName(object)));
  const std::int64_t step = bounds.step.value_or(1);
  if (step == 0) return TypeError("slice step cannot be zero");
  const auto count = static_cast<std::int64_t>(list ? list->items.size() : CountChars(*text));
  // Where a bound lies outside it is moved to the end, which for a backward walk is before the first.
  const std::int64_t low = step > 0 ? 0 : -1, high = step > 0 ? count : count - 1;
  const auto place = [&](std::optional<std::int64_t> bound, std::int64_t otherwise) {
    if (!bound) return otherwise;
    return std::clamp(*bound < 0 ? *bound + count : *bound, low, high);
  };
  const std::int64_t start = place(bounds.start, step > 0 ? low : high);
  const std::int64_t stop = place(bounds.stop, step > 0 ? high : low);
  if (text && step == 1) {
    EM_RETURN_IF_ERROR(context.Spend(text->size() / 64));
    if (start >= stop) return Value(std::string());
    const std::size_t begin = OffsetOf(*text, static_cast<std::size_t>(start));
    const std::size_t length =
        OffsetOf(std::string_view(*text).substr(begin), static_cast<std::size_t>(stop - start));
    return context.MakeText(text->substr(begin, length));
  }
  EM_ASSIGN_OR_RETURN(const auto items, Iterate(context, object));
  std::vector<Value> out;
  for (std::int64_t i = start; step > 0 ? i < stop : i > stop;) {
    out.push_back(items->items[static_cast<std::size_t>(i)]);
    if (__builtin_add_overflow(i, step, &i)) break;
  }
  if (list) return context.MakeList(std::move(out), list->tuple);
  std::string joined;
  for (const Value& item : out) joined += *item.AsText();
  return context.MakeText(std::move(joined));
}

}  // namespace elasticmoe::model::jinja
