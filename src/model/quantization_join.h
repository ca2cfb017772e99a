// What the joining of values and scales is made of: for quantization*.cc. Pure.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "model/config_reader.h"
#include "model/quantization.h"

namespace elasticmoe::model {

inline std::string ShownShape(const std::vector<std::int64_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

inline std::string Doing(const TensorIndex& index, const StoredTensor& tensor) {
  return fmt::format("reading {}: tensor {}", index.FileOf(tensor).string(), Shown(tensor.name));
}

// Places of tensors by name, and which of them have been joined and go.
class TensorJoin {
 public:
  explicit TensorJoin(TensorIndex& index) : index_(index), drop_(index.tensors.size(), false) {
    for (std::size_t i = 0; i < index.tensors.size(); ++i) names_.emplace(index.tensors[i].name, i);
  }

  std::size_t Size() const { return drop_.size(); }
  StoredTensor& At(std::size_t i) { return index_.tensors[i]; }
  StoredTensor* Find(const std::string& name) {
    const auto at = names_.find(name);
    return at == names_.end() ? nullptr : &index_.tensors[at->second];
  }
  void Drop(const StoredTensor& tensor) {
    drop_[static_cast<std::size_t>(&tensor - index_.tensors.data())] = true;
  }

  // Once, at last: what was dropped goes, `made` comes.
  Status Finish(std::vector<StoredTensor> made) {
    names_.clear();
    std::size_t kept = 0;
    for (std::size_t i = 0; i < drop_.size(); ++i) {
      if (drop_[i]) continue;
      if (kept != i) index_.tensors[kept] = std::move(index_.tensors[i]);
      ++kept;
    }
    index_.tensors.resize(kept);
    return AddTensors(std::move(made), index_);
  }

 private:
  TensorIndex& index_;
  std::unordered_map<std::string, std::size_t> names_;
  std::vector<bool> drop_;
};

// Of whole numbers (quantization_integers.cc).
Status JoinWords(const Quantization& quantization, TensorIndex& index);       // GPTQ, AWQ
Status JoinCompressed(const Quantization& quantization, TensorIndex& index);  // compressed-tensors

}  // namespace elasticmoe::model
