// Element types of checkpoint tensors. Pure.
#pragma once

#include <cstddef>

namespace elasticmoe::model {

enum class DType { kBf16, kF16, kF32 };
constexpr std::size_t BytesOf(DType type) {
  return type == DType::kF32 ? 4 : 2;
}

}  // namespace elasticmoe::model
