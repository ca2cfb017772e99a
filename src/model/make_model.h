// Random checkpoints of a stated size, for benchmarks and tests: real weights are large and licensed, and a
// resize does not care what the numbers say. Writes config.json, generation_config.json and safetensors, no
// tokenizer (such a model serves token ids only).
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "core/spec.h"

namespace elasticmoe::model {

struct MakeModelOptions {
  std::string shape = "qwen3-moe";  // or "mixtral"
  std::uint64_t parameters = 0;     // wish; met within 3 %
  // Else chosen for `parameters`.
  std::optional<int> hidden, layers, experts, top_k, vocab, heads, kv_heads, head_dim;
  std::optional<bool> tied_head;
  std::uint64_t seed = 1;  // same options and seed, same bytes
  std::uint64_t shard_bytes =
      5'000'000'000;                // a new file starts before this is passed (Hugging Face's default)
  std::filesystem::path directory;  // created; must hold no model yet
  std::function<void(std::uint64_t done_bytes, std::uint64_t total_bytes)> progress;  // may be empty
};

struct MadeModel {
  core::ModelSpec spec;
  std::uint64_t parameters = 0;
  std::uint64_t bytes = 0;  // of the safetensors files
  std::vector<std::filesystem::path> files;
};

// "1.4B", "300M", "64k", "1400000000". kInvalidArgument otherwise, or where it is not from 1 to 10^13.
Expected<std::uint64_t> ParseParameterCount(std::string_view text);

// The shape alone. kInvalidArgument where an override is out of range or no shape comes within 3 %. Pure.
Expected<core::ModelSpec> PickShape(const MakeModelOptions& options);

// Parameters of a model of that spec; a tied head counts once. REQUIRES: spec.family is known. Pure.
std::uint64_t CountParameters(const core::ModelSpec& spec);

// The same for a spec of any family, in the names of Family::Tensors; of `options` it reads seed,
// shard_bytes, directory and progress.
Expected<MadeModel> WriteModel(const core::ModelSpec& spec, const MakeModelOptions& options);

// Streams the weights in constant memory. config.json comes last, so a directory cut short opens as no model;
// after an error the files written so far are removed. Errors: PickShape's; kAlreadyExists;
// kResourceExhausted (not enough disk, checked first); kUnavailable (the system's words).
Expected<MadeModel> MakeModel(const MakeModelOptions& options);

}  // namespace elasticmoe::model
