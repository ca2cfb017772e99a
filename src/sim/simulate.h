// Simulation of the code that decides: scheduler, planner, plan check and resize machine run in a world of
// simulated workers and memory with a virtual clock, under faults that the seed chooses. A seed replays
// exactly.
//
// The toy model's token depends on every token before it, read back through the KV blocks of the simulated
// memory: a row that was lost, doubled, moved to the wrong block or read from a stale one gives another
// token.
//
// After every event: scheduler, resize machine and memory are consistent, every expert of the placement is
// where it is served from. At the end: every request ended exactly once with exactly its tokens; devices
// allocated = members; nothing in memory that no placement wants. Once faults stop, everything ends
// (liveness).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace elasticmoe::sim {

struct SimulationOptions {
  std::uint64_t first_seed = 1;
  int seeds = 1;
  bool trace = false;  // keep the trace of the last seed run
  bool stop_at_failure = true;
};

struct SimulationReport {
  int seeds = 0;  // run
  int failed = 0;
  std::uint64_t failed_seed = 0;  // the first one
  std::string failure;            // what was broken there
  std::vector<std::string> trace;
  std::uint64_t hash = 0;  // of all that happened in all seeds

  // What the seeds went through.
  std::uint64_t events = 0, steps = 0, steps_abandoned = 0, requests = 0, tokens = 0, preemptions = 0,
                sequences_moved = 0;
  std::uint64_t resizes_done = 0, resizes_aborted = 0, commits = 0;
  std::uint64_t worker_deaths = 0, memory_deaths = 0, messages_lost = 0, messages_doubled = 0,
                messages_late = 0, refusals = 0;
  std::uint64_t coordinator_deaths = 0, requests_again = 0, kv_shrinks = 0;
};

SimulationReport Simulate(const SimulationOptions& options);

}  // namespace elasticmoe::sim
