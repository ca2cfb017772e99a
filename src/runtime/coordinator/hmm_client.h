// The coordinator's end of the HMM: starts one, or adopts the one that a crashed coordinator left. Blocking
// calls. Not thread-safe.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "runtime/channel.h"
#include "runtime/hmm/hmm.h"
#include "runtime/hmm/memory_map.h"
#include "runtime/process.h"

namespace elasticmoe::runtime {

// The memory of all domains: map and descriptors, as last described.
struct AttachedMemory {
  MemoryMap map;
  std::vector<Fd> fds;  // in the order of map.domains
  int FdOf(DomainId domain) const;
};

class HmmClient {
 public:
  // Adopts a running HMM with the same fingerprint; one with another is told to end. Else starts one, which
  // loads by `placement`. Returns at once, while weights are being loaded.
  static Expected<std::unique_ptr<HmmClient>> StartOrAdopt(const HmmOptions& options,
                                                           const core::Placement& placement);
  static Expected<std::unique_ptr<HmmClient>> Start(const HmmOptions& options,
                                                    const core::Placement& placement);
  // A further connection to a running HMM, e.g. for a thread of its own.
  static Expected<std::unique_ptr<HmmClient>> Connect(const std::string& socket);
  // The same, to the process `pid` alone: kUnavailable where another has taken its name since, whose memory
  // the workers have not mapped yet.
  static Expected<std::unique_ptr<HmmClient>> ConnectTo(const std::string& socket, int pid);

  // Waits until the weights are there. `progress` is called with (loaded, total) bytes some times a second.
  Status AwaitReady(const std::function<void(std::uint64_t, std::uint64_t)>& progress);

  Expected<bool> Ready(std::uint64_t& loaded_bytes, std::uint64_t& total_bytes);  // asked once

  Expected<AttachedMemory> Describe();
  Status Record(const core::Placement& placement);  // the placement that serves now
  Expected<core::Placement> Recorded();
  Expected<Message> Call(const Json& request);
  void Shutdown();  // and waits for its end

  bool adopted() const { return adopted_; }
  int pid() const { return pid_; }
  // Readable when the HMM is gone.
  int pidfd() const { return pidfd_.get(); }

 private:
  HmmClient() = default;
  Status Hello();

  Channel channel_;
  bool adopted_ = false;
  int pid_ = -1;
  Fd pidfd_;
};

}  // namespace elasticmoe::runtime
