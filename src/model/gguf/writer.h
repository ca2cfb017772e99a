// Writes GGUF files, version 3: metadata and descriptions first, then the tensors in the same order.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "base/error.h"
#include "model/encoding.h"

namespace elasticmoe::model {

class GgufWriter {
 public:
  using Value = std::variant<std::uint32_t, float, bool, std::string, std::vector<std::string>,
                             std::vector<std::int32_t>, std::vector<float>>;

  struct Tensor {
    std::string name;
    std::vector<std::int64_t> shape;  // slowest dimension first
    Encoding encoding = Encoding::kF32;
    std::uint64_t bytes = 0;
  };

  void Add(std::string key, Value value) { metadata_.emplace_back(std::move(key), std::move(value)); }

  // REQUIRES: rows are whole blocks of the encoding.
  void AddTensor(std::string name, std::vector<std::int64_t> shape, Encoding encoding);

  const std::vector<Tensor>& Tensors() const { return tensors_; }
  std::uint64_t DataBytes() const;

  // The whole header, up to the first tensor.
  std::string Header() const;

  // Writes `path` through a file beside it, so that it is whole or not there. `fill(i, append)` gives the
  // bytes of tensor i in pieces, exactly as many as it has. kUnavailable names the path; what `fill` returns
  // ends the writing.
  using Append = std::function<void(std::string_view)>;
  Status Write(const std::filesystem::path& path,
               const std::function<Status(std::size_t tensor, const Append& append)>& fill) const;

 private:
  std::vector<std::pair<std::string, Value>> metadata_;
  std::vector<Tensor> tensors_;
};

// Numbers to blocks. REQUIRES: encoding is kF32, kF16, kBf16, kQ8_0 or kQ4_0; count is a multiple of its
// block.
void Encode(Encoding encoding, const float* values, std::size_t count, std::string& out);

}  // namespace elasticmoe::model
