// What happened in a simulated world, line by line: hashed always, kept where somebody wants to read it.
// Pure.
#pragma once

#include <fmt/format.h>

#include <iterator>
#include <string>
#include <vector>

#include "base/hash.h"
#include "base/ids.h"

namespace elasticmoe::sim {

class Trace {
 public:
  explicit Trace(bool keep) : keep_(keep) {}

  template <class... Args>
  void Line(TimeNs now, fmt::format_string<Args...> format, Args&&... args) {
    buffer_.clear();
    fmt::format_to(std::back_inserter(buffer_), "{:10.3f} ms  ", static_cast<double>(now) / 1e6);
    fmt::format_to(std::back_inserter(buffer_), format, std::forward<Args>(args)...);
    hash_ = HashCombine(hash_, HashBytes({buffer_.data(), buffer_.size()}));
    if (keep_) lines_.emplace_back(buffer_.data(), buffer_.size());
  }

  std::uint64_t hash() const { return hash_; }
  const std::vector<std::string>& lines() const { return lines_; }

 private:
  bool keep_;
  fmt::memory_buffer buffer_;
  std::uint64_t hash_ = 0;
  std::vector<std::string> lines_;
};

}  // namespace elasticmoe::sim
