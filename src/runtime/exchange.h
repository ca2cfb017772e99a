// The shared memory that one instance steps through: plans in, results out, token rows between devices.
// One memory object, made by the coordinator, mapped by every worker. Fixed size for `max_devices`, so that a
// resize changes none of it; pages that are never written take no memory.
//
//   header: views, progress, finish word (the engine sleeps on it), abort word
//   tables, per table slot: block table, token history, sampling; the coordinator writes, workers read
//   placements: owner devices of each expert, four epochs in turn
//   per device: sync words, plan, results, activations, routing, expert outputs
//
// One step, for a rank with rows r and a rank e that owns experts they chose, layer by layer:
//   r: writes activations + routing ─► r.dispatched = tag ─► e: computes into r.outputs ─► e.returned = tag
//   ─► r: combines
// and at the end once more, for the vocabulary head: of the rows that sample, each rank computes a part of
// the logits.
// A step may take another placement on its way: its views say who does what, `progress` from which layer on.
// A tag numbers (step, layer) and only grows; a rank that has nothing to send or serve sets its last tag at
// once. Written by one, read by others after the tag: no locks.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/error.h"
#include "base/ids.h"
#include "core/placement/placement.h"
#include "core/request.h"
#include "core/schedule/scheduler.h"
#include "core/spec.h"
#include "runtime/futex.h"
#include "runtime/vmm.h"

namespace elasticmoe::runtime {

inline constexpr int kMaxDevices = 64;
inline constexpr int kMaxReplicas = 4;
inline constexpr int kPlacementRing = 4;  // epochs whose tables are kept
inline constexpr std::uint32_t kNoSwitch = 0xffff;
inline constexpr int kHeadRows = 32;   // of a device, whose logits are held at once; bounds the buffer
inline constexpr int kMaxBias = 1024;  // logit_bias entries a request
inline constexpr int kMaxBanned = 64;  // stop ids a request, with the model's eos ids

struct ExchangeShape {
  std::int32_t max_devices = 0;
  std::int32_t max_rows = 0;       // rows a device a step
  std::int32_t max_slots = 0;      // table slots = running sequences
  std::int32_t max_model_len = 0;  // tokens
  std::int32_t block_tokens = 0;
  std::int32_t hidden = 0;
  std::int32_t vocab = 0;
  std::int32_t top_k = 0;
  std::int32_t moe_layers = 0;
  std::int32_t experts = 0;
  std::int32_t activation_bytes = 0;
};

struct SlotSampling {
  std::uint64_t seed;
  float temperature, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty;
  std::int32_t top_k, logprobs, prompt_logprobs, prompt_tokens, min_tokens;
  std::int32_t bias_count, banned_count;
  std::int32_t banned[kMaxBanned];
  std::int32_t bias_token[kMaxBias];
  float bias_value[kMaxBias];
};

struct PlanEntry {
  std::uint64_t request;
  std::int32_t table_slot, start_position, rows;
  std::uint8_t sample, score_prompt;
};

struct LogprobRecord {
  std::int32_t token;
  float logprob;
  std::int32_t top_count;
  std::int32_t top_token[core::kMaxTopLogprobs];
  float top_logprob[core::kMaxTopLogprobs];
};

// One device's sync words and step inputs.
struct DeviceHeader {
  SharedWord go;          // the step to run; its worker sleeps on it
  SharedWord dispatched;  // rows of layers up to this tag are in place
  SharedWord returned;    // expert outputs of layers up to this tag are in place
  std::atomic<std::uint32_t> finished_step;
  std::atomic<std::uint64_t> expert_rows;  // since start: load of this device's experts
  std::int32_t entry_count;
  std::int32_t row_count;
  std::int32_t head_rows;            // whose logits all members compute together
  std::int64_t begin_ns, end_ns;     // of the last step, on the host's monotonic clock
  std::int64_t compute_ns, wait_ns;  // of the last step
};

// Who takes part in a step, and whose experts are where.
struct StepView {
  std::uint64_t epoch;
  std::int32_t placement_index;
  std::int32_t member_count;
  std::int32_t members[kMaxDevices];  // device ids by rank

