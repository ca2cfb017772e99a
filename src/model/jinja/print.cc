// str(), repr() and json.dumps() of values.
#include <algorithm>
#include <cmath>

#include "model/jinja/text.h"
#include "model/jinja/value.h"
#include "model/tokenizer/unicode.h"

namespace elasticmoe::model::jinja {
namespace {

// Shared parts may make the print of a small value huge, so what is written is paid for as it grows.
class Writer {
 public:
  explicit Writer(Context& context) : context_(context) {}
  Status Put(std::string_view text) {
    EM_RETURN_IF_ERROR(context_.Spend(1));
    EM_RETURN_IF_ERROR(context_.SpendBytes(text.size()));
    out_ += text;
    if (out_.size() > Context::kMaxTextBytes)
      return Fail(ErrorCode::kResourceExhausted, "the template prints a value of more than {} bytes",
                  Context::kMaxTextBytes);
    return {};
  }
  std::string Take() { return std::move(out_); }

 private:
  Context& context_;
  std::string out_;
};

Status Repr(Writer& out, const Value& value) {
  if (value.IsNone()) return out.Put("None");
  if (value.AsUndefined()) return out.Put("Undefined");
  if (const auto* b = value.AsBool()) return out.Put(*b ? "True" : "False");
  if (const auto* i = value.AsInt()) return out.Put(fmt::format("{}", *i));
  if (const auto* f = value.AsFloat()) return out.Put(FormatFloat(*f));
  if (const auto* text = value.AsText()) return out.Put(Quote(*text));
  if (const auto* list = value.AsList()) {
    EM_RETURN_IF_ERROR(out.Put(list->tuple ? "(" : "["));
    for (std::size_t i = 0; i < list->items.size(); ++i) {
      if (i > 0) EM_RETURN_IF_ERROR(out.Put(", "));
      EM_RETURN_IF_ERROR(Repr(out, list->items[i]));
    }
    if (list->tuple && list->items.size() == 1) EM_RETURN_IF_ERROR(out.Put(","));
    return out.Put(list->tuple ? ")" : "]");
  }
  if (const auto* dict = value.AsDict()) {
    EM_RETURN_IF_ERROR(out.Put("{"));
    for (std::size_t i = 0; i < dict->Entries().size(); ++i) {
      if (i > 0) EM_RETURN_IF_ERROR(out.Put(", "));
      EM_RETURN_IF_ERROR(Repr(out, dict->Entries()[i].key));
      EM_RETURN_IF_ERROR(out.Put(": "));
      EM_RETURN_IF_ERROR(Repr(out, dict->Entries()[i].value));
    }
    return out.Put("}");
  }
  return out.Put(fmt::format("<{}>", TypeName(value)));
}

std::string JsonString(std::string_view text, bool ascii) {
  std::string out = "\"";
  for (std::size_t i = 0; i < text.size(); i += CharBytes(text, i)) {
    const char32_t code = StepUtf8(text, i).code;
    switch (code) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\r':
        out += "\\r";
        break;
      case '\t':
        out += "\\t";
        break;
      case '\f':
        out += "\\f";
        break;
      case '\b':
        out += "\\b";
        break;
      default:
        if (code < 0x20 || (ascii && code > 0x7E && code < 0x10000)) {
          out += fmt::format("\\u{:04x}", static_cast<unsigned>(code));
        } else if (ascii && code >= 0x10000) {
          const auto rest = static_cast<unsigned>(code - 0x10000);
          out += fmt::format("\\u{:04x}\\u{:04x}", 0xD800 + (rest >> 10), 0xDC00 + (rest & 0x3FF));
        } else {
          out += text.substr(i, CharBytes(text, i));
        }
    }
  }
  return out + "\"";
}

std::string JsonFloat(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value < 0 ? "-Infinity" : "Infinity";
  return FormatFloat(value);
}

Expected<std::string> JsonKey(const Value& key, bool ascii) {
  if (const auto* text = key.AsText()) return JsonString(*text, ascii);
  if (key.IsNone()) return "\"null\"";
  if (const auto* b = key.AsBool()) return *b ? "\"true\"" : "\"false\"";
  if (const auto* i = key.AsInt()) return fmt::format("\"{}\"", *i);
  if (const auto* f = key.AsFloat()) return fmt::format("\"{}\"", JsonFloat(*f));
  return TypeError(fmt::format("keys must be str, int, float, bool or None, not {}", TypeName(key)));
}

class JsonWriter {
 public:
  JsonWriter(Writer& out, const JsonStyle& style) : out_(out), style_(style) {}

