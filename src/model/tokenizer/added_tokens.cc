#include "model/tokenizer/added_tokens.h"

#include <algorithm>

#include "model/tokenizer/unicode.h"

namespace elasticmoe::model {
namespace {

std::size_t CharStartBefore(std::string_view text, std::size_t at) {
  do --at;
  while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80);
  return at;
}

bool WordBefore(std::string_view text, std::size_t at) {
  return at > 0 && IsWordCharacter(StepUtf8(text, CharStartBefore(text, at)).code);
}

bool WordAfter(std::string_view text, std::size_t at) {
  return at < text.size() && IsWordCharacter(StepUtf8(text, at).code);
}

std::size_t SpaceStart(std::string_view text, std::size_t at, std::size_t low) {
  while (at > low) {
    const std::size_t before = CharStartBefore(text, at);
    if (before < low || !IsSpaceCharacter(StepUtf8(text, before).code)) break;
    at = before;
  }
  return at;
}

std::size_t SpaceEnd(std::string_view text, std::size_t at) {
  while (at < text.size()) {
    const Utf8Step step = StepUtf8(text, at);
    if (!IsSpaceCharacter(step.code)) break;
    at += static_cast<std::size_t>(step.bytes);
  }
  return at;
}

}  // namespace

void AddedTokenFinder::Add(const AddedToken& token, std::string_view text) {
  if (text.empty()) return;
  starts_[static_cast<unsigned char>(text[0])] = true;
  std::uint32_t node = 0;
  for (const unsigned char byte : text) {
    const auto [at, is_new] = child_.try_emplace(std::uint64_t{node} << 8 | byte, nodes_.size());
    if (is_new) nodes_.emplace_back();
    node = at->second;
  }
  if (nodes_[node].token == nullptr) nodes_[node].token = &token;
}

const AddedToken* AddedTokenFinder::LongestAt(std::string_view text, std::size_t at, std::size_t& end) const {
  const AddedToken* longest = nullptr;
  std::uint32_t node = 0;
  for (std::size_t i = at; i < text.size(); ++i) {
    const auto next = child_.find(std::uint64_t{node} << 8 | static_cast<unsigned char>(text[i]));
    if (next == child_.end()) break;
    node = next->second;
    if (nodes_[node].token == nullptr) continue;
    longest = nodes_[node].token;
    end = i + 1;
  }
  return longest;
}

void AddedTokenFinder::Split(std::string_view text, std::vector<AddedTokenSplit>& out) const {
  std::size_t done = 0;  // up to here `text` is in `out`
  for (std::size_t at = 0; at < text.size();) {
    std::size_t end = 0;
    const AddedToken* token =
        starts_[static_cast<unsigned char>(text[at])] ? LongestAt(text, at, end) : nullptr;
    if (token == nullptr) {
      ++at;
      continue;
    }
    std::size_t begin = at;
    at = end;
    if (token->single_word && (WordBefore(text, begin) || WordAfter(text, end))) continue;
    if (token->lstrip) begin = SpaceStart(text, begin, done);
    if (token->rstrip) end = SpaceEnd(text, end);
    begin = std::max(begin, done);
    end = std::max(end, done);
    if (done < begin) out.push_back({nullptr, text.substr(done, begin - done)});
    out.push_back({token, text.substr(begin, end - begin)});
    done = end;
  }
  if (done < text.size()) out.push_back({nullptr, text.substr(done)});
}

}  // namespace elasticmoe::model
