// What the server needs of an engine: requests in, token events out, state to show. Implemented by the
// coordinator's engine over worker processes, and by a scripted one for tests of the server.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "base/error.h"
#include "core/request.h"
#include "core/spec.h"

namespace elasticmoe::runtime {

struct DeviceStats {
  DeviceId device;
  int pid = 0;
  int sequences = 0;
  std::uint64_t rows = 0;     // rows that its experts computed since start
  std::uint64_t experts = 0;  // (layer, expert) pairs served
};

// Memory of one domain, by use.
struct DomainStats {
  DomainId domain;
  std::uint64_t shared_bytes = 0;  // weights that are no expert's
  std::uint64_t expert_bytes = 0;
  std::uint64_t kv_bytes = 0;
};

// Rows of a step fall into the first bucket whose bound they do not exceed, or into the one after the last.
// The bounds are vLLM's of `iteration_tokens_total`.
inline constexpr std::array<int, 13> kStepRowBounds{1,   8,    16,   32,   64,   128,  256,
                                                    512, 1024, 2048, 4096, 8192, 16384};

// What serving has cost since the start. Devices count from the command that asks for them until they are
// gone.
struct CostStats {
  double device_s = 0;       // devices x time
  double busy_device_s = 0;  // of it, in steps
  double joules = 0;
  bool measured = false;       // joules are of the machine's counters (RAPL); else of the stated power model
  std::uint64_t requests = 0;  // that ended
  std::uint64_t output_tokens = 0;  // of all
};

// Counters count since start.
struct EngineStats {
  int running = 0;
  int waiting = 0;
  double kv_usage = 0.0;  // share of KV blocks in use, 0..1
  std::uint64_t kv_blocks = 0;
  std::uint64_t steps = 0;
  // The devices' time in steps, and from a step's end to the begin of the one that was waiting to follow it:
  // what the engine costs.
  std::int64_t step_ns = 0;
  std::int64_t between_steps_ns = 0;
  std::array<std::uint64_t, kStepRowBounds.size() + 1> steps_by_rows{};
  std::uint64_t step_rows = 0;  // of all steps
  std::uint64_t preemptions = 0;
  std::uint64_t prefix_queries = 0;  // tokens looked up in the prefix cache
  std::uint64_t prefix_hits = 0;     // tokens found there
  std::uint64_t epoch = 0;
  std::uint64_t recoveries = 0;  // workers replaced after they died
  int standby = 0;               // workers that are ready to take over or to grow
  bool resizing = false;
  std::vector<DeviceStats> devices;
  std::vector<DomainStats> domains;
  CostStats cost;
  std::map<std::string, int> phases;  // devices by phase: "desired", "routable", ...
};

class Engine {
 public:
  // Called on the engine's thread, in order for one request; must not block. Not called again after an
  // event with `finish`.
  using Sink = std::function<void(const core::TokenEvent&)>;

  virtual ~Engine() = default;

  // Queues a request. Thread-safe. Errors, after which the sink is never called:
  //   kInvalidArgument    empty prompt, id out of the vocabulary, prompt + max_tokens beyond the context, ...
  //   kResourceExhausted  the queue is full (HTTP 429)
  //   kUnavailable        the engine is stopping (HTTP 503)
  virtual Status Submit(core::GenerationRequest request, Sink sink) = 0;

  // The request ends with kAbort, unless it has ended already. Thread-safe, returns at once.
  virtual void Cancel(RequestId request) = 0;

  virtual EngineStats Stats() const = 0;  // thread-safe
  virtual const core::ModelSpec& Spec() const = 0;
  virtual int MaxModelLen() const = 0;  // context limit in force, tokens
};

}  // namespace elasticmoe::runtime
