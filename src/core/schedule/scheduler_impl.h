// Inside of the scheduler, shared by its files: requests and completing (scheduler.cc), planning
// (planning.cc), elasticity (elasticity.cc). Not for others.
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
  int published = 0;                // blocks given to the prefix cache
  ContentId published_content = 0;  // identity of the last of them
  bool rewrite_table = false;       // the whole table goes into the next plan
  int planned_rows = 0;             // in the step in flight
  bool planned_sample = false;
  int cached_prompt_tokens = 0;
  std::vector<TokenLogprob> prompt_scores;
  bool first_event_sent = false;
  TimeNs added_ns = 0;
  TimeNs queue_ns = -1;  // until its first step; -1 = it had none
  std::optional<MoveState> move;

  int Length() const { return static_cast<int>(tokens.size()); }
  int Generated() const { return static_cast<int>(tokens.size() - request.prompt.size()); }
  int Remaining() const { return Length() - computed; }
  bool Scored() const {
    return first_event_sent || request.prompt_logprobs < 0 ||
           prompt_scores.size() + 1 >= request.prompt.size();
  }
};

struct Scheduler::Impl {
  explicit Impl(SchedulerOptions o) : options(std::move(o)) {
    for (int i = 0; i < options.max_running; ++i) free_slots.insert(i);
  }

  struct DeviceState {
    SchedulerDevice config;
    int sequences = 0;  // running there, and moves under way to it
    // Of the step that is being planned:
    int rows_left = 0;
    std::vector<SequenceStep> steps;

    double LoadWithOneMore() const { return (sequences + 1) / config.weight; }
  };
  // The end of a sequence that changed domain: emitted with each plan until a step completes.
  struct Tail {
    RequestId request;
    std::vector<KvCopy> copies;
    DomainId from_domain;
    std::vector<BlockId> release;
  };
  // Target blocks of moves that were cancelled while their copies ran; freed when those end.
  struct Orphan {
    DomainId domain;
    std::vector<BlockId> blocks;
  };

  SchedulerOptions options;
  std::map<RequestId, Sequence> sequences;
  std::map<Rank, Sequence*> waiting;
  std::map<Rank, Sequence*> running;
  std::map<DeviceId, DeviceState> devices;
  std::map<DomainId, BlockPool> pools;
  std::set<int> free_slots;
  std::vector<Tail> tails;
  std::map<RequestId, Orphan> orphans;
  std::uint64_t next_arrival = 0;
  std::uint64_t next_step = 1;
  bool in_flight = false;
  bool hold_intake = false;
  StepId step_in_flight;
  std::uint64_t preemptions = 0, prefix_queries = 0, prefix_hits = 0;

  int BlocksFor(int tokens) const { return (tokens + options.block_tokens - 1) / options.block_tokens; }
  BlockPool& Pool(DomainId domain) { return pools.at(domain); }
  const BlockPool& Pool(DomainId domain) const { return pools.at(domain); }
  int PoolSize(DomainId domain) { return static_cast<int>(Pool(domain).Usable()); }
  int LargestPool();  // of the devices that accept; 0 = none yet
  Sequence& Find(RequestId request);
  const Sequence& Find(RequestId request) const;

  // ---- scheduler.cc
  void Finish(Sequence& sequence, TokenEvent event, FinishReason reason, std::vector<TokenEvent>& events);
  TokenEvent EventFor(Sequence& sequence);
  void AddSampled(Sequence& sequence, const TokenLogprob& sampled, std::vector<TokenEvent>& events);
  void ReleaseKv(Sequence& sequence);  // blocks, slot, place on the device, move, tail
  void Preempt(Sequence& sequence);
  void PublishBlocks(Sequence& sequence);

  // ---- planning.cc
  void PlanRunning(bool decode, StepPlan& plan, TimeNs now);
  void PlanWaiting(StepPlan& plan, TimeNs now);
  void PlanRows(Sequence& sequence, int rows, TimeNs now);
  // Takes blocks until `tokens` tokens fit; false (with what could be had kept) if the pool is out.
  bool Grow(Sequence& sequence, int tokens, StepPlan& plan);
  bool MakeRoom(const Sequence& sequence, std::map<Rank, Sequence*>::iterator& next);
  bool Admit(Sequence& sequence, std::map<DomainId, int>& reserved, StepPlan& plan);
  bool AdmitOn(DeviceState& device, Sequence& sequence, std::map<DomainId, int>& reserved, StepPlan& plan);

  // ---- elasticity.cc
  bool HasTail(RequestId request) const;
  void CancelMove(Sequence& sequence);
  bool EndOrphan(RequestId request);
  void DropTailsFrom(DomainId domain);
  void SwitchMovedSequences();
  std::map<DeviceId, int> TargetCounts(const std::map<DeviceId, int>& counts) const;
  Move StartMove(Sequence& sequence, DeviceState& to);
};

}  // namespace elasticmoe::core
