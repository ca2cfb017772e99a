// Ctrl-C as something to read, beside sockets and keys, while one of these exists: SIGINT does not end the
// process. Effects: the process's signal mask. One at a time, made before other threads start.
#pragma once

#include <csignal>

namespace elasticmoe::cli {

class Interrupts {
 public:
  Interrupts();
  ~Interrupts();
  Interrupts(const Interrupts&) = delete;

  int fd() const { return fd_; }  // readable when SIGINT has come
  bool Take();                    // true if it has come since the last call

 private:
  sigset_t before_;
  int fd_;
};

}  // namespace elasticmoe::cli
