// The forward pass alone: this process maps the weights that a running engine's memory daemon holds and takes
// sequences through compute::Forward on threads of its own. No scheduler, no exchange, no other process: what
// an engine's step costs more is the engine's own. // Not thread-safe. Effects: maps memory, pins the calling
// thread.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "compute/forward.h"
#include "compute/parallel.h"
#include "core/request.h"
#include "runtime/coordinator/hmm_client.h"
#include "runtime/vmm.h"

namespace elasticmoe::cli {

// What steps have to do at the least, whoever runs them.
struct Work {
  double operations = 0;  // floating point, two a multiplication with addition
  double bytes = 0;       // of weights, each once a step, and of KV
};

// Nearly any token may follow, another one each time: a random model left to its likeliest token repeats it
// for ever, and then every step visits the same few experts, which caches hold.
core::SamplingParams SamplingOf(int sequence);

class ForwardAlone {
 public:
  struct Options {
    std::string hmm_socket;  // of an engine that serves the model
    std::vector<int> cpus;   // one thread each
    int max_rows = 0;        // a step
    int sequences = 0;
    int tokens_each = 0;  // most tokens of a sequence
  };
  // References must outlive the object. Errors: those of the daemon and of mapping its memory.
  static Expected<std::unique_ptr<ForwardAlone>> Attach(const core::ModelSpec& spec,
                                                        const compute::Kernels& kernels, Options options);

  struct Part {
    int sequence = 0;
    std::span<const TokenId> tokens;  // the next ones of the sequence
  };
  // One step; the token that follows each part, by SamplingOf its sequence. REQUIRES: within the options'
  // limits.
  std::vector<TokenId> Step(std::span<const Part> parts);
  void Forget();    // all sequences begin anew
  Work TakeWork();  // of the steps since the last call

  compute::ThreadPool& threads() { return threads_; }

 private:
  ForwardAlone(const core::ModelSpec& spec, const compute::Kernels& kernels, Options options);
  Status Map();
  void Experts(int layer, int moe_layer);
  void Count(std::span<const compute::Chunk> chunks, int rows, int logit_rows);

  const core::ModelSpec& spec_;
  const compute::Kernels& kernels_;
  const Options options_;
  const compute::WeightLayout layout_;
  compute::ThreadPool threads_;
  compute::Forward forward_;
  runtime::AttachedMemory memory_;
  std::vector<runtime::Mapping> domains_;
  compute::SharedWeights shared_;
  std::vector<compute::MlpWeights> experts_;  // [moe layer * experts + expert]
  std::vector<int> moe_index_;
  double row_operations_ = 0;  // of a row, all layers, without experts, attention's own and the head
  compute::KvCache kv_;
  std::vector<std::byte*> chunks_;
  runtime::Fd kv_memory_;
  runtime::Mapping kv_mapping_;
  std::vector<std::vector<std::uint32_t>> tables_;  // [sequence]
  std::vector<int> lengths_;                        // [sequence], tokens
  Work work_;

  std::vector<std::byte> activations_, scratch_;
  std::vector<std::int32_t> chosen_;
  std::vector<float> mix_, outputs_, logits_;
  std::vector<std::vector<compute::ExpertRow>> visits_;
};

}  // namespace elasticmoe::cli
