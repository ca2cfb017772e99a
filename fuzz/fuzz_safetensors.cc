// The header of a safetensors file and the index of a sharded checkpoint. First byte: which of them, and how
// many bytes of data the file claims to hold.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "base/check.h"
#include "model/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace elasticmoe::model;
  if (size == 0) return 0;
  const std::string_view text(reinterpret_cast<const char*>(data) + 1, size - 1);
  if (data[0] % 2 == 1) {
    const auto entries = ParseWeightMap(text);
    if (!entries) return 0;
    for (const auto& [tensor, shard] : *entries)
      EM_CHECK(!shard.empty() && shard.find('/') == shard.npos, "{}", shard);
    return 0;
  }
  const std::uint64_t data_bytes = std::uint64_t{1} << (data[0] / 4);
  const auto tensors = ParseSafetensorsHeader(text, data_bytes);
  if (!tensors) return 0;
  for (const SafetensorsTensor& tensor : *tensors) {
    EM_CHECK(tensor.begin <= tensor.end, "{}", tensor.name);
    EM_CHECK(tensor.end <= data_bytes, "{}", tensor.name);
  }
  return 0;
}
