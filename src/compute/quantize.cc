#include "compute/quantize.h"

#include "compute/kernels.h"

namespace elasticmoe::compute {

void QuantizeGroup(const float* values, WeightFormat format, int lane, std::byte* group) {
  static const auto pack = AvailableKernels().front()->quantized.pack;
  pack(values, format, lane, group);
}

}  // namespace elasticmoe::compute
