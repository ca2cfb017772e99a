// Collects the units of one thread's attention and hands them to the kernel several at a time, so that it can
// fetch for the next while it computes the present one. Not thread-safe; handed over at the end of its life.
#pragma once

#include <array>
#include <cstdint>

#include "compute/kernels.h"

namespace elasticmoe::compute {

class AttendBatch {
 public:
  // References must outlive the object.
  AttendBatch(const Kernels& kernels, const KvCache& kv, int layer, float scale)
      : kernels_(kernels), kv_(kv), layer_(layer), scale_(scale) {}
  ~AttendBatch() { HandOver(); }
  AttendBatch(const AttendBatch&) = delete;
  AttendBatch& operator=(const AttendBatch&) = delete;

  // The queries that follow are of this sequence and KV head.
  void Begin(const std::uint32_t* block_table, int kv_head) {
    if (count_ == kUnits) HandOver();
    units_[count_] = {block_table, kv_head, queries_[count_].data(), 0};
    ++count_;
  }
  // REQUIRES: Begin was called.
  void Add(const Query& query) {
    const AttendUnit last = units_[count_ - 1];
    if (last.count == kUnitQueries) Begin(last.block_table, last.kv_head);
    AttendUnit& unit = units_[count_ - 1];
    queries_[count_ - 1][unit.count++] = query;
  }

 private:
  static constexpr int kUnits = 16;  // 10 KiB of queries

  void HandOver() {
    if (count_ > 0) kernels_.attend(kv_, layer_, units_.data(), count_, scale_);
    count_ = 0;
  }

  const Kernels& kernels_;
  const KvCache& kv_;
  const int layer_;
  const float scale_;
  int count_ = 0;
  std::array<AttendUnit, kUnits> units_;
  std::array<std::array<Query, kUnitQueries>, kUnits> queries_;
};

}  // namespace elasticmoe::compute
