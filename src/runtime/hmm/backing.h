// Backing a range with memory piece by piece, by whichever thread first needs a piece: zeroing memory is half
// of the work of loading, and goes on beside reading and packing on every core. Effects: as Populate.
#pragma once

#include <atomic>
#include <cstddef>
#include <vector>

#include "base/error.h"
#include "runtime/vmm.h"

namespace elasticmoe::runtime {

class Backing {
 public:
  // Of [data, data + bytes), which it does not own. REQUIRES: data is a multiple of 2 MiB.
  Backing(std::byte* data, std::size_t bytes, PageKind kind);

  // The pieces that [data, data + bytes) touches have memory afterwards. Where another thread is at one of
  // them, it takes a later one instead of waiting. Thread-safe. Errors as Populate's; then some have memory.
  Status Back(const std::byte* data, std::size_t bytes);

  bool Holds(const std::byte* data) const { return data >= data_ && data < data_ + bytes_; }
  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }

 private:
  enum State : int { kBare, kBusy, kBacked };

  std::size_t Pieces() const { return states_.size(); }
  Status BackPiece(std::size_t piece);  // REQUIRES: this thread made it kBusy
  bool Claim(std::size_t piece);
  std::size_t ClaimAfter(std::size_t piece);  // Pieces() if there is none near

  std::byte* data_;
  std::size_t bytes_;
  PageKind kind_;
  std::vector<std::atomic<int>> states_;
};

}  // namespace elasticmoe::runtime
