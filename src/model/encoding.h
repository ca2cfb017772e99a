// How checkpoints write numbers: the dtypes of safetensors and the block quantisations of GGUF
// (ggml's documentation of its quantisation formats), and their decoding to float32. Pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

#include "model/dtype.h"

namespace elasticmoe::model {

enum class Encoding {
  kBf16,
  kF16,
  kF32,
  kF8E4M3,  // scales lie apart, one a block of the matrix
  kF4E2M1,  // two values a byte, the first in its low half; scales (kE8M0) lie apart
  kE8M0,    // powers of two; only scales are written so
  kU4,      // whole numbers, two a byte, the first in its low half; scales and zeros lie apart
  kU8,      // whole numbers, likewise
  kI8,
  // Blocks that hold their scales. Those of 32 values:
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kIq4Nl,
  kMxfp4,
  // ... and of 256:
  kQ2K,
  kQ3K,
  kQ4K,
  kQ5K,
  kQ6K,
  kIq4Xs,
};

// As people write it: "bf16", "q4_k".
std::string_view NameOf(Encoding encoding);

// The unit in which values are written: a row of a matrix is a whole number of them.
int BlockValues(Encoding encoding);
int BlockBytes(Encoding encoding);

// REQUIRES: values is a multiple of BlockValues.
constexpr std::uint64_t EncodedBytes(std::uint64_t values, int block_values, int block_bytes) {
  return values / block_values * block_bytes;
}
inline std::uint64_t EncodedBytes(Encoding encoding, std::uint64_t values) {
  return EncodedBytes(values, BlockValues(encoding), BlockBytes(encoding));
}

// The number type of an encoding that is one; nullopt for what has to be decoded.
std::optional<DType> PlainType(Encoding encoding);

// `values` numbers from `data` (any alignment) to `out`. Scales that lie apart are not applied.
// REQUIRES: values is a multiple of BlockValues.
void Decode(Encoding encoding, const std::byte* data, std::size_t values, float* out);

}  // namespace elasticmoe::model
