#include "model/tokenizer/decoder.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "model/tokenizer/unicode.h"

namespace elasticmoe::model {
namespace {

// The byte that "<0x0A>" stands for.
std::optional<char> FallbackByte(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return std::nullopt;
  int value = 0;
  for (const char c : token.substr(3, 2)) {
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                             : -1;
    if (digit < 0) return std::nullopt;
    value = value * 16 + digit;
  }
  return static_cast<char>(value);
}

std::string BytesOfByteLevel(std::string_view token) {
  // A token with characters outside of the alphabet (an added one) stands for itself.
  return FromByteAlphabet(token).value_or(std::string(token));
}

class JoinBySpace : public DecodeStep {
 public:
  void Add(std::string piece, Pieces& out) override {
    out.push_back(std::exchange(first_, false) ? std::move(piece) : " " + piece);
  }

 private:
  bool first_ = true;
};

class ByteLevelStep : public DecodeStep {
 public:
  void Add(std::string piece, Pieces& out) override { out.push_back(text_.Add(BytesOfByteLevel(piece))); }
  void Finish(Pieces& out) override { out.push_back(text_.Finish()); }

 private:
  Utf8Stream text_;
};

class ReplaceStep : public DecodeStep {
 public:
  ReplaceStep(const Regex& pattern, std::string_view content) : pattern_(pattern), content_(content) {}
  void Add(std::string piece, Pieces& out) override {
    out.push_back(ReplaceAll(piece, pattern_, content_, scratch_));
  }

 private:
  const Regex& pattern_;
  std::string_view content_;
  RegexScratch scratch_;
};

// A run of byte tokens is text if all of it is UTF-8, else one U+FFFD a byte: so it is held until it ends.
class ByteFallbackStep : public DecodeStep {
 public:
  void Add(std::string piece, Pieces& out) override {
    if (const auto byte = FallbackByte(piece)) {
      run_.push_back(*byte);
      return;
    }
    Finish(out);
    out.push_back(std::move(piece));
  }

  void Finish(Pieces& out) override {
    if (run_.empty()) return;
    if (IsUtf8(run_)) {
      out.push_back(std::exchange(run_, {}));
      return;
    }
    for (std::size_t i = 0; i < run_.size(); ++i) out.emplace_back(kReplacementCharacter);
    run_.clear();
  }

 private:
  std::string run_;
};

// Takes up to `start` of `content` from the front and up to `stop` from the back: of every piece, or of all
// pieces as one (fused).
class StripStep : public DecodeStep {
 public:
  StripStep(std::string_view content, std::size_t start, std::size_t stop, bool fused)
      : content_(content), start_(start), stop_(stop), fused_(fused), start_left_(start) {}

  void Add(std::string piece, Pieces& out) override {
    std::string_view text = piece;
    if (!fused_) {
      start_left_ = start_;
      open_ = true;
    }
    while (open_ && !text.empty()) {
      open_ = start_left_ > 0 && text.starts_with(content_);
      if (!open_) break;
      text.remove_prefix(content_.size());
      --start_left_;
    }
    if (!fused_) {
      for (std::size_t i = 0; i < stop_ && text.ends_with(content_); ++i) text.remove_suffix(content_.size());
      out.emplace_back(text);
      return;
    }
    // The last `stop` occurrences at the end may have to go.
    held_ += text;
    std::string_view rest = held_;
    for (std::size_t i = 0; i < stop_ && rest.ends_with(content_); ++i) rest.remove_suffix(content_.size());
    out.emplace_back(rest);
    held_.erase(0, rest.size());
  }

 private:
  const std::string_view content_;
  const std::size_t start_, stop_;
  const bool fused_;
  std::size_t start_left_;
  bool open_ = true;  // still at the front
  std::string held_;  // dropped if nothing comes after it
};

class MetaspaceStep : public DecodeStep {
 public:
  MetaspaceStep(std::string_view mark, bool drops_first) : mark_(mark), drops_(drops_first) {}

  void Add(std::string piece, Pieces& out) override {
    const bool drop = std::exchange(drops_, false);
    std::string text;
    for (std::size_t i = 0; i < piece.size();) {
      if (std::string_view(piece).substr(i).starts_with(mark_)) {
        if (!drop) text += ' ';
        i += mark_.size();
      } else {
        text += piece[i++];
      }
    }
    out.push_back(std::move(text));
  }

