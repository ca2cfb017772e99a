#include "model/tokenizer/tokenizer_json.h"

#include <limits>

namespace elasticmoe::model {
namespace {

constexpr int kMaxDepth = 64;

// Takes the events of nlohmann's parser: builds a tree, except below model.vocab and model.merges.
class Reader : public nlohmann::json_sax<PlainJson> {
 public:
  Reader(TokenizerJson& out, bool split_model) : out_(out), split_model_(split_model) {}

  const std::string& Error() const { return error_; }

  bool null() override { return Scalar(nullptr); }
  bool boolean(bool value) override { return Scalar(value); }
  bool number_integer(number_integer_t value) override { return Integer(value); }
  bool number_unsigned(number_unsigned_t value) override {
    constexpr auto kMax = static_cast<number_unsigned_t>(std::numeric_limits<std::int64_t>::max());
    if (part_ == Part::kTree) return Scalar(value);
    return Integer(static_cast<std::int64_t>(std::min(value, kMax)));
  }
  bool number_float(number_float_t value, const string_t&) override { return Scalar(value); }
  bool binary(binary_t&) override { return Scalar(nullptr); }

  bool string(string_t& value) override {
    if (part_ == Part::kMerges) return MergeText(value);
    return Scalar(value);
  }

  bool key(string_t& value) override {
    key_ = std::move(value);
    return true;
  }

  bool start_object(std::size_t) override {
    if (part_ != Part::kTree) return Open(false);
    if (IsModelKey("vocab")) {
      out_.has_vocab = true;
      out_.vocab.clear();
      return Enter(Part::kVocab);
    }
    if (IsModelKey("merges")) return Malformed("merges: an object"), Enter(Part::kMerges);
    return Push(PlainJson::object());
  }

  bool start_array(std::size_t) override {
    if (part_ != Part::kTree) return Open(true);
    if (IsModelKey("merges")) {
      out_.has_merges = true;
      out_.merges.clear();
      return Enter(Part::kMerges);
    }
    if (IsModelKey("vocab")) return Malformed("vocab: a list"), Enter(Part::kVocab);
    return Push(PlainJson::array());
  }

  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& e) override {
    std::string_view what = e.what();
    if (const auto at = what.find("] "); at != what.npos) what.remove_prefix(at + 2);  // the library's tag
    error_ = fmt::format("byte {}: {}", position, what);
    return false;
  }

 private:
  enum class Part { kTree, kVocab, kMerges };

  // At the key `name` of the top-level object "model"?
  bool IsModelKey(std::string_view name) const {
    return split_model_ && stack_.size() == 2 && model_ == stack_.back() && key_ == name;
  }

  void Malformed(std::string what) {
    if (out_.malformed.empty()) out_.malformed = std::move(what);
  }

  bool Enter(Part part) {
    part_ = part;
    part_depth_ = 1;
    return true;
  }

  // A list or object inside of vocab or merges: only merges have any, as lists of two strings.
  bool Open(bool is_list) {
    if (++part_depth_ > kMaxDepth) return TooDeep();
    if (part_ == Part::kMerges && is_list && part_depth_ == 2) {
      pair_texts_ = 0;
      out_.merges.emplace_back();
    } else {
      Malformed(part_ == Part::kVocab ? "vocab: a value that is no id" : "merges: a value that is no pair");
    }
    return true;
  }

  bool Close() {
    if (part_ == Part::kTree) {
      stack_.pop_back();
      return true;
    }
    if (part_ == Part::kMerges && part_depth_ == 2 && pair_texts_ != 2)
      Malformed(fmt::format("merges: entry {} has not two strings", out_.merges.size() - 1));
    if (--part_depth_ == 0) part_ = Part::kTree;
    return true;
  }

