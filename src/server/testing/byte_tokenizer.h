// A tokenizer for tests: every byte is a token, 256 = <eos>, 257 = <bos>, both special.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "model/tokenizer.h"

namespace elasticmoe::server {

inline constexpr TokenId kEos = 256;
inline constexpr TokenId kBos = 257;
inline constexpr int kByteVocab = 258;

class ByteTokenizer final : public model::Tokenizer {
 public:
  std::vector<TokenId> Encode(std::string_view text, bool add_special) const override {
    std::vector<TokenId> ids;
    if (add_special) ids.push_back(kBos);
    for (unsigned char c : text) ids.push_back(c);
    return ids;
  }

  std::string Decode(std::span<const TokenId> ids, bool skip_special) const override {
    std::string bytes, out;
    const auto flush = [&] {
      out += Utf8(bytes);
      bytes.clear();
    };
    for (TokenId id : ids) {
      if (id >= 0 && id < 256) {
        bytes += static_cast<char>(id);
      } else if (!skip_special && (id == kEos || id == kBos)) {
        flush();
        out += TokenText(id);
      }
    }
    flush();
    return out;
  }

  std::unique_ptr<model::TextStream> NewTextStream(bool skip_special) const override {
    return std::make_unique<Stream>(*this, skip_special);
  }

  std::string TokenText(TokenId id) const override {
    if (id == kEos) return eos_;
    if (id == kBos) return bos_;
    return Utf8(std::string(1, static_cast<char>(id)));
  }
  std::string TokenBytes(TokenId id) const override {
    return id < 256 ? std::string(1, static_cast<char>(id)) : TokenText(id);
  }
  std::optional<TokenId> Find(std::string_view token) const override {
    if (token == eos_) return kEos;
    if (token == bos_) return kBos;
    if (token.size() == 1) return static_cast<unsigned char>(token[0]);
    return std::nullopt;
  }
  bool IsSpecial(TokenId id) const override { return id >= 256; }
  int Size() const override { return kByteVocab; }
  const std::string& BosToken() const override { return bos_; }
  const std::string& EosToken() const override { return eos_; }
  const std::string& ChatTemplateSource() const override { return template_; }

 private:
  // Holds back at most three bytes that may be the beginning of a character.
  class Stream final : public model::TextStream {
   public:
    Stream(const ByteTokenizer& tokenizer, bool skip_special)
        : tokenizer_(tokenizer), skip_special_(skip_special) {}
    std::string Add(TokenId id) override {
      pending_.push_back(id);
      std::string text = tokenizer_.Decode(pending_, skip_special_);
      if (text.ends_with("\xEF\xBF\xBD") && pending_.size() < 4) return "";
      pending_.clear();
      return text;
    }
    std::string Finish() override {
      std::string text = tokenizer_.Decode(pending_, skip_special_);
      pending_.clear();
      return text;
    }

   private:
    const ByteTokenizer& tokenizer_;
    bool skip_special_;
    std::vector<TokenId> pending_;
  };

  // U+FFFD for what is no UTF-8 (good enough for tests: by lead byte and continuation count).
  static std::string Utf8(const std::string& bytes) {
    std::string out;
    for (std::size_t i = 0; i < bytes.size();) {
      const auto lead = static_cast<unsigned char>(bytes[i]);
      const std::size_t n = lead < 0x80                   ? 1
                            : lead >= 0xC2 && lead < 0xE0 ? 2
                            : lead >= 0xE0 && lead < 0xF0 ? 3
                            : lead >= 0xF0 && lead < 0xF5 ? 4
                                                          : 0;
      std::size_t good = n == 0 ? 0 : 1;
      while (good > 0 && good < n && i + good < bytes.size() &&
             (static_cast<unsigned char>(bytes[i + good]) & 0xC0U) == 0x80U)
        ++good;
      if (n > 0 && good == n)
        out.append(bytes, i, n);
      else
        out += "\xEF\xBF\xBD";
      i += good == 0 ? 1 : good;
    }
    return out;
  }

  std::string eos_ = "<eos>", bos_ = "<bos>", template_;
};

}  // namespace elasticmoe::server