 private:
  const std::string_view mark_;
  bool drops_;
};

}  // namespace

Expected<Decoder> Decoder::FromJson(const PlainJson& json) {
  Decoder out;
  if (json.is_null()) {
    out.steps_.push_back({.kind = Kind::kJoinBySpace});
    return out;
  }
  bool fused = false;
  EM_RETURN_IF_ERROR(out.AddJson(json, 0, fused));
  return out;
}

Status Decoder::AddJson(const PlainJson& json, int depth, bool& fused) {
  if (!json.is_object() || depth > 8)
    return Fail(ErrorCode::kInvalidArgument, "decoder: no object or nested too deep");
  const std::string type = TextMember(json, "type");
  if (type == "Sequence") {
    const PlainJson* list = Member(json, "decoders");
    if (list == nullptr || !list->is_array())
      return Fail(ErrorCode::kInvalidArgument, "decoder.decoders: missing or no list");
    for (const PlainJson& one : *list) EM_RETURN_IF_ERROR(AddJson(one, depth + 1, fused));
    return {};
  }
  if (type == "Fuse") {
    fused = true;
    return {};
  }
  if (type == "Strip") {
    const auto count = [&](const char* key) -> std::size_t {
      const PlainJson* at = Member(json, key);
      return at != nullptr && at->is_number_unsigned() ? at->get<std::size_t>() : 0;
    };
    Step step{.kind = Kind::kStrip,
              .content = TextMember(json, "content"),
              .start = count("start"),
              .stop = count("stop")};
    if (step.content.empty() || CharBytes(step.content, 0) != step.content.size())
      return Fail(ErrorCode::kInvalidArgument, "decoder.content={}: one character was expected (type=Strip)",
                  step.content);
    step.fused = fused;
    steps_.push_back(std::move(step));
    return {};
  }
  // All others look at single tokens, which are no more behind a Fuse.
  const bool known =
      type == "ByteLevel" || type == "Replace" || type == "ByteFallback" || type == "Metaspace";
  if (!known)
    return Fail(ErrorCode::kUnimplemented,
                "decoder.type={} is not supported (supported: ByteLevel, Replace, ByteFallback, Fuse, Strip, "
                "Metaspace, "
                "Sequence)",
                type.empty() ? "(missing)" : type);
  if (fused)
    return Fail(ErrorCode::kUnimplemented,
                "decoder: {} after Fuse or ByteLevel (only Strip is supported there)", type);
  if (type == "ByteLevel") {
    fused = true;
    steps_.push_back({.kind = Kind::kByteLevel});
  } else if (type == "ByteFallback") {
    steps_.push_back({.kind = Kind::kByteFallback});
  } else if (type == "Replace") {
    EM_ASSIGN_OR_RETURN(Regex pattern, ReadPattern(json, "decoder"));
    steps_.push_back({.kind = Kind::kReplace, .content = TextMember(json, "content")});
    steps_.back().pattern.push_back(std::move(pattern));
  } else {
    Step step{.kind = Kind::kMetaspace, .content = TextMember(json, "replacement")};
    if (step.content.empty() || CharBytes(step.content, 0) != step.content.size())
      return Fail(ErrorCode::kInvalidArgument,
                  "decoder.replacement={}: one character was expected (type=Metaspace)", step.content);
    const std::string scheme = TextMember(json, "prepend_scheme");
    step.drops_first = scheme.empty() ? FlagMember(json, "add_prefix_space", true) : scheme != "never";
    steps_.push_back(std::move(step));
  }
  return {};
}

Decoder::Stream Decoder::NewStream() const {
  Stream stream;
  for (const Step& step : steps_) {
    std::unique_ptr<DecodeStep> made;
    switch (step.kind) {
      case Kind::kJoinBySpace:
        made = std::make_unique<JoinBySpace>();
        break;
      case Kind::kByteLevel:
        made = std::make_unique<ByteLevelStep>();
        break;
      case Kind::kReplace:
        made = std::make_unique<ReplaceStep>(step.pattern[0], step.content);
        break;
      case Kind::kByteFallback:
        made = std::make_unique<ByteFallbackStep>();
        break;
      case Kind::kStrip:
        made = std::make_unique<StripStep>(step.content, step.start, step.stop, step.fused);
        break;
      case Kind::kMetaspace:
        made = std::make_unique<MetaspaceStep>(step.content, step.drops_first);
        break;
    }
    stream.steps_.push_back(std::move(made));
  }
  return stream;
}

// `pieces` through the steps from `first` on.
std::string Decoder::Stream::Run(std::size_t first, DecodeStep::Pieces pieces) {
  for (std::size_t i = first; i < steps_.size(); ++i) {
    DecodeStep::Pieces next;
    for (std::string& piece : pieces) steps_[i]->Add(std::move(piece), next);
    pieces = std::move(next);
  }
  std::string out;
  for (const std::string& piece : pieces) out += piece;
  return out;
}

std::string Decoder::Stream::Add(std::string_view token) {
  DecodeStep::Pieces pieces;
  pieces.emplace_back(token);
  return Run(0, std::move(pieces));
}

std::string Decoder::Stream::Finish() {
  std::string out;
  for (std::size_t i = 0; i < steps_.size(); ++i) {
    DecodeStep::Pieces pieces;
    steps_[i]->Finish(pieces);
    out += Run(i + 1, std::move(pieces));
  }
  return out;
}

std::string Decoder::BytesOf(std::string_view token) const {
  std::string bytes(token);
  RegexScratch scratch;
  for (const Step& step : steps_) {
    switch (step.kind) {
      case Kind::kByteLevel:
        return BytesOfByteLevel(bytes);
      case Kind::kByteFallback:
        if (const auto byte = FallbackByte(bytes)) return std::string(1, *byte);
        break;
      case Kind::kReplace:
        bytes = ReplaceAll(bytes, step.pattern[0], step.content, scratch);
        break;
      case Kind::kMetaspace: {
        DecodeStep::Pieces pieces;
        MetaspaceStep(step.content, false).Add(std::move(bytes), pieces);
        bytes = std::move(pieces[0]);
        break;
      }
      case Kind::kJoinBySpace:
      case Kind::kStrip:
        break;
    }
  }
  return bytes;
}

}  // namespace elasticmoe::model
