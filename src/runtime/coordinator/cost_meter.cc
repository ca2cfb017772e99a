#include "runtime/coordinator/cost_meter.h"

#include <algorithm>
#include <fstream>

namespace elasticmoe::runtime {
namespace {

std::optional<std::uint64_t> ReadCounter(const std::filesystem::path& file) {
  std::ifstream stream(file);
  std::uint64_t value = 0;
  if (stream >> value) return value;
  return std::nullopt;
}

}  // namespace

std::optional<EnergyCounters> EnergyCounters::Open(const std::filesystem::path& powercap) {
  EnergyCounters counters;
  std::error_code ignored;
  for (const auto& entry : std::filesystem::directory_iterator(powercap, ignored)) {
    // "intel-rapl:0" is a package; "intel-rapl:0:0" a part of it that is counted there already.
    const std::string name = entry.path().filename().string();
    if (!name.starts_with("intel-rapl:") || std::ranges::count(name, ':') != 1) continue;
    const auto now = ReadCounter(entry.path() / "energy_uj");
    const auto range = ReadCounter(entry.path() / "max_energy_range_uj");
    if (now && range) counters.zones_.push_back({entry.path() / "energy_uj", *range, *now});
  }
  if (counters.zones_.empty()) return std::nullopt;
  return counters;
}

double EnergyCounters::Joules() {
  for (Zone& zone : zones_) {
    const std::uint64_t now = ReadCounter(zone.file).value_or(zone.last);
    const std::uint64_t spent = now >= zone.last ? now - zone.last : zone.range - zone.last + now;
    joules_ += static_cast<double>(spent) * 1e-6;
    zone.last = now;
  }
  return joules_;
}

CostMeter::CostMeter(int threads_per_device, std::optional<EnergyCounters> counters)
    : threads_per_device_(threads_per_device), counters_(std::move(counters)) {}

void CostMeter::AdvanceLocked(TimeNs now) {
  if (last_ >= 0) device_s_ += static_cast<double>(std::max<TimeNs>(now - last_, 0)) * 1e-9 * devices_;
  last_ = std::max(last_, now);
}

void CostMeter::SetDevices(TimeNs now, int devices) {
  const std::scoped_lock lock(mutex_);
  AdvanceLocked(now);
  devices_ = devices;
}

CostStats CostMeter::Read(TimeNs now, double busy_device_s) {
  const std::scoped_lock lock(mutex_);
  AdvanceLocked(now);
  CostStats cost;
  cost.device_s = device_s_;
  cost.busy_device_s = busy_device_s;
  cost.measured = counters_.has_value();
  cost.joules = counters_ ? counters_->Joules()
                          : threads_per_device_ * (kIdleWatts * std::max(device_s_ - busy_device_s, 0.0) +
                                                   kBusyWatts * busy_device_s);
  return cost;
}

}  // namespace elasticmoe::runtime
