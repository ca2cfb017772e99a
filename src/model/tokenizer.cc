#include "model/tokenizer.h"

#include <algorithm>
#include <deque>
#include <unordered_map>
#include <utility>

#include "base/file.h"
#include "model/gguf/gguf.h"
#include "model/gguf/tokenizer.h"
#include "model/tokenizer/added_tokens.h"
#include "model/tokenizer/bpe.h"
#include "model/tokenizer/decoder.h"
#include "model/tokenizer/normalizer.h"
#include "model/tokenizer/pretokenizer.h"
#include "model/tokenizer/tokenizer_config.h"
#include "model/tokenizer/tokenizer_json.h"
#include "model/tokenizer/unicode.h"

namespace elasticmoe::model {
namespace {

class BpeTokenizer : public Tokenizer {
 public:
  BpeTokenizer(TokenizerConfig config, Normalizer normalizer, PreTokenizer pre_tokenizer, Bpe bpe,
               Decoder decoder)
      : config_(std::move(config)),
        normalizer_(std::move(normalizer)),
        pre_tokenizer_(std::move(pre_tokenizer)),
        bpe_(std::move(bpe)),
        decoder_(std::move(decoder)) {
    size_ = bpe_.Size();
    RegexScratch scratch;
    for (const AddedToken& token : config_.added_tokens) {
      added_.insert_or_assign(token.id, &token);
      added_by_text_.insert_or_assign(token.content, token.id);
      size_ = std::max(size_, token.id + 1);
      if (token.normalized)
        in_normalized_.Add(token, normalizer_.Apply(token.content, scratch));
      else
        in_text_.Add(token, token.content);
    }
  }

  std::vector<TokenId> Encode(std::string_view text, bool add_special) const override {
    std::vector<TokenId> ids;
    ids.reserve(text.size() / 3 + 4);
    if (add_special) ids = config_.prefix;
    EncodeText(IsUtf8(text) ? text : std::string_view(RepairUtf8(text)), ids);
    if (add_special) ids.insert(ids.end(), config_.suffix.begin(), config_.suffix.end());
    return ids;
  }

  std::string Decode(std::span<const TokenId> ids, bool skip_special) const override {
    Decoder::Stream stream = decoder_.NewStream();
    std::string text;
    for (const TokenId id : ids)
      if (const auto token = Entry(id, skip_special)) text += stream.Add(*token);
    return text + stream.Finish();
  }

  std::unique_ptr<TextStream> NewTextStream(bool skip_special) const override {
    return std::make_unique<Stream>(*this, skip_special);
  }

  std::string TokenText(TokenId id) const override { return RepairUtf8(TokenBytes(id)); }

  std::string TokenBytes(TokenId id) const override {
    if (const auto added = added_.find(id); added != added_.end()) return added->second->content;
    return bpe_.Has(id) ? decoder_.BytesOf(bpe_.Token(id)) : std::string();
  }

  std::optional<TokenId> Find(std::string_view token) const override {
    const auto added = added_by_text_.find(token);
    return added != added_by_text_.end() ? std::optional(added->second) : bpe_.Find(token);
  }

  bool IsSpecial(TokenId id) const override {
    const auto added = added_.find(id);
    return added != added_.end() && added->second->special;
  }

  int Size() const override { return size_; }
  const std::string& BosToken() const override { return config_.bos_token; }
  const std::string& EosToken() const override { return config_.eos_token; }
  const std::string& ChatTemplateSource() const override { return config_.chat_template; }

 private:
  class Stream : public TextStream {
   public:
    Stream(const BpeTokenizer& tokenizer, bool skip_special)
        : tokenizer_(tokenizer), skip_special_(skip_special), stream_(tokenizer.decoder_.NewStream()) {}
    std::string Add(TokenId id) override {
      const auto token = tokenizer_.Entry(id, skip_special_);
      return token ? stream_.Add(*token) : std::string();
    }
    std::string Finish() override { return stream_.Finish(); }

   private:
    const BpeTokenizer& tokenizer_;
    bool skip_special_;
    Decoder::Stream stream_;
  };

  // What the vocabulary or the added tokens have for `id`; nullopt if nothing, or special and not wanted.
  std::optional<std::string_view> Entry(TokenId id, bool skip_special) const {
    if (const auto added = added_.find(id); added != added_.end()) {
      if (skip_special && added->second->special) return std::nullopt;
      return added->second->content;
    }
    return bpe_.Has(id) ? std::optional(bpe_.Token(id)) : std::nullopt;
  }

