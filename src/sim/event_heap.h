// The virtual clock: what happens next, ordered by (time, order of scheduling). Pure.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "base/ids.h"

namespace elasticmoe::sim {

class EventHeap {
 public:
  using Event = std::function<void()>;

  TimeNs now() const { return now_; }
  bool Empty() const { return heap_.empty(); }

  // REQUIRES: delay >= 0.
  void After(TimeNs delay, Event event) {
    heap_.push_back({now_ + delay, sequence_++, std::move(event)});
    std::push_heap(heap_.begin(), heap_.end(), Later);
  }

  // Moves the clock to the next event and runs it. REQUIRES: !Empty().
  void RunNext() {
    std::pop_heap(heap_.begin(), heap_.end(), Later);
    const Entry entry = std::move(heap_.back());
    heap_.pop_back();
    now_ = entry.time;
    entry.event();
  }

 private:
  struct Entry {
    TimeNs time;
    std::uint64_t sequence;
    Event event;
  };
  static bool Later(const Entry& a, const Entry& b) {
    return std::pair(a.time, a.sequence) > std::pair(b.time, b.sequence);
  }

  TimeNs now_ = 0;
  std::uint64_t sequence_ = 0;
  std::vector<Entry> heap_;
};

}  // namespace elasticmoe::sim
