// A server of our own for the benchmarks: `elasticmoe serve` as a child process on a free port, and what it
// takes of the machine. Effects: fork, sockets, /proc.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/ids.h"
#include "runtime/process.h"

namespace elasticmoe::cli {

class ServerChild {
 public:
  // Starts `serve` with these arguments and waits until it answers /health. kUnavailable when it ends before;
  // its own lines are on stderr.
  static Expected<std::unique_ptr<ServerChild>> Start(std::vector<std::string> arguments, TimeNs timeout_ns);
  ~ServerChild();  // SIGTERM, then SIGKILL

  const std::string& url() const { return url_; }
  int pid() const { return process_.pid; }

 private:
  runtime::Process process_;
  std::string url_;
};

// What a process and all its descendants hold.
struct TreeUsage {
  std::uint64_t memory_bytes = 0;  // shared memory objects once each, and the processes' own
  int descriptors = 0;
  int mappings = 0;
  int processes = 0;
};
TreeUsage UsageOfTree(int root_pid);

struct MemorySample {
  TimeNs at = 0;  // monotonic
  std::uint64_t bytes = 0;
};

// Samples the memory of a process tree on a thread of its own, until it is stopped.
class MemorySampler {
 public:
  explicit MemorySampler(int root_pid);
  ~MemorySampler();
  std::vector<MemorySample> Stop();

 private:
  std::vector<MemorySample> samples_;  // the thread's, until it has ended
  std::jthread thread_;
};

}  // namespace elasticmoe::cli
