// A GGUF file from anybody: its header, and the config, tensors and tokenizer that are read out of it.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "base/check.h"
#include "model/gguf/gguf.h"
#include "model/gguf/model.h"
#include "model/gguf/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace elasticmoe;
  using namespace elasticmoe::model;
  if (size == 0) return 0;
  const std::string_view bytes(reinterpret_cast<const char*>(data) + 1, size - 1);
  // First byte: how many bytes of data the file has behind these.
  const std::uint64_t file_bytes = bytes.size() + (std::uint64_t{1} << (data[0] % 48));
  auto gguf = ParseGguf(bytes, file_bytes);
  if (!gguf) return 0;
  gguf->files = {"fuzz.gguf"};
  gguf->file_bytes = {file_bytes};
  for (const GgufTensor& tensor : gguf->tensors)
    EM_CHECK(tensor.offset <= file_bytes && tensor.bytes <= file_bytes - tensor.offset, "{}", tensor.name);
  (void)ReadGgufTokenizer(*gguf);
  (void)GgufGenerationConfig(*gguf);
  const auto config = GgufConfig(*gguf);
  const auto family = config ? FamilyOf(*config) : tl::unexpected<Error>(config.error());
  const auto spec = family ? (*family)->Spec(*config) : tl::unexpected<Error>(family.error());
  if (!spec || spec->LayerCount() * (spec->moe.experts + 1) > 1000) return 0;  // else slow, not wrong
  const auto index = GgufIndex(*gguf, *spec, (*family)->Tensors(*spec));
  if (!index) return 0;
  for (const StoredTensor& tensor : index->tensors)
    EM_CHECK(!tensor.known ||
                 (tensor.data.offset <= file_bytes && tensor.data.bytes <= file_bytes - tensor.data.offset),
             "{}", tensor.name);
  return 0;
}
