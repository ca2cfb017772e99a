#include "sim/simulate.h"

#include "base/check.h"
#include "sim/cluster.h"

namespace elasticmoe::sim {

SimulationReport Simulate(const SimulationOptions& options) {
  SimulationReport report;
  for (int i = 0; i < options.seeds; ++i) {
    const std::uint64_t seed = options.first_seed + static_cast<std::uint64_t>(i);
    const CheckNote note(fmt::format("simulation seed={}", seed));
    Trace trace(options.trace);
    std::string failure = Cluster(seed, trace, report).Run();
    ++report.seeds;
    report.hash = HashCombine(report.hash, trace.hash());
    report.trace = trace.lines();
    if (failure.empty()) continue;
    if (report.failed++ == 0) {
      report.failed_seed = seed;
      report.failure = std::move(failure);
    }
    if (options.stop_at_failure) break;
  }
  return report;
}

}  // namespace elasticmoe::sim
