#include "model/tokenizer/pretokenizer.h"

#include <algorithm>
#include <array>
#include <utility>

#include "model/tokenizer/normalizer.h"
#include "model/tokenizer/unicode.h"

namespace elasticmoe::model {
namespace {

// What ByteLevel splits by when use_regex is set (GPT-2).
constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

}  // namespace

Expected<PreTokenizer> PreTokenizer::FromJson(const PlainJson& json) {
  PreTokenizer out;
  EM_RETURN_IF_ERROR(out.AddJson(json, 0));
  return out;
}

Status PreTokenizer::AddSplit(Regex pattern, Behavior behavior, bool invert) {
  steps_.push_back({.kind = Kind::kSplit, .behavior = behavior, .invert = invert});
  steps_.back().pattern.push_back(std::move(pattern));
  return {};
}

Status PreTokenizer::AddMetaspace(const PlainJson& json) {
  Step step{.kind = Kind::kMetaspace, .replacement = TextMember(json, "replacement")};
  if (step.replacement.empty() || CharBytes(step.replacement, 0) != step.replacement.size())
    return Fail(ErrorCode::kInvalidArgument, "pre_tokenizer.replacement={}: one character was expected",
                step.replacement);
  const std::string scheme = TextMember(json, "prepend_scheme");
  if (scheme == "first") {
    step.prepend = Prepend::kFirst;
  } else if (scheme == "never" || (scheme.empty() && !FlagMember(json, "add_prefix_space", true))) {
    step.prepend = Prepend::kNever;
  } else if (!scheme.empty() && scheme != "always") {
    return Fail(ErrorCode::kUnimplemented,
                "pre_tokenizer.prepend_scheme={} (supported: always, first, never)", scheme);
  }
  EM_ASSIGN_OR_RETURN(Regex space, Regex::Literal(step.replacement));
  steps_.push_back(std::move(step));
  if (FlagMember(json, "split", true)) return AddSplit(std::move(space), Behavior::kMergedWithNext, false);
  return {};
}

Status PreTokenizer::AddJson(const PlainJson& json, int depth) {
  if (json.is_null()) return {};
  if (!json.is_object() || depth > 8)
    return Fail(ErrorCode::kInvalidArgument, "pre_tokenizer: no object or nested too deep");
  const std::string type = TextMember(json, "type");
  if (type == "Sequence") {
    const PlainJson* list = Member(json, "pretokenizers");
    if (list == nullptr || !list->is_array())
      return Fail(ErrorCode::kInvalidArgument, "pre_tokenizer.pretokenizers: missing or no list");
    for (const PlainJson& one : *list) EM_RETURN_IF_ERROR(AddJson(one, depth + 1));
    return {};
  }
  if (byte_level_)
    return Fail(ErrorCode::kUnimplemented, "pre_tokenizer: {} after ByteLevel (ByteLevel must come last)",
                type);
  if (type == "Split") {
    constexpr std::array<std::pair<std::string_view, Behavior>, 5> kBehaviors = {
        {{"Removed", Behavior::kRemoved},
         {"Isolated", Behavior::kIsolated},
         {"MergedWithPrevious", Behavior::kMergedWithPrevious},
         {"MergedWithNext", Behavior::kMergedWithNext},
         {"Contiguous", Behavior::kContiguous}}};
    const std::string behavior = TextMember(json, "behavior");
    const auto known =
        std::find_if(kBehaviors.begin(), kBehaviors.end(), [&](auto& b) { return b.first == behavior; });
    if (known == kBehaviors.end())
      return Fail(
          ErrorCode::kInvalidArgument,
          "pre_tokenizer.behavior={} (supported: Removed, Isolated, MergedWithPrevious, MergedWithNext, "
          "Contiguous)",
          behavior);
    EM_ASSIGN_OR_RETURN(Regex pattern, ReadPattern(json, "pre_tokenizer"));
    return AddSplit(std::move(pattern), known->second, FlagMember(json, "invert", false));
  }
  if (type == "Digits") {
    EM_ASSIGN_OR_RETURN(Regex pattern, Regex::Compile("\\p{N}"));
    return AddSplit(
        std::move(pattern),
        FlagMember(json, "individual_digits", false) ? Behavior::kIsolated : Behavior::kContiguous, false);
  }
  if (type == "Metaspace") return AddMetaspace(json);
  if (type == "ByteLevel") {
    byte_level_ = true;
    if (FlagMember(json, "add_prefix_space", true)) steps_.push_back({.kind = Kind::kPrefixSpace});
    if (!FlagMember(json, "use_regex", true)) return {};
    EM_ASSIGN_OR_RETURN(Regex pattern, Regex::Compile(kGpt2Pattern));
    return AddSplit(std::move(pattern), Behavior::kIsolated, false);
  }
  return Fail(
      ErrorCode::kUnimplemented,
      "pre_tokenizer.type={} is not supported (supported: Split, ByteLevel, Digits, Metaspace, Sequence)",
      type.empty() ? "(missing)" : type);
}

void PreTokenizer::Split(const Step& step, const TextPieces::Piece& piece, RegexScratch& scratch,
                         std::vector<Span>& spans, std::vector<TextPieces::Piece>& out) {
  const std::string_view text = piece.text;
  // The whole text as spans, in turn outside of matches and matches.
  spans.clear();
  std::size_t done = 0;
  for (std::size_t from = 0; from <= text.size();) {
    const auto match = step.pattern[0].Find(text, from, scratch);
    if (!match) break;
    if (match->begin == match->end && match->end == done &&
        !spans.empty()) {  // an empty match right behind a match
      if (match->end >= text.size()) break;
      from = match->end + CharBytes(text, match->end);
      continue;
    }
    if (done < match->begin) spans.push_back({done, match->begin, step.invert});
    spans.push_back({match->begin, match->end, !step.invert});
    done = from = match->end;
    if (match->begin == match->end) {
      if (match->end >= text.size()) break;
      from += CharBytes(text, match->end);
    }
  }
  if (done < text.size()) spans.push_back({done, text.size(), step.invert});

  const auto emit = [&](std::size_t begin, std::size_t end) {
    if (begin < end) out.push_back({text.substr(begin, end - begin), piece.at_start && begin == 0});
  };
  switch (step.behavior) {
    case Behavior::kIsolated:
      for (const Span& span : spans) emit(span.begin, span.end);
      return;
    case Behavior::kRemoved:
      for (const Span& span : spans)
        if (!span.match) emit(span.begin, span.end);
      return;
    default:
      break;
  }
  // The merging ones: a span is joined to the one before it, or starts a new piece.
  std::size_t begin = 0;
  for (std::size_t i = 1; i <= spans.size(); ++i) {
    if (i < spans.size()) {
      const bool before = spans[i - 1].match, here = spans[i].match;
      if (step.behavior == Behavior::kContiguous && before == here) continue;
      if (step.behavior == Behavior::kMergedWithPrevious && here && !before) continue;
      if (step.behavior == Behavior::kMergedWithNext && before && !here) continue;
    }
    emit(spans[begin].begin, spans[i - 1].end);
    begin = i;
  }
}

void PreTokenizer::Apply(TextPieces& pieces, RegexScratch& scratch) const {
  std::vector<Span> spans;
  for (const Step& step : steps_) {
    std::vector<TextPieces::Piece> next;
    next.reserve(pieces.pieces.size());
    for (const auto& piece : pieces.pieces) {
      if (step.kind == Kind::kSplit) {
        Split(step, piece, scratch, spans, next);
        continue;
      }
      std::string made;
      if (step.kind == Kind::kPrefixSpace) {
        if (!piece.text.starts_with(' ')) made = " ";
        made += piece.text;
      } else {
        for (const char c : piece.text) c == ' ' ? made += step.replacement : made += c;
        const bool wanted =
            step.prepend == Prepend::kAlways || (step.prepend == Prepend::kFirst && piece.at_start);
        if (wanted && !made.starts_with(step.replacement)) made.insert(0, step.replacement);
      }
      pieces.made.push_back(std::move(made));
      next.push_back({pieces.made.back(), piece.at_start});
    }
    pieces.pieces = std::move(next);
  }
}

}  // namespace elasticmoe::model
