#include "core/policy/step_cost.h"

#include <algorithm>
#include <cmath>

namespace elasticmoe::core {
namespace {

std::array<double, 7> Terms(const StepShape& shape) {
  return {1.0,
          shape.rows,
          shape.expert_rows,
          shape.experts,
          shape.kv_bytes,
          shape.tokens,
          static_cast<double>(shape.devices - 1)};
}
std::array<double, 7> Coefficients(const StepCost& cost) {
  return {cost.fixed_s,   cost.row_s,   cost.expert_row_s, cost.expert_s,
          cost.kv_byte_s, cost.token_s, cost.peer_s};
}

}  // namespace

double StepCost::Seconds(const StepShape& shape) const {
  const auto terms = Terms(shape);
  const auto coefficients = Coefficients(*this);
  double sum = 0;
  for (std::size_t i = 0; i < terms.size(); ++i) sum += terms[i] * coefficients[i];
  return sum;
}

StepCostLearner::StepCostLearner(const StepCost& prior) : prior_(prior), cost_(prior) {
  // A prior of zero leaves its term a tiny scale: measurements alone decide it.
  const auto coefficients = Coefficients(prior);
  for (int i = 0; i < kTerms; ++i) scale_[i] = std::max(coefficients[i], 1e-15);
}

void StepCostLearner::Observe(const StepShape& shape, double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) return;
  // A model's cost drifts with its machine, not with a request.
  constexpr double kKeep = 0.999;
  auto terms = Terms(shape);
  for (int i = 0; i < kTerms; ++i) terms[i] *= scale_[i];
  // Relative errors are what a forecast needs, so a step weighs by its inverse time.
  const double weight = 1.0 / std::max(seconds * seconds, 1e-18);
  Sums& sums = by_devices_[shape.devices];
  for (int i = 0; i < kTerms; ++i) {
    sums.right[i] = kKeep * sums.right[i] + weight * terms[i] * seconds;
    for (int j = 0; j < kTerms; ++j)
      sums.normal[i][j] = kKeep * sums.normal[i][j] + weight * terms[i] * terms[j];
  }
  sums.steps = kKeep * sums.steps + 1;
  ++observed_;
  // Solving costs microseconds; the first steps change much, later ones little.
  if (observed_ < 64 || observed_ % 16 == 0) Solve();
}

void StepCostLearner::Solve() {
  Sums all;
  for (const auto& [devices, one] : by_devices_) {
    all.steps += one.steps;
    for (int i = 0; i < kTerms; ++i) {
      all.right[i] += one.right[i];
      for (int j = 0; j < kTerms; ++j) all.normal[i][j] += one.normal[i][j];
    }
  }
  const auto prior = Coefficients(prior_);
  std::array<double, kTerms> x{}, target{};
  for (int i = 0; i < kTerms; ++i) x[i] = target[i] = prior[i] / scale_[i];
  std::array<double, kTerms> ridge{};
  // The prior of a term weighs as kPriorSteps steps of its own mean square: in proportion, it never outweighs
  // the many.
  for (int i = 0; i < kTerms; ++i) ridge[i] = kPriorSteps * all.normal[i][i] / all.steps / all.steps;
  for (int round = 0; round < 200; ++round) {
    for (int i = 0; i < kTerms; ++i) {
      double rest = all.right[i] + ridge[i] * target[i];
      for (int j = 0; j < kTerms; ++j)
        if (j != i) rest -= all.normal[i][j] * x[j];
      const double diagonal = all.normal[i][i] + ridge[i];
      if (diagonal > 0) x[i] = std::max(0.0, rest / diagonal);
    }
  }
  for (int i = 0; i < kTerms; ++i) x[i] *= scale_[i];
  cost_ = {x[0], x[1], x[2], x[3], x[4], x[5], x[6]};
}

double ExpertsTouched(int experts, int top_k, int devices, double rows) {
  if (experts <= 0 || devices <= 0) return 0;
  const double missed = std::pow(1.0 - std::min(1.0, static_cast<double>(top_k) / experts), rows);
  return static_cast<double>(experts) / devices * (1.0 - missed);
}

}  // namespace elasticmoe::core
