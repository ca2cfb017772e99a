// Weights between memory domains, while requests are served: domains are opened, experts copied from the
// domains that hold them, and dropped where they are not wanted any more. In small pieces over a connection
// of its own, so that nobody waits long for the HMM, and, if asked for, at a limited rate. Nothing is ever
// read from the checkpoint. Blocking; not thread-safe. All of it may be done twice.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/placement/planner.h"
#include "runtime/coordinator/hmm_client.h"

namespace elasticmoe::runtime {

struct CopyTotals {
  std::uint64_t bytes = 0;
  std::int64_t copy_ns = 0;     // spent copying, by the HMM's clock
  std::int64_t elapsed_ns = 0;  // with calls and pauses
};

class PeerCopies {
 public:
  // `bytes_per_second` 0 = as fast as it goes.
  PeerCopies(std::string hmm_socket, std::uint64_t bytes_per_second);

  // Those of devices that compute nothing yet copy from now on; none: all cores do.
  void UseCpus(std::vector<int> cpus) { cpus_ = std::move(cpus); }

  Status OpenDomain(DomainId domain);  // with the shared weights
  // The kCopy moves among `moves`, sources in turn. A device's domain has its number.
  Status CopyExperts(std::span<const core::ExpertMove> moves);
  Status DropExperts(std::span<const core::ExpertDrop> drops);
  Status CloseDomain(DomainId domain);  // one that is not open is closed

  // Makes the domains of `map` those of `placement`'s members with exactly their experts: after a crash in
  // the middle of a resize. Every expert must be in some domain.
  Status Restore(const MemoryMap& map, const core::Placement& placement);

  const CopyTotals& totals() const { return totals_; }

 private:
  Expected<Json> Call(const Json& request);
  Status Copy(Json request);  // and pauses as the rate asks for

  std::string socket_;
  std::uint64_t bytes_per_second_;
  std::vector<int> cpus_;
  std::unique_ptr<HmmClient> hmm_;
  CopyTotals totals_;
};

}  // namespace elasticmoe::runtime
