#include "runtime/process.h"

#include <fcntl.h>
#include <hwloc.h>
#include <malloc.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <future>
#include <mutex>
#include <thread>

#include "runtime/cgroup.h"

namespace elasticmoe::runtime {

bool Process::Ended() const {
  pollfd poll_fd{pidfd.get(), POLLIN, 0};
  return ::poll(&poll_fd, 1, 0) == 1;
}

bool Process::WaitEnd(int timeout_ms) const {
  pollfd poll_fd{pidfd.get(), POLLIN, 0};
  int ready;
  do ready = ::poll(&poll_fd, 1, timeout_ms);
  while (ready < 0 && errno == EINTR);
  if (ready != 1) return false;
  ::waitpid(pid, nullptr, WNOHANG);
  return true;
}

void Process::Signal(int signal) const {
  ::syscall(SYS_pidfd_send_signal, pidfd.get(), signal, nullptr, 0);
}

namespace {

// The kernel ends a child with its parent when the thread that forked it ends, not the process: so one
// thread, which lives as long as the process, forks all.
class Spawner {
 public:
  static Spawner& Get() {
    static auto* const spawner = new Spawner;  // never ends
    return *spawner;
  }

  Expected<Process> Run(const std::function<Expected<Process>()>& spawn) {
    std::packaged_task<Expected<Process>()> task(spawn);
    auto result = task.get_future();
    {
      const std::scoped_lock lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    work_.notify_one();
    return result.get();
  }

 private:
  Spawner() {
    std::thread([this] {
      std::unique_lock lock(mutex_);
      for (;;) {
        work_.wait(lock, [this] { return !tasks_.empty(); });
        auto task = std::move(tasks_.front());
        tasks_.pop_front();
        lock.unlock();
        task();
        lock.lock();
      }
    }).detach();
  }

  std::mutex mutex_;
  std::condition_variable work_;
  std::deque<std::packaged_task<Expected<Process>()>> tasks_;
};

Expected<Process> Spawn(const SpawnOptions& options) {
  std::vector<std::string> texts{"elasticmoe"};
  texts.insert(texts.end(), options.arguments.begin(), options.arguments.end());
  std::vector<char*> argv;
  for (std::string& text : texts) argv.push_back(text.data());
  argv.push_back(nullptr);
  const int parent = ::getpid();

  const int pid = ::fork();
  if (pid < 0) return Fail(ErrorCode::kUnavailable, "starting a process: fork: {}", std::strerror(errno));
  if (pid == 0) {  // only async-signal-safe calls from here
    for (int fd : options.inherit) ::fcntl(fd, F_SETFD, 0);
    if (options.own_session) ::setsid();
    if (options.quiet)
      if (const int nowhere = ::open("/dev/null", O_WRONLY | O_CLOEXEC); nowhere >= 0)
        ::dup2(nowhere, STDOUT_FILENO);
    if (options.die_with_parent) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (::getppid() != parent) ::_exit(1);
    }
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, nullptr);
    ::execv("/proc/self/exe", argv.data());
    ::_exit(127);
  }
  Process process;
  process.pid = pid;
  process.pidfd = Fd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
  if (!process.pidfd) {
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
    return Fail(ErrorCode::kResourceExhausted, "starting a process: pidfd_open: {}; raise ulimit -n",
                std::strerror(errno));
  }
  return process;
}

}  // namespace

Expected<Process> SpawnSelf(const SpawnOptions& options) {
  return Spawner::Get().Run([&] { return Spawn(options); });
}

std::vector<int> AllowedCpus() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  ::sched_getaffinity(0, sizeof(allowed), &allowed);
  std::vector<int> first_threads, others;
  hwloc_topology_t topology;
  if (hwloc_topology_init(&topology) == 0) {
    if (hwloc_topology_load(topology) == 0) {
      const int cores = hwloc_get_nbobjs_by_type(topology, HWLOC_OBJ_CORE);
      for (int i = 0; i < cores; ++i) {
        hwloc_obj_t core = hwloc_get_obj_by_type(topology, HWLOC_OBJ_CORE, i);
        bool first = true;
        unsigned cpu;
        hwloc_bitmap_foreach_begin(cpu, core->cpuset) {
          if (CPU_ISSET(cpu, &allowed)) (first ? first_threads : others).push_back(static_cast<int>(cpu));
          first = false;
        }
        hwloc_bitmap_foreach_end();
      }
    }
    hwloc_topology_destroy(topology);
  }
  first_threads.insert(first_threads.end(), others.begin(), others.end());
  if (first_threads.empty())
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &allowed)) first_threads.push_back(cpu);
  return first_threads;
}

int UsableCores() {
  const double cores = std::min(static_cast<double>(AllowedCpus().size()), ReadCgroupLimits().cpus);
  return std::max(1, static_cast<int>(cores));
}

void TuneProcess() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < limit.rlim_max) {
    limit.rlim_cur = limit.rlim_max;
    ::setrlimit(RLIMIT_NOFILE, &limit);
  }
  ::mallopt(M_MMAP_THRESHOLD, 1 << 30);
  ::mallopt(M_TRIM_THRESHOLD, 512 << 20);
  ::mallopt(M_TOP_PAD, 16 << 20);
  ::signal(SIGPIPE, SIG_IGN);
}

}  // namespace elasticmoe::runtime
