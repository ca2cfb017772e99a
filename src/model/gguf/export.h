// Writes a Hugging Face checkpoint as one GGUF file, so that other engines can be measured on the same
// weights.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>

#include "base/error.h"
#include "model/encoding.h"

namespace elasticmoe::model {

struct ExportGgufOptions {
  std::filesystem::path directory;  // a Hugging Face checkpoint
  std::filesystem::path out;
  Encoding encoding = Encoding::kBf16;  // of matrices: kF32, kF16, kBf16, kQ8_0 or kQ4_0
  std::function<void(std::uint64_t done_bytes, std::uint64_t total_bytes)> progress = {};  // may be empty
};

struct ExportedGguf {
  std::uint64_t bytes = 0;
  std::size_t tensors = 0;
};

// Norms, biases and routers are written as float32, as all readers expect; matrices whose rows are no whole
// blocks as f16. Constant memory beside one matrix. Errors: those of Checkpoint::Open and the tokenizer;
// kUnimplemented where GGUF has no name for the family or its tokenizer; kUnavailable for the output.
Expected<ExportedGguf> ExportGguf(const ExportGgufOptions& options);

}  // namespace elasticmoe::model
