#include "model/tokenizer/bpe.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "base/check.h"
#include "base/rng.h"
#include "model/tokenizer/unicode.h"

namespace elasticmoe::model {
namespace {

constexpr std::size_t kShortPiece = 64;  // where scanning for the lowest rank still beats a heap
constexpr std::int32_t kGone = -2;
constexpr TokenId kNoToken = -1;

constexpr std::uint64_t PairOf(TokenId left, TokenId right) {
  return std::uint64_t{static_cast<std::uint32_t>(left)} << 32 | static_cast<std::uint32_t>(right);
}

// Lowest rank first, then leftmost: the order in which tokenizers merges.
constexpr bool Later(const Bpe::Scratch::Candidate& a, const Bpe::Scratch::Candidate& b) {
  return a.rank != b.rank ? a.rank > b.rank : a.at > b.at;
}

}  // namespace

Expected<Bpe> Bpe::FromJson(TokenizerJson& json, bool byte_level) {
  const PlainJson* model = Member(json.rest, "model");
  if (model == nullptr || !model->is_object())
    return Fail(ErrorCode::kInvalidArgument, "model: missing or no object");
  if (const PlainJson* type = Member(*model, "type"); type != nullptr && *type != "BPE")
    return Fail(ErrorCode::kUnimplemented, "model.type={} is not supported (supported: BPE)", type->dump());
  if (!json.malformed.empty()) return Fail(ErrorCode::kInvalidArgument, "model.{}", json.malformed);
  if (!json.has_vocab) return Fail(ErrorCode::kInvalidArgument, "model.vocab: missing");
  if (!json.has_merges) return Fail(ErrorCode::kInvalidArgument, "model.merges: missing");

  Bpe out;
  out.byte_level_ = byte_level;
  TokenId highest = -1;
  for (const auto& [token, id] : json.vocab) highest = std::max(highest, id);
  out.tokens_.resize(static_cast<std::size_t>(highest + 1));
  out.has_.resize(out.tokens_.size());
  out.ids_.reserve(json.vocab.size());
  for (auto& [token, id] : json.vocab) {
    const auto at = static_cast<std::size_t>(id);
    if (out.has_[at])
      return Fail(ErrorCode::kInvalidArgument, "model.vocab: id {} belongs to {} and to {}", id,
                  out.tokens_[at], token);
    out.has_[at] = true;
    out.tokens_[at] = std::move(token);
    out.ids_.insert_or_assign(out.tokens_[at], id);
  }
  json.vocab = {};
  EM_RETURN_IF_ERROR(out.ReadOptions(*model));
  EM_RETURN_IF_ERROR(out.AddMerges(std::move(json.merges)));
  return out;
}

Status Bpe::ReadOptions(const PlainJson& model) {
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const PlainJson* at = Member(model, key);
    if (at != nullptr && at->is_string() && !at->get_ref<const std::string&>().empty())
      return Fail(ErrorCode::kUnimplemented, "model.{}={} is not supported (supported: none)", key,
                  at->dump());
  }
  if (const PlainJson* at = Member(model, "dropout");
      at != nullptr && at->is_number() && at->get<double>() != 0)
    return Fail(ErrorCode::kUnimplemented, "model.dropout={} is not supported (supported: null)", at->dump());
  fuse_unknown_ = FlagMember(model, "fuse_unk");
  ignore_merges_ = FlagMember(model, "ignore_merges");
  if (const PlainJson* at = Member(model, "unk_token"); at != nullptr && at->is_string()) {
    unknown_ = Find(at->get_ref<const std::string&>());
    if (!unknown_)
      return Fail(ErrorCode::kInvalidArgument, "model.unk_token={}: not in model.vocab", at->dump());
  }
  if (FlagMember(model, "byte_fallback")) {
    fallback_.emplace();
    for (unsigned b = 0; b < 256; ++b)
      (*fallback_)[b] = Find(fmt::format("<0x{:02X}>", b)).value_or(kNoToken);
  }
  for (std::size_t b = 0; b < 256; ++b) {
    const std::string character = byte_level_ ? ByteAlphabet()[b] : std::string(1, static_cast<char>(b));
    byte_ids_[b] = byte_level_ || b < 128 ? Find(character).value_or(kNoToken) : kNoToken;
  }
  if (ignore_merges_ && byte_level_) {
    pieces_.reserve(ids_.size());
    for (const auto& [token, id] : ids_)
      if (auto bytes = FromByteAlphabet(token)) pieces_.emplace(*std::move(bytes), id);
  }
  return {};
}

