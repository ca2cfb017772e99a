// The clock of everything that runs for real. What decides (core/) takes its time as an argument and must not
// include this: there, the driver's clock counts, which a simulation sets as it likes.
#pragma once

#include <chrono>

#include "base/ids.h"

namespace elasticmoe {

// Monotonic, of this machine: processes may compare it with each other, boots may not. Thread-safe.
inline TimeNs Now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace elasticmoe
