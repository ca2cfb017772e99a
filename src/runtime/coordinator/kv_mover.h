// Copies the KV blocks of sequences that change their memory domain, on a thread and a connection of its own,
// while the devices go on with their steps. Thread-safe.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "base/json.h"
#include "core/schedule/scheduler.h"

namespace elasticmoe::runtime {

// {"op":"copy_kv"} of the HMM's protocol.
Json CopyKvRequest(std::span<const core::KvCopy> copies);

class KvMover {
 public:
  struct Done {
    RequestId request;
    bool copied = false;  // false: the copies failed, or the memory that they were for is gone
  };

  // `hmm_pid`: the HMM whose memory the workers have mapped. `notify` is called on the mover's thread
  // whenever something is done; it must not call back.
  KvMover(std::string hmm_socket, int hmm_pid, std::function<void()> notify);
  ~KvMover();  // what is under way is given up

  // The copies are between blocks of the HMM that this follows: they fail where it has ended, also if another
  // answers by its name. Not blocking.
  void Start(RequestId request, std::vector<core::KvCopy> copies);
  // Another HMM takes over: what was started before fails, and no block of it is written any more once this
  // returns.
  void Follow(int hmm_pid);

  std::vector<Done> TakeDone();
  bool AnythingDone() const;
  std::size_t Pending() const;  // started and not yet taken

 private:
  struct Job {
    RequestId request;
    std::vector<core::KvCopy> copies;
    int hmm_pid = -1;
  };
  void Loop(const std::stop_token& stop);

  std::string socket_;
  std::function<void()> notify_;
  mutable std::mutex mutex_;  // guards what follows
  std::condition_variable_any work_;
  std::condition_variable idle_;
  std::deque<Job> jobs_;
  std::vector<Done> done_;
  std::size_t pending_ = 0;
  int hmm_pid_;
  bool copying_ = false;
  std::jthread thread_;
};

}  // namespace elasticmoe::runtime