Status Bpe::AddMerges(std::vector<std::pair<std::string, std::string>> merges) {
  std::size_t slots = 16;
  int bits = 4;
  for (; slots < 2 * merges.size(); slots *= 2) ++bits;
  merges_.resize(slots);
  merges_shift_ = 64 - bits;
  if (!byte_level_) joints_.resize(16 * slots);
  std::string joined;
  for (std::size_t rank = 0; rank < merges.size(); ++rank) {
    const auto& [left, right] = merges[rank];
    joined.assign(left).append(right);
    TokenId id[3];
    const std::string_view texts[3] = {left, right, joined};
    for (int i = 0; i < 3; ++i) {
      const auto found = Find(texts[i]);
      if (!found)
        return Fail(ErrorCode::kInvalidArgument,
                    "model.merges: entry {} needs {}, which is not in model.vocab", rank, texts[i]);
      id[i] = *found;
    }
    const std::uint64_t pair = PairOf(id[0], id[1]);
    // A pair that comes again gets the later rank.
    merges_[SlotOf(pair)] = {pair, static_cast<std::uint32_t>(rank), id[2]};
    if (joints_.empty() || left.empty() || right.empty()) continue;
    // Both sides may be symbols that a text begins with (bytes, the unknown token), or end and start in
    // characters.
    std::size_t last = left.size() - 1;
    while (last > 0 && (static_cast<unsigned char>(left[last]) & 0xC0) == 0x80) --last;
    const TokenId left_ids[] = {id[0], Find(left.substr(last)).value_or(id[0])};
    const TokenId right_ids[] = {id[1], Find(right.substr(0, CharBytes(right, 0))).value_or(id[1])};
    for (const TokenId l : left_ids)
      for (const TokenId r : right_ids) AddJoint(l, r);
  }
  return {};
}

void Bpe::AddJoint(TokenId left, TokenId right) {
  joints_[Mix64(PairOf(left, right)) & (joints_.size() - 1)] = true;
}

bool Bpe::MayJoin(TokenId left, TokenId right) const {
  return joints_.empty() || joints_[Mix64(PairOf(left, right)) & (joints_.size() - 1)];
}

std::size_t Bpe::SlotOf(std::uint64_t pair) const {
  const std::size_t mask = merges_.size() - 1;
  // Fibonacci hashing: the high bits of the product depend on all bits of the pair.
  std::size_t slot = static_cast<std::size_t>((pair ^ pair >> 29) * 0x9E3779B97F4A7C15ULL >> merges_shift_);
  while (merges_[slot].pair != pair && merges_[slot].pair != kNoPair) slot = (slot + 1) & mask;
  return slot;
}

const Bpe::Merge* Bpe::FindMerge(TokenId left, TokenId right) const {
  const Merge& merge = merges_[SlotOf(PairOf(left, right))];
  return merge.pair == kNoPair ? nullptr : &merge;
}

std::optional<TokenId> Bpe::Find(std::string_view token) const {
  const auto at = ids_.find(token);
  return at == ids_.end() ? std::nullopt : std::optional(at->second);
}

bool Bpe::Has(TokenId id) const {
  return id >= 0 && id < Size() && has_[static_cast<std::size_t>(id)];
}

std::string_view Bpe::Token(TokenId id) const {
  return Has(id) ? std::string_view(tokens_[static_cast<std::size_t>(id)]) : std::string_view();
}

// One symbol a character, with bytes or the unknown token for those that the vocabulary has not.
void Bpe::Split(std::string_view piece, std::vector<TokenId>& ids) const {
  std::optional<TokenId> unknown;  // not yet appended, since the next may be fused with it
  for (std::size_t i = 0; i < piece.size();) {
    const auto byte = static_cast<unsigned char>(piece[i]);
    const std::size_t bytes = byte_level_ ? 1 : CharBytes(piece, i);
    TokenId id = byte_ids_[byte];
    if (bytes > 1) id = Find(piece.substr(i, bytes)).value_or(kNoToken);
    const std::string_view character =
        byte_level_ ? std::string_view(ByteAlphabet()[byte]) : piece.substr(i, bytes);
    i += bytes;
    if (id != kNoToken) {
      if (unknown) ids.push_back(*std::exchange(unknown, std::nullopt));
      ids.push_back(id);
      continue;
    }
    if (fallback_) {
      const auto of = [&](char c) { return (*fallback_)[static_cast<unsigned char>(c)]; };
      if (std::ranges::all_of(character, [&](char c) { return of(c) != kNoToken; })) {
        for (const char c : character) ids.push_back(of(c));
        continue;
      }
    }
    if (!unknown_) continue;  // nothing stands for it: it is left out, as in tokenizers
    if (unknown && !fuse_unknown_) ids.push_back(*unknown);
    unknown = unknown_;
  }
  if (unknown) ids.push_back(*unknown);
}

