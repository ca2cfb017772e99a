#include "model/random_weights.h"

#include <bit>
#include <cmath>

#include "base/rng.h"

namespace elasticmoe::model {
namespace {

// x with P(N(0, 1) < x) = p, by bisection: exact enough for a table that is built once.
double NormalQuantile(double p) {
  double low = -8.0, high = 8.0;
  for (int i = 0; i < 50; ++i) {
    const double middle = (low + high) / 2;
    (0.5 * std::erfc(-middle / std::sqrt(2.0)) < p ? low : high) = middle;
  }
  return (low + high) / 2;
}

std::uint16_t RoundToBf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >>
                                    16);  // nearest even; values are finite
}

}  // namespace

WeightLaw LawOf(const TensorName& tensor, const core::ModelSpec& spec) {
  switch (tensor.role) {
    case TensorRole::kFinalNorm:
    case TensorRole::kAttentionNorm:
    case TensorRole::kMlpNorm:
    case TensorRole::kQNorm:
    case TensorRole::kKNorm:
    case TensorRole::kQDownNorm:
    case TensorRole::kKvDownNorm:
      return {1.0, 0.05};
    case TensorRole::kQBias:
    case TensorRole::kKBias:
    case TensorRole::kVBias:
    case TensorRole::kOBias:
    case TensorRole::kSinks:
    case TensorRole::kRouterBias:
    case TensorRole::kRouterCorrection:
    case TensorRole::kSharedGateBias:
    case TensorRole::kSharedUpBias:
    case TensorRole::kSharedDownBias:
    case TensorRole::kDenseGateBias:
    case TensorRole::kDenseUpBias:
    case TensorRole::kDenseDownBias:
    case TensorRole::kExpertGateBias:
    case TensorRole::kExpertUpBias:
    case TensorRole::kExpertDownBias:
      return {0.0, 0.02};
    default:
      break;
  }
  const double unit = 1.0 / std::sqrt(static_cast<double>(tensor.shape.back()));  // shape [outputs, inputs]
  const bool residual = tensor.role == TensorRole::kO || tensor.role == TensorRole::kDenseDown ||
                        tensor.role == TensorRole::kSharedDown || tensor.role == TensorRole::kExpertDown;
  return {0.0, residual ? unit / std::sqrt(2.0 * spec.LayerCount()) : unit};
}

RandomWeights::RandomWeights() : quantiles_(1 << kTableBits), table_(1 << kTableBits) {
  for (std::size_t i = 0; i < quantiles_.size(); ++i)
    quantiles_[i] = static_cast<float>(NormalQuantile((i + 0.5) / quantiles_.size()));
}

void RandomWeights::Begin(std::uint64_t seed, std::uint64_t tensor_index, WeightLaw law) {
  for (std::size_t i = 0; i < table_.size(); ++i)
    table_[i] = RoundToBf16(static_cast<float>(law.mean + law.deviation * quantiles_[i]));
  seed_ = RandomAt(seed, tensor_index);
  counter_ = 0;
}

void RandomWeights::Fill(std::span<std::uint16_t> out) {
  const std::uint64_t seed = seed_;
  const std::uint16_t* table = table_.data();
  std::size_t i = 0;
  for (; i + 4 <= out.size(); i += 4) {
    const std::uint64_t bits = RandomAt(seed, counter_++);
    for (int j = 0; j < 4; ++j) out[i + j] = table[bits >> (16 * j + 4) & ((1 << kTableBits) - 1)];
  }
  if (i == out.size()) return;
  const std::uint64_t bits = RandomAt(seed, counter_++);
  for (int j = 0; i < out.size(); ++i, ++j) out[i] = table[bits >> (16 * j + 4) & ((1 << kTableBits) - 1)];
}

}  // namespace elasticmoe::model
