// Normal-ish random bf16 weights at memory speed: a table of normal quantiles, indexed by hashed counters.
// Pure; the same (seed, tensor, element) gives the same value.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/spec.h"
#include "model/family.h"

namespace elasticmoe::model {

// Mean and spread that keep activations sane: matrices keep the size of what they multiply, what is added to
// the residual shrinks with the number of layers, norms are about one.
struct WeightLaw {
  double mean = 0.0;
  double deviation = 1.0;
};
WeightLaw LawOf(const TensorName& tensor, const core::ModelSpec& spec);

class RandomWeights {
 public:
  RandomWeights();

  // Begins a tensor whose values follow `law`.
  void Begin(std::uint64_t seed, std::uint64_t tensor_index, WeightLaw law);

  // The next out.size() values of the tensor.
  // REQUIRES: out.size() is a multiple of 4, but for the tensor's last call.
  void Fill(std::span<std::uint16_t> out);

 private:
  static constexpr int kTableBits = 12;  // 4096 distinct values: 8 KiB, stays in the L1 cache
  std::vector<float> quantiles_;         // of N(0, 1), at the middles of 4096 equal parts
  std::vector<std::uint16_t> table_;     // bf16(mean + deviation * quantile)
  std::uint64_t seed_ = 0;
  std::uint64_t counter_ = 0;
};

}  // namespace elasticmoe::model