void Bpe::Encode(std::string_view piece, Scratch& scratch, std::vector<TokenId>& out) const {
  if (ignore_merges_) {
    if (byte_level_) {
      if (const auto at = pieces_.find(std::string(piece)); at != pieces_.end()) {
        out.push_back(at->second);
        return;
      }
    } else if (const auto id = Find(piece)) {
      out.push_back(*id);
      return;
    }
  }
  auto& all = scratch.characters;
  all.clear();
  Split(piece, all);
  EM_CHECK(all.size() < std::numeric_limits<std::int32_t>::max());
  for (std::size_t begin = 0, end = 0; begin < all.size(); begin = end) {
    for (end = begin + 1; end < all.size() && MayJoin(all[end - 1], all[end]);) ++end;
    scratch.ids.assign(all.begin() + static_cast<std::ptrdiff_t>(begin),
                       all.begin() + static_cast<std::ptrdiff_t>(end));
    if (scratch.ids.size() <= kShortPiece)
      MergeShort(scratch);
    else
      MergeLong(scratch);
    out.insert(out.end(), scratch.ids.begin(), scratch.ids.end());
  }
}

void Bpe::MergeShort(Scratch& scratch) const {
  auto& ids = scratch.ids;
  std::size_t n = ids.size();
  if (n < 2) return;
  // ranks[i], results[i]: of the merge of ids[i] and ids[i + 1].
  auto& ranks = scratch.ranks;
  auto& results = scratch.results;
  ranks.resize(n);
  results.resize(n);
  const auto look = [&](std::size_t i) {
    const Merge* merge = FindMerge(ids[i], ids[i + 1]);
    ranks[i] = merge ? merge->rank : kNoRank;
    if (merge) results[i] = merge->result;
  };
  for (std::size_t i = 0; i + 1 < n; ++i) look(i);
  while (n > 1) {
    std::size_t best = 0;
    for (std::size_t i = 1; i + 1 < n; ++i)
      if (ranks[i] < ranks[best]) best = i;
    if (ranks[best] == kNoRank) break;
    ids[best] = results[best];
    for (std::size_t i = best + 1; i + 1 < n; ++i) {
      ids[i] = ids[i + 1];
      ranks[i] = ranks[i + 1];
      results[i] = results[i + 1];
    }
    --n;
    if (best + 1 < n) look(best);
    if (best > 0) look(best - 1);
  }
  ids.resize(n);
}

void Bpe::MergeLong(Scratch& scratch) const {
  auto& symbols = scratch.symbols;
  auto& heap = scratch.heap;
  const auto n = static_cast<std::int32_t>(scratch.ids.size());
  symbols.resize(static_cast<std::size_t>(n));
  heap.clear();
  const auto symbol = [&](std::int32_t i) -> Scratch::Symbol& {
    return symbols[static_cast<std::size_t>(i)];
  };
  const auto look = [&](std::int32_t left) {
    const Merge* merge = FindMerge(symbol(left).id, symbol(symbol(left).after).id);
    if (merge == nullptr) return false;
    heap.push_back({merge->rank, left, merge->result});
    return true;
  };
  for (std::int32_t i = 0; i < n; ++i)
    symbol(i) = {scratch.ids[static_cast<std::size_t>(i)], i - 1, i + 1 < n ? i + 1 : -1};
  for (std::int32_t i = 0; i + 1 < n; ++i) look(i);
  std::make_heap(heap.begin(), heap.end(), Later);
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), Later);
    const Scratch::Candidate top = heap.back();
    heap.pop_back();
    Scratch::Symbol& left = symbol(top.at);
    if (left.after == kGone || left.after == -1) continue;
    // The two may have changed since: then this is no longer their merge.
    Scratch::Symbol& right = symbol(left.after);
    const Merge* merge = FindMerge(left.id, right.id);
    if (merge == nullptr || merge->result != top.result) continue;
    left.id = top.result;
    left.after = std::exchange(right.after, kGone);
    if (left.after >= 0) {
      symbol(left.after).before = top.at;
      if (look(top.at)) std::push_heap(heap.begin(), heap.end(), Later);
    }
    if (left.before >= 0 && look(left.before)) std::push_heap(heap.begin(), heap.end(), Later);
  }
  scratch.ids.clear();
  for (std::int32_t i = 0; i >= 0; i = symbol(i).after) scratch.ids.push_back(symbol(i).id);
}

}  // namespace elasticmoe::model
