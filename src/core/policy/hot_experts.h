// When to exchange or copy experts between devices because some are chosen more often than others, without
// changing the number of devices. Pure; not thread-safe.
//
// Devices move layer by layer together, so a layer takes as long as its busiest device. Imbalance is the rows
// of that over the mean, layers weighed by their rows: 1 = even; what is above 1 is waited for.
//
// Rent or buy, as for sizes: the device-seconds that a better placement would have saved add up; once they
// exceed what two resizes cost, it is taken. Part of every gain is the chance of the rows that it was planned
// by and is gone in the next: how much of the last promise was not kept is taken off the next one, ever less
// as time passes.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "base/ids.h"
#include "core/placement/placement.h"

namespace elasticmoe::core {

// `load`: [layers, experts] rows. Copies share an expert's rows evenly. 1 where there is no load or no MoE
// layer.
double Imbalance(const Placement& placement, std::span<const double> load);

struct BalanceOutlook {
  double now = 1;              // imbalance of the present placement under the load lately
  double planned = 1;          // of the one that could be had, with as many devices
  double rows_per_expert = 0;  // that it was counted by, mean
  int moves = 0;               // experts that would change device
  std::uint64_t bytes_copied = 0;
};

class HotExperts {
 public:
  struct Advice {
    bool rebalance = false;
    std::string reason;
    double saved_device_s = 0, cost_device_s = 0;
  };
  // `busy_device_s`: device-seconds in steps since the last call; `expert_share`: of a step's time that
  // experts take, 0..1; `resize_s`: what a resize takes. Call about every two seconds. A change of the
  // placement by others is told by Reset.
  Advice Look(const BalanceOutlook& outlook, int devices, double busy_device_s, double expert_share,
              double resize_s);
  void Reset() { saved_device_s_ = promised_ = 0; }

 private:
  double saved_device_s_ = 0;
  double promised_ = 0;  // imbalance after the last advice; 0: not awaited
  double unkept_ = 0;    // by which promises were missed
};

}  // namespace elasticmoe::core
