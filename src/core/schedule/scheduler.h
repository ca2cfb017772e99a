// The scheduler: which rows run on which device in the next step, and what a step's results mean for each
// request. Pure: no clock, thread or I/O; the engine and the simulator drive the same code.
//
//   Add ──► waiting ──admit──► running (prefill in chunks, then decode) ──► finished
//              ▲                  │ no KV block left, or its KV was lost
//              └───── preempted ◄─┘ (tokens kept; prefilled again later: same tokens, since kernels are
//                                    batch-invariant)
//
// Driving it: `Plan` gives a step; the driver runs it and calls `Complete`, or `AbandonStep` if it died half
// way (the next Plan runs the same rows again; KV rows are written by position, so nothing is spoiled). At
// most one step is in flight. Everything else may be called between any two calls, except that what takes KV
// away or hands it over (SetBlocks, VacateBlocks, ForgetKv, Rebalance) REQUIRES no step in flight.
//
// Invariants (CheckIntegrity):
//  1. A sequence on a device owns the blocks that cover its computed tokens, none beyond all its tokens, in
//  that
//     device's domain.
//  2. A block's reference count is the number of running sequences whose table holds it, of moves that fill
//  it, and of
//     tails that still read it.
//  3. Every request added ends with exactly one event that has `finish`.
//  4. Sum of planned rows a device <= max_step_rows; running sequences <= max_running.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/error.h"
#include "base/ids.h"
#include "core/request.h"

namespace elasticmoe::core {

struct SchedulerOptions {
  int vocab = 0;
  int max_model_len = 0;  // tokens of one sequence, prompt + generated
  int block_tokens = 16;
  int max_running = 128;     // sequences with KV, over all devices; also the number of table slots
  int max_waiting = 4096;    // queued requests beyond those
  int max_step_rows = 512;   // a device a step: decode rows first, the rest prefill
  int max_chunk_rows = 512;  // of one sequence a step
  bool prefix_cache = true;
  std::vector<TokenId> eos_ids;
};

// A device that may hold sequences. Devices of one domain share its pool of KV blocks.
struct SchedulerDevice {
  DeviceId device;
  DomainId domain;
  double weight = 1.0;  // relative speed: its share of the sequences
  bool accepts = true;  // false: takes no new sequences (it is leaving)
};

// Rows [start_position, start_position + rows) of one sequence.
struct SequenceStep {
  RequestId request;
  int table_slot = 0;  // which block table, in [0, max_running); stable while it runs
  int start_position = 0;
  int rows = 0;
  bool sample = false;        // the last row's logits choose the token at start_position + rows
  bool score_prompt = false;  // rows' logits score the prompt tokens that follow them
};

struct DevicePlan {
  DeviceId device;
  std::vector<SequenceStep> sequences;
};

// tables[slot][index] = block, to be written before the step runs.
struct TableWrite {
  int table_slot = 0;
  int index = 0;
  BlockId block;
};

struct KvCopy {
  DomainId from_domain;
  BlockId from;
  DomainId to_domain;
  BlockId to;
};

struct StepPlan {
  StepId step;
  std::vector<DevicePlan> devices;  // those with rows
  std::vector<TableWrite> table_writes;
  std::vector<KvCopy> copies_before;  // the tail of sequences that change domain at this boundary
  std::vector<TokenEvent> failed;     // final events of requests that no pool can hold any more
  bool Empty() const { return devices.empty(); }
};

struct SequenceResult {
  RequestId request;
  TokenLogprob sampled;  // where `sample` was set
  std::vector<TokenLogprob>
      prompt_logprobs;  // where `score_prompt` was set: one a row that has a next prompt token
};

struct StepResult {
  StepId step;
  std::vector<SequenceResult> sequences;  // every planned one, any order
};

struct SchedulerStats {
  int running = 0;
  int waiting = 0;
  std::uint64_t blocks_total = 0;
  std::uint64_t blocks_used = 0;  // referenced by sequences (cached ones that are free to take do not count)
  std::uint64_t preemptions = 0;
  std::uint64_t prefix_queries = 0;  // tokens
  std::uint64_t prefix_hits = 0;
};

class Scheduler {
 public:
  explicit Scheduler(SchedulerOptions options);
  ~Scheduler();

