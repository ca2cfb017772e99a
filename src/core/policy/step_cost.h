// What a step costs at a size, learned while serving. Pure; not thread-safe.
//
//   seconds = fixed + row * rows + expert_row * expert_rows + expert * experts + kv * kv_bytes
//             + token * tokens + peer * (devices - 1)
//
// Rows, experts and KV are those of one device (the busiest: ranks move layer by layer together), so one set
// of coefficients holds for all sizes and a size that never ran can be forecast. A sequence's rows are its
// own device's alone but for their experts, which all devices compute: a long prompt alone is faster on two
// devices, though not twice. Tokens are those of all devices: one coordinator sends them, and where it shares
// the cores of the workers, they wait for it; a prompt's rows, but for the last, give none. `peer` is what a
// device more costs each step (barrier, dispatch). The last two are why widening can lower the throughput.
#pragma once

#include <array>
#include <map>

namespace elasticmoe::core {

struct StepShape {
  int devices = 1;
  double rows = 0;         // of one device, decode and prefill
  double expert_rows = 0;  // of all devices, over their number
  double experts = 0;      // (layer, expert) pairs whose weights one device reads
  double kv_bytes = 0;     // that one device reads
  double tokens = 0;       // that the step gives, of all devices
};

struct StepCost {
  double fixed_s = 0;
  double row_s = 0;
  double expert_row_s = 0;
  double expert_s = 0;
  double kv_byte_s = 0;
  double token_s = 0;
  double peer_s = 0;

  double Seconds(const StepShape& shape) const;
};

// Recursive least squares with non-negative coefficients. `prior` holds until measurements say otherwise: it
// counts as `kPriorSteps` steps, so the first hundred steps already speak louder, yet sizes that were never
// seen keep it. Steps fade over a thousand of their own size: what one device takes is not forgotten while
// two serve, and the steps of one size alone cannot tell its terms apart.
class StepCostLearner {
 public:
  explicit StepCostLearner(const StepCost& prior);
  // A step of `shape` took `seconds`; those not finite or negative are ignored.
  void Observe(const StepShape& shape, double seconds);
  const StepCost& cost() const { return cost_; }
  long long observed() const { return observed_; }

 private:
  static constexpr int kTerms = 7;
  static constexpr double kPriorSteps = 8;
  struct Sums {
    std::array<std::array<double, kTerms>, kTerms> normal{};
    std::array<double, kTerms> right{};
    double steps = 0;  // faded as they are
  };
  void Solve();

  StepCost prior_;
  StepCost cost_;
  std::array<double, kTerms> scale_{};  // terms in units in which each prior coefficient is about one step
  std::map<int, Sums> by_devices_;
  long long observed_ = 0;
};

// Experts a device reads in a layer: of `experts` spread over `devices`, those that at least one of `rows`
// rows of the whole step chose (top_k each, taken as uniform): E/N * (1 - (1 - k/E)^rows).
double ExpertsTouched(int experts, int top_k, int devices, double rows);

}  // namespace elasticmoe::core
