#include "runtime/worker/worker.h"

#include <poll.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <thread>

#include "base/clock.h"
#include "base/log.h"
#include "model/checkpoint.h"
#include "runtime/channel.h"
#include "runtime/worker/device.h"

namespace elasticmoe::runtime {
namespace {

constexpr std::int64_t kIdleSleepNs = 500'000'000;  // an idle worker wakes twice a second

// Two threads: the step thread (which the Device lives on) and the control thread. Control work that touches
// what steps read runs on the step thread between steps, as a task.
class Worker {
 public:
  Worker(core::ModelSpec spec, const compute::Kernels& kernels, ExpertTableKind expert_table, Channel control,
         Exchange exchange)
      : spec_(std::move(spec)),
        kernels_(kernels),
        expert_table_(expert_table),
        control_(std::move(control)),
        exchange_(std::move(exchange)) {}

  int Run() {
    std::jthread steps([this](std::stop_token stop) { StepLoop(stop); });
    for (;;) {
      auto message = control_.Receive();
      if (!message) break;
      Expected<Json> answer = Fail(ErrorCode::kInternal, "no answer");
      // What touches nothing that a running step reads: no step waits for it, nor it for a step.
      const std::string op = message->body.value("op", "");
      if (op == "prepare" || op == "set_kv")
        answer = Handle(*message);
      else
        Execute([&] { answer = Handle(*message); });
      // For ps and top.
      ::prctl(PR_SET_NAME, device_ ? fmt::format("elasticmoe-w{}", device_->id()).c_str() : "elasticmoe-w");
      if (!control_.Send(answer ? *answer : ErrorBody(answer.error()))) break;
    }
    // The coordinator is gone: nobody waits for the step that may be running.
    ::_exit(0);
  }

 private:
  // Runs `task` on the step thread, between two steps.
  void Execute(const std::function<void()>& task) {
    std::unique_lock lock(mutex_);
    task_ = &task;
    has_task_.store(true, std::memory_order_release);
    // The step thread may be about to sleep: woken again until it has seen the task.
    do Word().WakeAll();
    while (!done_.wait_for(lock, std::chrono::milliseconds(1), [&] { return task_ == nullptr; }));
  }

  void RunTask() {
    const std::scoped_lock lock(mutex_);
    if (task_ == nullptr) return;
    (*task_)();
    task_ = nullptr;
    has_task_.store(false, std::memory_order_release);
    done_.notify_one();
  }

  // What the step thread sleeps on: a standby must not wake with each step.
  SharedWord& Word() { return device_ ? exchange_.device(device_->id().value).go : standby_; }

  void StepLoop(const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      const bool woken = WaitFor(
          Word(), {device_ ? exchange_.header().spin : 0},
          [&](std::uint32_t value) { return device_ && value != seen_; },
          [&] { return has_task_.load(std::memory_order_acquire); }, kIdleSleepNs);
      if (has_task_.load(std::memory_order_acquire)) {
        RunTask();
        continue;
      }
      if (!woken) continue;
      seen_ = Word().value.load(std::memory_order_acquire);
      device_->RunStep(seen_);
    }
  }

  Expected<Json> Handle(Message& message) {
    try {
      const Json& request = message.body;
      const std::string op = request.at("op").get<std::string>();
      const std::int64_t start = Now();
      if (op == "ping") return Json{{"pid", ::getpid()}};
      if (op == "attach") {
        EM_ASSIGN_OR_RETURN(const MemoryMap map, MemoryMapFromJson(request.at("memory")));
        if (message.fds.size() != 1)
          return Fail(ErrorCode::kInvalidArgument, "attaching: descriptors={}", message.fds.size());
        const DeviceId id(request.at("device").get<int>());
        if (!device_ || device_->id() != id)
          device_.emplace(id, spec_, kernels_, request.at("cpus").get<std::vector<int>>(), expert_table_,
                          exchange_);
        EM_RETURN_IF_ERROR(device_->Attach(map, std::move(message.fds[0])));
        seen_ = Word().value.load(std::memory_order_acquire);  // steps announced before are not for it
        return Json{{"ns", Now() - start}};
      }
      if (op == "detach") {  // back to standby: no memory, no device
        device_.reset();
        return Json::object();
      }
      if (!device_) return Fail(ErrorCode::kFailedPrecondition, "{}: this worker is not attached", op);
      if (op == "prepare") {
        EM_ASSIGN_OR_RETURN(const MemoryMap map, MemoryMapFromJson(request.at("memory")));
        EM_RETURN_IF_ERROR(device_->Prepare(map, request.at("epoch").get<std::uint64_t>()));
        return Json{{"ns", Now() - start}};
      }
      if (op == "set_kv") {
        EM_RETURN_IF_ERROR(device_->SetKvChunks(request.at("kv_chunks").get<std::vector<std::uint64_t>>()));
        return Json::object();
      }
      return Fail(ErrorCode::kInvalidArgument, "reading a request to a worker: op={} is unknown", op);
    } catch (const nlohmann::json::exception& e) {
      return Fail(ErrorCode::kInvalidArgument, "reading a request to a worker: {}", e.what());
    }
  }

  core::ModelSpec spec_;
  const compute::Kernels& kernels_;
  ExpertTableKind expert_table_;
  Channel control_;
  Exchange exchange_;
  std::optional<Device> device_;
  SharedWord standby_{};
  std::uint32_t seen_ = 0;  // last step looked at

  std::mutex mutex_;
  std::condition_variable done_;
  const std::function<void()>* task_ = nullptr;
  std::atomic<bool> has_task_{false};
};

}  // namespace

int RunWorker(const WorkerOptions& options) {
  ::prctl(PR_SET_NAME, "elasticmoe-w");
  const auto fail = [](const Error& error) {
    LogError("{}", error.message);
    return 1;
  };
  Channel control{Fd(options.control_fd)};
  auto config = control.Receive();
  if (!config) return fail(config.error());
  auto spec = model::SpecOf(config->body);
  if (!spec) return fail(spec.error());
  spec->weights = options.weights;
  auto kernels = compute::FindKernels(options.kernels);
  if (!kernels) return fail(kernels.error());
  auto exchange = Exchange::Attach(options.exchange_fd);
  if (!exchange) return fail(exchange.error());
  Worker worker(std::move(*spec), **kernels, options.expert_table, std::move(control), std::move(*exchange));
  return worker.Run();
}

}  // namespace elasticmoe::runtime