  Status Put(const Value& value, int level) {
    if (value.IsNone()) return out_.Put("null");
    if (const auto* b = value.AsBool()) return out_.Put(*b ? "true" : "false");
    if (const auto* i = value.AsInt()) return out_.Put(fmt::format("{}", *i));
    if (const auto* f = value.AsFloat()) return out_.Put(JsonFloat(*f));
    if (const auto* text = value.AsText()) return out_.Put(JsonString(*text, style_.ascii));
    if (const auto* list = value.AsList()) {
      if (list->items.empty()) return out_.Put("[]");
      EM_RETURN_IF_ERROR(out_.Put("["));
      for (std::size_t i = 0; i < list->items.size(); ++i) {
        EM_RETURN_IF_ERROR(Separate(i, level + 1));
        EM_RETURN_IF_ERROR(Put(list->items[i], level + 1));
      }
      EM_RETURN_IF_ERROR(NewLine(level));
      return out_.Put("]");
    }
    if (const auto* dict = value.AsDict()) {
      std::vector<const Dict::Entry*> entries;
      for (const Dict::Entry& entry : dict->Entries()) entries.push_back(&entry);
      if (entries.empty()) return out_.Put("{}");
      if (style_.sort_keys) {
        for (const Dict::Entry* entry : entries)
          if (entry->key.AsText() == nullptr) return TypeError("sort_keys needs keys that are all text");
        std::ranges::stable_sort(entries, {},
                                 [](const Dict::Entry* e) { return std::string_view(*e->key.AsText()); });
      }
      EM_RETURN_IF_ERROR(out_.Put("{"));
      for (std::size_t i = 0; i < entries.size(); ++i) {
        EM_RETURN_IF_ERROR(Separate(i, level + 1));
        EM_ASSIGN_OR_RETURN(const std::string key, JsonKey(entries[i]->key, style_.ascii));
        EM_RETURN_IF_ERROR(out_.Put(key));
        EM_RETURN_IF_ERROR(out_.Put(style_.key_separator));
        EM_RETURN_IF_ERROR(Put(entries[i]->value, level + 1));
      }
      EM_RETURN_IF_ERROR(NewLine(level));
      return out_.Put("}");
    }
    return TypeError(fmt::format("Object of type {} is not JSON serializable", TypeName(value)));
  }

 private:
  Status Separate(std::size_t index, int level) {
    if (index > 0) EM_RETURN_IF_ERROR(out_.Put(style_.item_separator));
    return NewLine(level);
  }

  Status NewLine(int level) {
    if (style_.indent < 0) return {};
    return out_.Put(
        "\n" + std::string(static_cast<std::size_t>(style_.indent) * static_cast<std::size_t>(level), ' '));
  }

  Writer& out_;
  const JsonStyle& style_;
};

}  // namespace

Expected<std::string> ToRepr(Context& context, const Value& value) {
  Writer out(context);
  EM_RETURN_IF_ERROR(Repr(out, value));
  return out.Take();
}

Expected<std::string> ToText(Context& context, const Value& value) {
  if (value.AsUndefined()) return std::string();
  if (const auto* text = value.AsText()) {
    EM_RETURN_IF_ERROR(context.SpendBytes(text->size()));
    return *text;
  }
  return ToRepr(context, value);
}

Expected<std::string> ToJsonText(Context& context, const Value& value, const JsonStyle& style) {
  if (style.indent > 64)
    return Fail(ErrorCode::kInvalidArgument, "tojson: indent={} (limit=64)", style.indent);
  Writer out(context);
  EM_RETURN_IF_ERROR(JsonWriter(out, style).Put(value, 0));
  return out.Take();
}

}  // namespace elasticmoe::model::jinja
