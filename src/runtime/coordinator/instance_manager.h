// The IMM: starts worker processes, keeps some in standby, attaches them to devices, and notices their death.
// A standby worker has its program loaded, its kernels chosen and the exchange mapped, and no memory:
// attaching it takes milliseconds. Workers of retired devices come back into the pool; beyond its limit the
// least recently used one ends. Blocking calls; not thread-safe.
#pragma once

#include <functional>
#include <list>
#include <map>
#include <string>
#include <vector>

#include "runtime/channel.h"
#include "runtime/coordinator/hmm_client.h"
#include "runtime/exchange.h"
#include "runtime/process.h"
#include "runtime/worker/expert_table.h"

namespace elasticmoe::runtime {

struct InstanceOptions {
  Json config;          // the model's config.json
  std::string kernels;  // a name, not "auto"
  core::WeightFormat weights = core::WeightFormat::kBf16;
  int threads_per_device = 1;
  int first_cpu = 0;
  ExpertTableKind expert_table = ExpertTableKind::kPointer;
  int standby = 1;                  // workers kept ahead
  int standby_limit = 2;            // most that are kept, those that come back included
  int worker_attempts = 3;          // workers tried for a device; >= 1
  int answer_timeout_seconds = 20;  // a worker that is silent for longer is taken for dead
  std::string log_level = "info";
};

class InstanceManager {
 public:
  InstanceManager(InstanceOptions options, const Exchange& exchange);
  ~InstanceManager();  // ends all workers

  void SetStandby(int count, int limit) {
    options_.standby = count;
    options_.standby_limit = limit;
  }
  // Starts standby workers until there are `options.standby`. Does not wait for them.
  Status FillStandby();
  Status AddStandby();  // one more

  // Makes a (standby or new) worker the process of `device`, on its memory. Replaces a dead one.
  Status Attach(DeviceId device, const AttachedMemory& memory);
  // The same worker on other memory.
  Status Reattach(DeviceId device, const AttachedMemory& memory);
  // All attached workers at once: each prepares the epoch.
  Status Prepare(const std::vector<DeviceId>& devices, std::uint64_t epoch, const MemoryMap& map);
  // The KV chunks of a domain are those of the map now, in all its workers.
  Status SetKvChunks(const MemoryMap& map, DomainId domain);
  // Returns when every live worker of `devices` is between two steps.
  void Quiesce(const std::vector<DeviceId>& devices);
  void Retire(DeviceId device);  // its worker gives its memory up and goes to the standby pool, or ends
  void Kill(DeviceId device);    // a worker that does not answer

  // Devices whose worker has ended, and dead standbys are dropped.
  std::vector<DeviceId> TakeDead();
  // For a watcher: descriptors that become readable when a worker ends.
  std::vector<int> AttachedPidfds() const;
  std::vector<int> StandbyPidfds() const;
  std::vector<DeviceId> Attached() const;
  int PidOf(DeviceId device) const;  // -1 if it has no worker
  int StandbyCount() const { return static_cast<int>(standby_.size()); }
  std::vector<int> CpusOf(DeviceId device) const;  // that its threads are pinned to

 private:
  struct Worker {
    Process process;
    Channel channel;
  };
  Expected<Worker> Spawn();
  int AnswerTimeoutMs() const { return options_.answer_timeout_seconds * 1000; }
  void End(Worker& worker);
  Json AttachRequest(DeviceId device, const AttachedMemory& memory) const;

  InstanceOptions options_;
  const Exchange& exchange_;
  std::vector<int> cpus_;
  std::list<Worker> standby_;  // most recently used first; those that were never used come last
  std::map<DeviceId, Worker> attached_;
};

}  // namespace elasticmoe::runtime
