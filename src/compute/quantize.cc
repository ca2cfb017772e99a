#include "compute/quantize.h"

#include "compute/kernels.h"

namespace elasticmoe::compute {

void QuantizeGroups(const float* values, WeightFormat format, int first_lane, std::byte* group) {
  static const auto pack = AvailableKernels().front()->quantized.pack;
  pack(values, format, first_lane, group);
}

}  // namespace elasticmoe::compute
