#include "cli/interrupt.h"

#include <sys/signalfd.h>
#include <unistd.h>

#include "base/check.h"

namespace elasticmoe::cli {

Interrupts::Interrupts() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGINT);
  EM_CHECK(pthread_sigmask(SIG_BLOCK, &set, &before_) == 0);
  fd_ = ::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
  EM_CHECK(fd_ >= 0, "signalfd: errno={}", errno);
}

Interrupts::~Interrupts() {
  Take();  // one that has come is answered: it must not end the process now
  ::close(fd_);
  pthread_sigmask(SIG_SETMASK, &before_, nullptr);
}

bool Interrupts::Take() {
  signalfd_siginfo info;
  bool any = false;
  while (::read(fd_, &info, sizeof info) == sizeof info) any = true;
  return any;
}

}  // namespace elasticmoe::cli