  // Added tokens first, in the text as it is; what lies between is normalized and searched for the added
  // tokens that are meant in normalized text; what lies between those is split and goes to the model.
  void EncodeText(std::string_view text, std::vector<TokenId>& ids) const {
    RegexScratch regex_scratch;
    Bpe::Scratch bpe_scratch;
    std::vector<AddedTokenSplit> outer, inner;
    in_text_.Split(text, outer);
    for (const AddedTokenSplit& split : outer) {
      if (split.token != nullptr) {
        ids.push_back(split.token->id);
        continue;
      }
      std::string normalized;
      std::string_view part = split.text;
      if (!normalizer_.Empty()) {
        normalized = normalizer_.Apply(part, regex_scratch);
        part = normalized;
      }
      inner.clear();
      in_normalized_.Split(part, inner);
      for (const AddedTokenSplit& inside : inner) {
        if (inside.token != nullptr) {
          ids.push_back(inside.token->id);
          continue;
        }
        TextPieces pieces;
        const bool at_start = split.text.data() == text.data() && inside.text.data() == part.data();
        pieces.pieces.push_back({inside.text, at_start});
        pre_tokenizer_.Apply(pieces, regex_scratch);
        for (const TextPieces::Piece& piece : pieces.pieces) bpe_.Encode(piece.text, bpe_scratch, ids);
      }
    }
  }

  TokenizerConfig config_;
  Normalizer normalizer_;
  PreTokenizer pre_tokenizer_;
  Bpe bpe_;
  Decoder decoder_;
  std::unordered_map<TokenId, const AddedToken*> added_;
  std::unordered_map<std::string_view, TokenId> added_by_text_;
  AddedTokenFinder in_text_, in_normalized_;
  TokenId size_ = 0;
};

Expected<std::unique_ptr<Tokenizer>> Build(TokenizerJson json, const PlainJson& config_json) {
  const auto part = [&](const char* key) -> const PlainJson& {
    static const PlainJson none;
    const PlainJson* at = Member(json.rest, key);
    return at == nullptr ? none : *at;
  };
  EM_ASSIGN_OR_RETURN(PreTokenizer pre_tokenizer, PreTokenizer::FromJson(part("pre_tokenizer")));
  EM_ASSIGN_OR_RETURN(Bpe bpe, Bpe::FromJson(json, pre_tokenizer.ByteLevel()));
  EM_ASSIGN_OR_RETURN(Normalizer normalizer, Normalizer::FromJson(part("normalizer")));
  EM_ASSIGN_OR_RETURN(Decoder decoder, Decoder::FromJson(part("decoder")));
  EM_ASSIGN_OR_RETURN(TokenizerConfig config, ReadTokenizerConfig(json.rest, config_json, bpe));
  return std::make_unique<BpeTokenizer>(std::move(config), std::move(normalizer), std::move(pre_tokenizer),
                                        std::move(bpe), std::move(decoder));
}

}  // namespace

Expected<std::unique_ptr<Tokenizer>> Tokenizer::FromJson(std::string_view tokenizer_json,
                                                         std::string_view tokenizer_config_json) {
  const auto within = [](Error error) { return Within("reading tokenizer.json", std::move(error)); };
  auto json = ReadTokenizerJson(tokenizer_json);
  if (!json) return within(std::move(json.error()));
  auto config = ReadPlainJson(tokenizer_config_json, "tokenizer_config.json");
  if (!config) return within(std::move(config.error()));
  auto tokenizer = Build(*std::move(json), *config);
  if (!tokenizer) return within(std::move(tokenizer.error()));
  return tokenizer;
}

Expected<std::unique_ptr<Tokenizer>> Tokenizer::Open(const std::filesystem::path& model) {
  return IsGgufPath(model) ? FromGguf(model) : FromDirectory(model);
}

Expected<std::unique_ptr<Tokenizer>> Tokenizer::FromGguf(const std::filesystem::path& path) {
  EM_ASSIGN_OR_RETURN(const Gguf gguf, OpenGguf(path));
  const auto within = [&](Error error) {
    return Within(fmt::format("reading {}", path.string()), std::move(error));
  };
  auto parts = ReadGgufTokenizer(gguf);
  if (!parts) return within(std::move(parts.error()));
  if (!*parts) return nullptr;
  auto tokenizer = Build(std::move((*parts)->json), (*parts)->config);
  if (!tokenizer) return within(std::move(tokenizer.error()));
  return tokenizer;
}

Expected<std::unique_ptr<Tokenizer>> Tokenizer::FromDirectory(const std::filesystem::path& directory) {
  std::error_code code;
  if (!std::filesystem::exists(directory / "tokenizer.json", code)) return nullptr;
  const auto read = [&]() -> Expected<std::unique_ptr<Tokenizer>> {
    EM_ASSIGN_OR_RETURN(const std::string text, ReadFile(directory / "tokenizer.json"));
    EM_ASSIGN_OR_RETURN(TokenizerJson json, ReadTokenizerJson(text));
    EM_ASSIGN_OR_RETURN(const PlainJson config, ReadTokenizerConfigFiles(directory));
    auto tokenizer = Build(std::move(json), config);
    if (!tokenizer) return Within("reading tokenizer.json", std::move(tokenizer.error()));
    return tokenizer;
  };
  auto tokenizer = read();
  if (!tokenizer) return Within(directory.string(), std::move(tokenizer.error()));
  return tokenizer;
}

StreamDecoder::StreamDecoder(const Tokenizer& tokenizer, bool skip_special)
    : stream_(tokenizer.NewTextStream(skip_special)) {}

std::string StreamDecoder::Add(TokenId id) {
  return stream_->Add(id);
}
std::string StreamDecoder::Finish() {
  return stream_->Finish();
}

}  // namespace elasticmoe::model
