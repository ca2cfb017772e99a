#include "model/tokenizer/normalizer.h"

#include <array>
#include <utility>

namespace elasticmoe::model {
namespace {

constexpr std::array<std::pair<std::string_view, NormalForm>, 4> kForms = {{{"NFC", NormalForm::kNfc},
                                                                            {"NFD", NormalForm::kNfd},
                                                                            {"NFKC", NormalForm::kNfkc},
                                                                            {"NFKD", NormalForm::kNfkd}}};

std::string_view TrimSpace(std::string_view text, bool left, bool right) {
  while (left && !text.empty()) {
    const Utf8Step step = StepUtf8(text, 0);
    if (!IsSpaceCharacter(step.code)) break;
    text.remove_prefix(static_cast<std::size_t>(step.bytes));
  }
  while (right && !text.empty()) {
    std::size_t at = text.size() - 1;
    while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80) --at;
    if (!IsSpaceCharacter(StepUtf8(text, at).code)) break;
    text = text.substr(0, at);
  }
  return text;
}

}  // namespace

Expected<Regex> ReadPattern(const PlainJson& owner, std::string_view key) {
  if (const PlainJson* pattern = Member(owner, "pattern")) {
    if (const PlainJson* text = Member(*pattern, "String"); text != nullptr && text->is_string())
      return Regex::Literal(text->get_ref<const std::string&>());
    if (const PlainJson* regex = Member(*pattern, "Regex"); regex != nullptr && regex->is_string()) {
      auto compiled = Regex::Compile(regex->get_ref<const std::string&>());
      if (!compiled) return Within(fmt::format("{}.pattern", key), compiled.error());
      return compiled;
    }
  }
  return Fail(ErrorCode::kInvalidArgument,
              "{}.pattern: missing or neither {{\"String\": ...}} nor {{\"Regex\": ...}}", key);
}

std::string ReplaceAll(std::string_view text, const Regex& pattern, std::string_view content,
                       RegexScratch& scratch) {
  std::string out;
  std::size_t done = 0;
  for (std::size_t from = 0; from <= text.size();) {
    const auto match = pattern.Find(text, from, scratch);
    if (!match) break;
    if (match->end == match->begin) {  // nothing to replace there; go on behind the next character
      if (match->end >= text.size()) break;
      from = match->end + CharBytes(text, match->end);
      continue;
    }
    out += text.substr(done, match->begin - done);
    out += content;
    done = from = match->end;
  }
  out += text.substr(done);
  return out;
}

Expected<Normalizer> Normalizer::FromJson(const PlainJson& json) {
  Normalizer out;
  EM_RETURN_IF_ERROR(out.AddJson(json, 0));
  return out;
}

Status Normalizer::AddJson(const PlainJson& json, int depth) {
  if (json.is_null()) return {};
  if (!json.is_object() || depth > 8)
    return Fail(ErrorCode::kInvalidArgument, "normalizer: no object or nested too deep");
  const std::string type = TextMember(json, "type");
  if (type == "Sequence") {
    const PlainJson* list = Member(json, "normalizers");
    if (list == nullptr || !list->is_array())
      return Fail(ErrorCode::kInvalidArgument, "normalizer.normalizers: missing or no list");
    for (const PlainJson& one : *list) EM_RETURN_IF_ERROR(AddJson(one, depth + 1));
    return {};
  }
  for (const auto& [name, form] : kForms) {
    if (type != name) continue;
    steps_.push_back({.kind = Kind::kForm, .form = form});
    return {};
  }
  const auto text = [&](const char* key) -> Expected<std::string> {
    const PlainJson* at = Member(json, key);
    if (at == nullptr || !at->is_string())
      return Fail(ErrorCode::kInvalidArgument, "normalizer.{}: missing or no string (type={})", key, type);
    return at->get<std::string>();
  };
  if (type == "Prepend") {
    EM_ASSIGN_OR_RETURN(std::string content, text("prepend"));
    steps_.push_back({.kind = Kind::kPrepend, .content = std::move(content)});
    return {};
  }
  if (type == "Replace") {
    EM_ASSIGN_OR_RETURN(std::string content, text("content"));
    EM_ASSIGN_OR_RETURN(Regex pattern, ReadPattern(json, "normalizer"));
    steps_.push_back({.kind = Kind::kReplace, .content = std::move(content)});
    steps_.back().pattern.push_back(std::move(pattern));
    return {};
  }
  if (type == "Strip") {
    steps_.push_back({.kind = Kind::kStrip,
                      .left = FlagMember(json, "strip_left"),
                      .right = FlagMember(json, "strip_right")});
    return {};
  }
  return Fail(ErrorCode::kUnimplemented,
              "normalizer.type={} is not supported (supported: NFC, NFD, NFKC, NFKD, Prepend, Replace, "
              "Strip, Sequence)",
              type.empty() ? "(missing)" : type);
}

std::string Normalizer::Apply(std::string_view text, RegexScratch& scratch) const {
  std::string out(text);
  for (const Step& step : steps_) {
    switch (step.kind) {
      case Kind::kForm:
        out = Normalize(out, step.form);
        break;
      case Kind::kPrepend:
        if (!out.empty()) out.insert(0, step.content);
        break;
      case Kind::kReplace:
        out = ReplaceAll(out, step.pattern[0], step.content, scratch);
        break;
      case Kind::kStrip:
        out = std::string(TrimSpace(out, step.left, step.right));
        break;
    }
  }
  return out;
}

}  // namespace elasticmoe::model
