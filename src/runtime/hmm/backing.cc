#include "runtime/hmm/backing.h"

#include <algorithm>

#include "base/check.h"

namespace elasticmoe::runtime {
namespace {

constexpr std::size_t kPiece = kHugePage;
// How far ahead of what it needs a thread looks for something to do.
constexpr std::size_t kAhead = 64;

}  // namespace

Backing::Backing(std::byte* data, std::size_t bytes, PageKind kind)
    : data_(data), bytes_(bytes), kind_(kind), states_((bytes + kPiece - 1) / kPiece) {
  EM_CHECK(reinterpret_cast<std::uintptr_t>(data) % kHugePage == 0);
}

bool Backing::Claim(std::size_t piece) {
  int bare = kBare;
  return states_[piece].compare_exchange_strong(bare, kBusy, std::memory_order_acquire);
}

std::size_t Backing::ClaimAfter(std::size_t piece) {
  const std::size_t end = std::min(Pieces(), piece + 1 + kAhead);
  for (++piece; piece < end; ++piece)
    if (states_[piece].load(std::memory_order_relaxed) == kBare && Claim(piece)) return piece;
  return Pieces();
}

Status Backing::BackPiece(std::size_t piece) {
  const std::size_t begin = piece * kPiece;
  Status status = Populate(data_ + begin, std::min(kPiece, bytes_ - begin), kind_);
  states_[piece].store(status ? kBacked : kBare, std::memory_order_release);
  states_[piece].notify_all();
  return status;
}

Status Backing::Back(const std::byte* data, std::size_t bytes) {
  if (bytes == 0) return {};
  EM_CHECK(Holds(data) && Holds(data + bytes - 1));
  const std::size_t last = static_cast<std::size_t>(data + bytes - 1 - data_) / kPiece;
  for (std::size_t piece = static_cast<std::size_t>(data - data_) / kPiece; piece <= last; ++piece) {
    while (states_[piece].load(std::memory_order_acquire) != kBacked) {
      if (Claim(piece)) {
        EM_RETURN_IF_ERROR(BackPiece(piece));
      } else if (const std::size_t later = ClaimAfter(piece); later < Pieces()) {
        EM_RETURN_IF_ERROR(BackPiece(later));
      } else {
        states_[piece].wait(kBusy, std::memory_order_acquire);
      }
    }
  }
  return {};
}

}  // namespace elasticmoe::runtime