  // Errors as Engine::Submit's (kInvalidArgument names the field; kResourceExhausted: queue full).
  // max_tokens is cut to what the context allows.
  Status Add(GenerationRequest request, TimeNs now);

  // The request's final event (kAbort) is appended, unless it had ended. A sequence of the step in flight
  // ends now, too; its result is ignored later.
  void Cancel(RequestId request, std::vector<TokenEvent>& events);

  // The next step; empty where nothing can run. Decode rows come first, then prefill in order of (priority,
  // arrival), filling each device's max_step_rows. Preempts the youngest of lowest priority where blocks run
  // out. REQUIRES: no step in flight (an empty plan is none).
  StepPlan Plan(TimeNs now);

  // Advances the sequences of the step and appends their events.
  // REQUIRES: result.step is the step in flight.
  void Complete(const StepResult& result, TimeNs now, std::vector<TokenEvent>& events);

  // The step in flight did not happen.
  void AbandonStep();

  // While held, requests that have not run yet wait; those that have go on.
  void HoldIntake(bool hold);
  bool Started() const;  // any request has run and not ended

  // ---- elasticity ----
  // The devices from now on. Sequences of devices that are gone or no longer accept are handed to others with
  // Rebalance(); until then they stay where they are. REQUIRES: a device that is left out holds no sequence.
  void SetDevices(std::span<const SchedulerDevice> devices);

  // KV blocks of a domain, numbered [0, blocks). Growing is always possible; shrinking frees ids from the top
  // and preempts the sequences that use them. (Copies of moves that run into those must end before their
  // memory does.)
  void SetBlocks(DomainId domain, std::uint32_t blocks);

  // Hands sequences over so that devices that don't accept have none and the others' counts fit their
  // weights (moves as few as possible). Inside a domain that is done at once: tables keep their slots.
  // Between domains a move starts: full blocks are copied while decoding goes on. Returns the copies to
  // start; `MoveCopied` reports a request's copies done, and the next Plan carries the tail. Not before a
  // running move ends.
  struct Move {
    RequestId request;
    DeviceId from, to;
    std::vector<KvCopy> copies;  // empty inside a domain: the move is complete. Between domains, without a
                                 // full block yet: nothing to report either, the next Plan completes it
  };
  // For each move with copies one of the two is called, whatever became of the request: its target blocks are
  // kept until then, since a copy under way writes to them. Also for copies that ended with the memory they
  // wrote to.
  std::vector<Move> Rebalance();
  // Before the domain shrinks to `blocks`: ids from there on are not given out any more, and sequences that
  // use them move to lower ones, as between domains (device and domain stay). May be called again, for those
  // that had no room; it ends with SetBlocks. REQUIRES: no step in flight.
  std::vector<Move> VacateBlocks(DomainId domain, std::uint32_t blocks);
  bool Vacated(DomainId domain, std::uint32_t blocks) const;  // nobody uses ids from `blocks` on
  void MoveCopied(RequestId request);
  void MoveFailed(RequestId request);  // target blocks are freed, the sequence stays

  int SequencesOn(DeviceId device) const;  // running there, and moves under way to it

  // All KV of a domain is gone: its sequences are preempted and run again from their tokens. Cached blocks
  // are forgotten.
  void ForgetKv(DomainId domain);

  // Every request's end with kError and this text (the engine gives up).
  void FailAll(const std::string& error, std::vector<TokenEvent>& events);

  // ---- views ----
  // All tokens of a running or waiting request: prompt, then generated. REQUIRES: it is known.
  std::span<const TokenId> Tokens(RequestId request) const;
  const GenerationRequest& Request(RequestId request) const;
  int GeneratedCount(RequestId request) const;
  std::span<const BlockId> BlockTable(RequestId request) const;  // empty while waiting
  bool Knows(RequestId request) const;
  bool Idle() const;  // nothing waiting or running
  SchedulerStats Stats() const;
  void CheckIntegrity() const;  // dies where an invariant is broken

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace elasticmoe::core