  std::span<const std::int32_t> Members() const { return {members, static_cast<std::size_t>(member_count)}; }
  bool Has(DeviceId device) const {
    return std::find(Members().begin(), Members().end(), device.value) != Members().end();
  }
};

struct ExchangeHeader {
  std::uint64_t magic;
  ExchangeShape shape;
  std::uint32_t step;                     // number of the last one; grows by one
  SharedWord finish;                      // changes with each device that is done with a step
  std::atomic<std::uint32_t> abort_step;  // this step is given up
  // Of the step: layer that the second view begins with (kNoSwitch: none) << 16 | layers that anybody has
  // entered. Both change in one word, so that all agree on the view of a layer.
  std::atomic<std::uint32_t> progress;
  StepView views[2];
  std::int32_t spin;  // pauses a waiter may spin
};

class Exchange {
 public:
  static Expected<Exchange> Create(const ExchangeShape& shape);
  static Expected<Exchange> Attach(int fd);

  const ExchangeShape& shape() const { return header().shape; }
  int fd() const { return memory_.get(); }
  std::size_t bytes() const { return mapping_.size(); }

  ExchangeHeader& header() const { return *reinterpret_cast<ExchangeHeader*>(mapping_.data()); }
  DeviceHeader& device(int device) const;

  std::uint32_t* BlockTable(int slot) const;   // [blocks of max_model_len]
  std::int32_t* TokenHistory(int slot) const;  // [max_model_len]
  SlotSampling& Sampling(int slot) const;

  // Owner devices of (layer, expert) in the ring's table: first byte count, then devices.
  std::uint8_t* PlacementEntry(int ring_index, int layer, int expert) const;
  void WritePlacement(int ring_index, const core::Placement& placement) const;
  // The device that computes rows of `source_rank` for the expert.
  int OwnerFor(int ring_index, int layer, int expert, int source_rank) const {
    const std::uint8_t* entry = PlacementEntry(ring_index, layer, expert);
    return entry[1 + source_rank % entry[0]];
  }

  // ---- the views of a step; layers are MoE layers.
  // The engine, before the step: the first view holds to its end.
  void BeginProgress() const;
  // A device, before it takes part in a layer: the view that holds there, 0 or 1.
  int EnterLayer(int layer) const;
  // The engine, with the second view written: it holds from the first layer on that nobody has entered.
  // False: all have been, or there was a switch.
  bool SwitchView() const;
  int SwitchLayer() const;  // `moe_layers` where there was no switch
  // Whoever takes part in the step, in the order of the views, each once.
  std::vector<std::int32_t> Participants() const;

  // Rows that the expert has computed since the start, on whatever device.
  std::atomic<std::uint64_t>& ExpertRows(int layer, int expert) const;

  PlanEntry* Plan(int device) const;              // [max_slots]
  LogprobRecord* Sampled(int device) const;       // [max_slots], by plan entry
  LogprobRecord* PromptScores(int device) const;  // [max_rows], by row
  std::byte* Activations(int device) const;       // [max_rows, hidden] of activation_bytes
  std::int32_t* Routes(int device) const;         // [max_rows, top_k]
  float* Outputs(int device) const;               // [max_rows, top_k, hidden]
  std::byte* HeadInputs(int device) const;        // [kHeadRows, hidden] of activation_bytes
  float* Logits(int device) const;                // [kHeadRows, vocab]

 private:
  struct Offsets {
    std::size_t tables = 0, table_stride = 0, history = 0, history_stride = 0, sampling = 0, placements = 0,
                placement_stride = 0, expert_rows = 0;
    std::size_t devices = 0, device_stride = 0;
    // Within a device:
    std::size_t plan = 0, sampled = 0, scores = 0, activations = 0, routes = 0, outputs = 0, head_inputs = 0,
                logits = 0;
    std::size_t total = 0;
  };
  static Offsets Layout(const ExchangeShape& shape);
  std::byte* DeviceArea(int device) const {
    return mapping_.data() + offsets_.devices + std::size_t(device) * offsets_.device_stride;
  }

  Fd memory_;
  Mapping mapping_;
  Offsets offsets_;
};

// Tags of a step: MoE layer l of step s, the head as layer `moe_layers`. Compared by wrapping difference.
inline std::uint32_t LayerTag(std::uint32_t step, int moe_layers, int layer) {
  return step * static_cast<std::uint32_t>(moe_layers + 2) + static_cast<std::uint32_t>(layer) + 1;
}
inline bool Reached(std::uint32_t value, std::uint32_t tag) {
  return static_cast<std::int32_t>(value - tag) >= 0;
}

void WriteSampling(const core::GenerationRequest& request, std::span<const TokenId> eos_ids,
                   SlotSampling& out);
core::SamplingParams ReadSampling(const SlotSampling& in);
void WriteLogprob(const core::TokenLogprob& in, LogprobRecord& out);
core::TokenLogprob ReadLogprob(const LogprobRecord& in);

}  // namespace elasticmoe::runtime
