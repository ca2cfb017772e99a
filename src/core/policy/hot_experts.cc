#include "core/policy/hot_experts.h"

#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "base/check.h"

namespace elasticmoe::core {
namespace {

// By chance alone, counts of a mean of n rows differ by 1/sqrt(n): a tenth of that is left at a hundred.
constexpr double kLeastRows = 100;
constexpr double kLeastGain = 0.02;   // of the experts' time
constexpr double kRemembered = 0.99;  // a look: half of it is gone after two minutes

}  // namespace

double Imbalance(const Placement& placement, std::span<const double> load) {
  EM_CHECK(load.empty() || load.size() == static_cast<std::size_t>(placement.layers()) * placement.experts(),
           "loads={} layers={} experts={}", load.size(), placement.layers(), placement.experts());
  if (load.empty() || placement.members().empty()) return 1;
  double most = 0, mean = 0;
  std::vector<double> rows(placement.members().size());
  for (int layer = 0; layer < placement.layers(); ++layer) {
    std::fill(rows.begin(), rows.end(), 0.0);
    for (int expert = 0; expert < placement.experts(); ++expert) {
      const auto owners = placement.Owners(layer, expert);
      const double share = load[static_cast<std::size_t>(layer) * placement.experts() + expert] /
                           std::max<double>(1, static_cast<double>(owners.size()));
      for (const DeviceId owner : owners) rows[placement.RankOf(owner)] += share;
    }
    most += *std::max_element(rows.begin(), rows.end());
    for (const double one : rows) mean += one / static_cast<double>(rows.size());
  }
  return mean > 0 ? most / mean : 1;
}

HotExperts::Advice HotExperts::Look(const BalanceOutlook& outlook, int devices, double busy_device_s,
                                    double expert_share, double resize_s) {
  Advice advice;
  advice.cost_device_s = 2 * resize_s * devices;
  if (promised_ > 0 && outlook.rows_per_expert >= kLeastRows) {
    unkept_ = std::max(unkept_, outlook.now - promised_);
    promised_ = 0;
  }
  unkept_ *= kRemembered;
  const double gain = outlook.now > 0 ? 1 - (outlook.planned + unkept_) / outlook.now : 0;
  if (devices < 2 || outlook.moves == 0 || outlook.rows_per_expert < kLeastRows || gain < kLeastGain)
    return advice;
  saved_device_s_ += busy_device_s * expert_share * gain;
  advice.saved_device_s = saved_device_s_;
  advice.rebalance = saved_device_s_ >= advice.cost_device_s;
  advice.reason = fmt::format(
      "the busiest device has {:.2f} times the mean rows, {:.2f} after {} moves ({} bytes copied); {:.2f} "
      "device-seconds lost exceed the {:.2f} of two resizes",
      outlook.now, outlook.planned, outlook.moves, outlook.bytes_copied, saved_device_s_,
      advice.cost_device_s);
  if (advice.rebalance) saved_device_s_ = 0, promised_ = outlook.planned;
  return advice;
}

}  // namespace elasticmoe::core
