// Child processes of the coordinator: the same program again with another subcommand. Effects: fork, exec,
// kill.
#pragma once

#include <string>
#include <vector>

#include "base/error.h"
#include "runtime/fd.h"

namespace elasticmoe::runtime {

// A started child. Does not kill it when destroyed.
struct Process {
  int pid = -1;
  Fd pidfd;  // readable once it has ended

  bool Ended() const;                  // false if it still runs
  bool WaitEnd(int timeout_ms) const;  // reaps it; false if it still runs then
  void Signal(int signal) const;
};

struct SpawnOptions {
  std::vector<std::string> arguments;  // after the program's own path
  std::vector<int> inherit;            // descriptors the child gets, at the same numbers
  bool quiet = false;                  // its standard output goes nowhere
  bool own_session = true;             // a terminal's Ctrl-C goes to the coordinator alone
  bool die_with_parent = true;         // SIGKILL when the coordinator ends, however it ends
};

// Starts this same program. kUnavailable where fork or exec fails.
Expected<Process> SpawnSelf(const SpawnOptions& options);

// The cores this process may use, one hardware thread a core first.
std::vector<int> AllowedCpus();
// How many of them its control groups give it the time of (a container's quota, rounded down), at least 1.
int UsableCores();

// Raises RLIMIT_NOFILE to its hard limit and keeps freed memory in the process (substrate: large
// malloc/free is ruinous). At the start of every process.
void TuneProcess();

}  // namespace elasticmoe::runtime
