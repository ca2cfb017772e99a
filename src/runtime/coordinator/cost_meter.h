// What serving costs: device-seconds from when a device is asked for until it is gone, and joules. These are
// the machine's counters where it has them (RAPL: all of its packages, whoever uses them), else a stated
// model: a core of a device draws kIdleWatts while it waits and kBusyWatts while it runs a step. Thread-safe.
//
// RAPL's files: https://docs.kernel.org/power/powercap/powercap.html
#pragma once

#include <cstdint>
#include <filesystem>
#include <mutex>
#include <optional>
#include <vector>

#include "base/ids.h"
#include "runtime/engine.h"

namespace elasticmoe::runtime {

// A core of a two-socket server, cooling and memory left out: what the simulator's profile `cpu-core` states.
inline constexpr double kIdleWatts = 2, kBusyWatts = 8;

// Joules of all packages since it was made. Counters wrap: to be read at least every few minutes.
class EnergyCounters {
 public:
  // None where the machine has no counters, or keeps them from us.
  static std::optional<EnergyCounters> Open(const std::filesystem::path& powercap = "/sys/class/powercap");
  double Joules();

 private:
  struct Zone {
    std::filesystem::path file;
    std::uint64_t range = 0;  // microjoules after which it begins anew
    std::uint64_t last = 0;
  };
  std::vector<Zone> zones_;
  double joules_ = 0;
};

class CostMeter {
 public:
  CostMeter(int threads_per_device, std::optional<EnergyCounters> counters);
  // So many devices are paid for from now on.
  void SetDevices(TimeNs now, int devices);
  // Until now. `requests` and `output_tokens` are the caller's.
  CostStats Read(TimeNs now, double busy_device_s);

 private:
  void AdvanceLocked(TimeNs now);
  std::mutex mutex_;
  int threads_per_device_;
  std::optional<EnergyCounters> counters_;
  TimeNs last_ = -1;
  int devices_ = 0;
  double device_s_ = 0;
};

}  // namespace elasticmoe::runtime
