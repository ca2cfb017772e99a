// Added tokens: texts that stand for one id whatever the model makes of them, special or not. Finds them in a
// text, the longest at the leftmost place first. Immutable after building, so thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/ids.h"

namespace elasticmoe::model {

struct AddedToken {
  TokenId id = 0;
  std::string content;
  bool single_word = false;  // only where no word character touches it
  bool lstrip = false;       // takes the white space before it along
  bool rstrip = false;       // ... and after it
  bool normalized = false;   // is looked for in the normalized text
  bool special = false;
};

// A piece of a text: an added token, or (token == nullptr) text between them.
struct AddedTokenSplit {
  const AddedToken* token = nullptr;
  std::string_view text;
};

class AddedTokenFinder {
 public:
  // `token` must outlive the finder. `text` is what to look for (the content, perhaps normalized).
  void Add(const AddedToken& token, std::string_view text);

  // `text` in pieces, empty ones left out. Cost: bytes of `text` × length of the longest token, at worst.
  void Split(std::string_view text, std::vector<AddedTokenSplit>& out) const;

 private:
  struct Node {
    const AddedToken* token = nullptr;
  };
  const AddedToken* LongestAt(std::string_view text, std::size_t at, std::size_t& end) const;

  std::vector<Node> nodes_{1};                              // a trie over bytes; 0 is its root
  std::unordered_map<std::uint64_t, std::uint32_t> child_;  // node << 8 | byte → node
  bool starts_[256] = {};                                   // bytes that some token starts with
};

}  // namespace elasticmoe::model