  bool MergeText(std::string& text) {
    if (part_depth_ == 2) {
      if (out_.merges.empty()) return true;  // inside of something malformed
      auto& [left, right] = out_.merges.back();
      if (pair_texts_ == 0) left = std::move(text);
      if (pair_texts_ == 1) right = std::move(text);
      ++pair_texts_;
      return true;
    }
    const auto space = text.find(' ');  // the older form: "left right"
    if (part_depth_ != 1 || space == text.npos || text.find(' ', space + 1) != text.npos) {
      Malformed(fmt::format("merges: entry {} is no pair", out_.merges.size()));
      return true;
    }
    out_.merges.emplace_back(text.substr(0, space), text.substr(space + 1));
    return true;
  }

  bool Integer(std::int64_t value) {
    if (part_ != Part::kVocab) return Scalar(value);
    if (part_depth_ != 1) return true;
    if (value < 0 || value > kMaxTokenId)
      Malformed(fmt::format("vocab: id {} (limit={})", value, kMaxTokenId));
    else
      out_.vocab.emplace_back(std::move(key_), static_cast<TokenId>(value));
    return true;
  }

  bool Scalar(PlainJson value) {
    if (part_ == Part::kTree) return Add(std::move(value)) != nullptr;
    Malformed(part_ == Part::kVocab ? "vocab: a value that is no id" : "merges: a value that is no pair");
    return true;
  }

  PlainJson* Add(PlainJson value) {
    if (stack_.empty()) {
      out_.rest = std::move(value);
      return &out_.rest;
    }
    PlainJson& parent = *stack_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(value));
      return &parent.back();
    }
    PlainJson& slot = parent[key_];
    slot = std::move(value);
    return &slot;
  }

  bool Push(PlainJson value) {
    if (stack_.size() >= kMaxDepth) return TooDeep();
    const bool is_model =
        stack_.size() == 1 && stack_.back()->is_object() && key_ == "model" && value.is_object();
    stack_.push_back(Add(std::move(value)));
    if (is_model) model_ = stack_.back();
    return true;
  }

  bool TooDeep() {
    error_ = fmt::format("nested deeper than {}", kMaxDepth);
    return false;
  }

  TokenizerJson& out_;
  const bool split_model_;
  std::vector<PlainJson*> stack_;  // open lists and objects of the tree
  const PlainJson* model_ = nullptr;
  std::string key_;
  Part part_ = Part::kTree;
  int part_depth_ = 0;  // open lists and objects of the part
  int pair_texts_ = 0;
  std::string error_;
};

Status Read(std::string_view text, std::string_view name, bool split_model, TokenizerJson& out) {
  Reader reader(out, split_model);
  bool complete = false;
  try {
    complete = PlainJson::sax_parse(text.begin(), text.end(), &reader);
  } catch (const nlohmann::json::exception& e) {
    return Fail(ErrorCode::kInvalidArgument, "reading {}: {}", name, e.what());
  }
  if (!complete) return Fail(ErrorCode::kInvalidArgument, "reading {}: {}", name, reader.Error());
  if (!out.rest.is_object())
    return Fail(ErrorCode::kInvalidArgument, "reading {}: a {} (an object was expected)", name,
                out.rest.type_name());
  return {};
}

}  // namespace

Expected<TokenizerJson> ReadTokenizerJson(std::string_view text) {
  TokenizerJson out;
  EM_RETURN_IF_ERROR(Read(text, "tokenizer.json", true, out));
  return out;
}

Expected<PlainJson> ReadPlainJson(std::string_view text, std::string_view name) {
  if (text.empty()) return PlainJson::object();
  TokenizerJson out;
  EM_RETURN_IF_ERROR(Read(text, name, false, out));
  return std::move(out.rest);
}

const PlainJson* Member(const PlainJson& json, const std::string& key) {
  if (!json.is_object()) return nullptr;
  const auto at = json.find(key);
  return at == json.end() ? nullptr : &*at;
}

std::string TextMember(const PlainJson& json, const std::string& key, std::string otherwise) {
  const PlainJson* at = Member(json, key);
  return at != nullptr && at->is_string() ? at->get<std::string>() : std::move(otherwise);
}

bool FlagMember(const PlainJson& json, const std::string& key, bool otherwise) {
  const PlainJson* at = Member(json, key);
  return at != nullptr && at->is_boolean() ? at->get<bool>() : otherwise;
}

}  // namespace elasticmoe::model
