// Inside of the scheduler, shared by its two files: planning and completing (scheduler.cc), and elasticity
// (elasticity.cc). Not for others.
#pragma once

#include <map>
#include <optional>
#include <set>
#include <utility>

#include "base/check.h"
#include "core/kv/block_pool.h"
#include "core/schedule/scheduler.h"

namespace elasticmoe::core {

// (priority, arrival number): who comes first, in the queue and for KV blocks alike.
using Rank = std::pair<int, std::uint64_t>;

struct MoveState {
  DeviceId to;
  DomainId to_domain;
  std::vector<BlockId> blocks;  // in the target domain, for the first blocks of the sequence
  bool copied = false;          // those are filled
};

struct Sequence {
  GenerationRequest request;
  Rank rank;
  std::vector<TokenId> tokens;  // prompt, then generated
  int computed = 0;             // tokens whose K and V are in `blocks`
  bool running = false;
  DeviceId device;
  DomainId domain;
  int table_slot = -1;
  std::vector<BlockId> blocks;
  int published = 0;           // blocks given to the prefix cache
  bool rewrite_table = false;  // the whole table goes into the next plan
  int planned_rows = 0;        // in the step in flight
  bool planned_sample = false;
  int cached_prompt_tokens = 0;
  std::vector<TokenLogprob> prompt_scores;
  bool first_event_sent = false;
  std::optional<MoveState> move;

  int Generated() const { return static_cast<int>(tokens.size() - request.prompt.size()); }
  int Remaining() const { return static_cast<int>(tokens.size()) - computed; }
  bool Scored() const {
    return request.prompt_logprobs < 0 || prompt_scores.size() + 1 >= request.prompt.size();
  }
};

struct Scheduler::Impl {
  explicit Impl(SchedulerOptions o) : options(std::move(o)) {
    for (int i = 0; i < options.max_running; ++i) free_slots.insert(i);
  }

  struct DeviceState {
    SchedulerDevice config;
    int sequences = 0;  // running there, and moves under way to it
  };
  // The tail of a sequence that changed domain: emitted with each plan until a step completes.
  struct Tail {
    std::vector<KvCopy> copies;
    DomainId from_domain;
    std::vector<BlockId> release;
  };

  SchedulerOptions options;
  std::map<RequestId, Sequence> sequences;
  std::map<Rank, Sequence*> waiting;
  std::map<Rank, Sequence*> running;
  std::map<DeviceId, DeviceState> devices;
  std::map<DomainId, BlockPool> pools;
  std::set<int> free_slots;
  std::vector<Tail> tails;
  // Target blocks of moves that were cancelled while their copies ran; freed when those end.
  struct Orphan {
    DomainId domain;
    std::vector<BlockId> blocks;
  };
  std::map<RequestId, Orphan> orphans;
  std::uint64_t next_arrival = 0;
  std::uint64_t next_step = 1;
  bool in_flight = false;
  StepId step_in_flight;
  std::vector<RequestId> planned;
  std::uint64_t preemptions = 0, prefix_queries = 0, prefix_hits = 0;

  int BlocksFor(int tokens) const { return (tokens + options.block_tokens - 1) / options.block_tokens; }
  BlockPool& Pool(DomainId domain) { return pools.at(domain); }
  Sequence& Find(RequestId request);
  const Sequence& Find(RequestId request) const;

  // Takes blocks until `tokens` tokens fit; false (with what could be had kept) if the pool is out.
  bool Grow(Sequence& sequence, int tokens, StepPlan& plan);
  Sequence* VictimFor(const Sequence& sequence);
  void Preempt(Sequence& sequence);
  void ReleaseKv(Sequence& sequence);  // blocks, slot, place on the device, move
  void PublishBlocks(Sequence& sequence);
  bool Admit(Sequence& sequence, std::map<DeviceId, int>& budget, StepPlan& plan);
  // Of those whose domain could hold `blocks` at all.
  DeviceState* LeastLoaded(const std::map<DeviceId, int>& budget, int blocks);
  void PlanRows(Sequence& sequence, int rows, std::map<DeviceId, DevicePlan>& plans,
                std::map<DeviceId, int>& budget);
  void Finish(Sequence& sequence, TokenEvent event, FinishReason reason, std::vector<TokenEvent>& events);
  TokenEvent EventFor(Sequence& sequence);
  void CancelMove(Sequence& sequence);
  bool EndOrphan(RequestId request);
  void DropTails(DomainId domain, bool into);
  void SwitchMovedSequences(StepPlan& plan);
  void PlaceOn(Sequence& sequence, DeviceId device);
};

}  // namespace elasticmoe::core
