// The work of one device: its part of each step, on memory that belongs to others. The same code runs as a
// worker process and, in tests and embeddings, as a thread of the engine's process.
// Not thread-safe; RunStep blocks until the step is done everywhere or given up.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/ids.h"
#include "compute/forward.h"
#include "core/spec.h"
#include "runtime/exchange.h"
#include "runtime/hmm/memory_map.h"
#include "runtime/worker/expert_table.h"

namespace elasticmoe::runtime {

// Memory of one domain as this process sees it.
struct AttachedDomain {
  DomainId domain;
  Mapping mapping;
};

class Device {
 public:
  Device(DeviceId id, const core::ModelSpec& spec, const compute::Kernels& kernels, std::vector<int> cpus,
         ExpertTableKind expert_table, Exchange& exchange);

  // Maps the domain's memory. Takes milliseconds: no byte is copied.
  Status Attach(const MemoryMap& map, Fd domain_fd);

  // Makes this device able to run steps of `epoch`: finds the experts that it owns there and prepares their
  // page tables. The epochs before it stay runnable (kPlacementRing of them).
  Status Prepare(const MemoryMap& map, std::uint64_t epoch);

  // The KV pool is resized. May run beside a step: no step uses chunks that are new, or that are gone.
  Status SetKvChunks(const std::vector<std::uint64_t>& offsets);

  // Runs its part of step `step` of the exchange; one that the step takes in on its way has only the layers
  // from there on. False if the step was given up (aborted).
  bool RunStep(std::uint32_t step);

  DeviceId id() const { return id_; }

 private:
  struct EpochExperts {
    std::uint64_t epoch = 0;
    bool valid = false;
    int owned = 0;
    std::vector<compute::MlpWeights> weights;  // [layer * experts + expert]; data null where not owned
  };

  // The coordinator keeps steps and what is prepared for them apart, by messages and words of the exchange:
  // an order between this process's threads that runs through another process. Said here, too, so that the
  // memory model and race detectors know.
  void AfterSteps() const;
  void Prepared();

  bool GivenUp(std::uint32_t step) const;
  const EpochExperts& ExpertsOf(const StepView& view) const;
  int CollectRows();  // of the plan: tokens_ and chunks_of_step_; returns how many
  void ServeExperts(const StepView& view, int layer, const EpochExperts& experts);
  // Until all members' `word` (dispatched or returned) has reached the tag; false: the step is given up.
  bool Await(const StepView& view, SharedWord DeviceHeader::*word, std::uint32_t step, std::uint32_t tag);
  // A row of the step whose logits are wanted.
  struct Wanted {
    int entry, row, within;  // plan entry, row of the step, index of the row within its entry
  };
  void CollectWanted();
  bool ShareHead(std::uint32_t step);  // false: the step is given up
  void Finish(std::uint32_t step);
  void SampleRows();
  void SampleRow(const Wanted& want, std::span<float> logits);

  DeviceId id_;
  const core::ModelSpec& spec_;
  const compute::Kernels& kernels_;
  Exchange& exchange_;
  compute::WeightLayout layout_;
  compute::ThreadPool threads_;
  compute::Forward forward_;
  std::vector<int> moe_index_;

  ExpertTableKind table_kind_;
  Fd domain_fd_;
  Mapping domain_;
  std::unique_ptr<ExpertTable> table_;  // over the two before it
  compute::SharedWeights shared_;
  std::vector<std::byte*> chunks_;  // as many as the domain could hold: steps read it while it changes
  compute::KvCache kv_;
  std::array<EpochExperts, kPlacementRing> epochs_;
  std::atomic<std::uint32_t> preparations_{0};

  // Scratch of a step, reused.
  std::vector<TokenId> tokens_;
  std::vector<compute::Chunk> chunks_of_step_;
  std::vector<float> mix_;
  std::vector<std::byte> scratch_;
  std::vector<std::vector<compute::ExpertRow>> rows_by_expert_;
  std::vector<compute::ExpertBatch> batches_;
  std::vector<Wanted> wanted_;
  std::vector<int> which_;
  std::vector<std::byte> head_rows_;
  std::vector<const void*> head_in_;
  std::vector<float*> head_out_;
  std::int64_t wait_ns_ = 0;
};

}  // namespace elasticmoe::runtime
