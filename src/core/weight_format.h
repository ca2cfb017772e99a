// How the large matrices of a model are kept in memory and multiplied. Pure.
#pragma once

#include <string_view>

#include "base/error.h"

namespace elasticmoe::core {

// kInt8 and kInt4: groups of 64 inputs of an output share a scale, and activations are quantized to int8 as
// they come. Norms, routers, biases and an embedding that is not the head too are kept as they are in every
// format.
enum class WeightFormat { kBf16, kInt8, kInt4 };

std::string_view NameOf(WeightFormat format);  // "bf16", "int8", "int4"

// kInvalidArgument with the names there are, if `name` is none of them.
Expected<WeightFormat> WeightFormatOf(std::string_view name);

}  // namespace elasticmoe::core
