#include "runtime/coordinator/instance_manager.h"

#include <signal.h>

#include <algorithm>

#include "base/log.h"

namespace elasticmoe::runtime {
InstanceManager::InstanceManager(InstanceOptions options, const Exchange& exchange)
    : options_(std::move(options)), exchange_(exchange), cpus_(AllowedCpus()) {}

InstanceManager::~InstanceManager() {
  // The channel's end is the worker's end; one that is stuck is killed.
  std::list<Worker> all = std::move(standby_);
  for (auto& [device, worker] : attached_) all.push_back(std::move(worker));
  for (Worker& worker : all) worker.channel.Close();
  for (Worker& worker : all) End(worker);
}

Expected<InstanceManager::Worker> InstanceManager::Spawn() {
  EM_ASSIGN_OR_RETURN(auto ends, Channel::Pair());
  SpawnOptions spawn;
  spawn.inherit = {ends.second.get(), exchange_.fd()};
  spawn.arguments = {"worker",
                     "--kernels",
                     options_.kernels,
                     "--weights",
                     std::string(core::NameOf(options_.weights)),
                     "--control-fd",
                     std::to_string(ends.second.get()),
                     "--exchange-fd",
                     std::to_string(exchange_.fd()),
                     "--log-level",
                     options_.log_level};
  if (options_.expert_table == ExpertTableKind::kRemap) spawn.arguments.emplace_back("--remap-experts");
  Worker worker;
  EM_ASSIGN_OR_RETURN(worker.process, SpawnSelf(spawn));
  worker.channel = std::move(ends.first);
  EM_RETURN_IF_ERROR(worker.channel.Send(options_.config));  // before any request; it has no answer
  return worker;
}

Status InstanceManager::AddStandby() {
  EM_ASSIGN_OR_RETURN(Worker worker, Spawn());
  standby_.push_back(std::move(worker));
  return {};
}

Status InstanceManager::FillStandby() {
  while (StandbyCount() < options_.standby) EM_RETURN_IF_ERROR(AddStandby());
  return {};
}

std::vector<int> InstanceManager::CpusOf(DeviceId device) const {
  std::vector<int> cpus;
  for (int i = 0; i < options_.threads_per_device; ++i)
    cpus.push_back(
        cpus_[static_cast<std::size_t>(options_.first_cpu + device.value * options_.threads_per_device + i) %
              cpus_.size()]);
  return cpus;
}

Json InstanceManager::AttachRequest(DeviceId device, const AttachedMemory& memory) const {
  return {
      {"op", "attach"}, {"device", device.value}, {"cpus", CpusOf(device)}, {"memory", ToJson(memory.map)}};
}

Status InstanceManager::Reattach(DeviceId device, const AttachedMemory& memory) {
  const auto at = attached_.find(device);
  const int fd = memory.FdOf(memory.map.DomainOf(device));
  if (at == attached_.end() || fd < 0)
    return Fail(ErrorCode::kNotFound, "attaching device {} again: no worker or no domain", device);
  EM_RETURN_IF_ERROR(at->second.channel.Call(AttachRequest(device, memory), AnswerTimeoutMs(), {fd}));
  return {};
}

Status InstanceManager::Attach(DeviceId device, const AttachedMemory& memory) {
  attached_.erase(device);
  const Json request = AttachRequest(device, memory);
  const int fd = memory.FdOf(memory.map.DomainOf(device));
  if (fd < 0) return Fail(ErrorCode::kNotFound, "attaching device {}: its domain is not open", device);
  Status failure = Fail(ErrorCode::kUnavailable, "attaching device {}: no worker", device);
  for (int attempt = 0; attempt < options_.worker_attempts; ++attempt) {
    Worker worker;
    if (standby_.empty()) {
      EM_ASSIGN_OR_RETURN(worker, Spawn());
    } else {
      worker = std::move(standby_.front());
      standby_.pop_front();
    }
    auto answer = worker.channel.Call(request, AnswerTimeoutMs(), {fd});
    if (answer) {
      LogInfo("device {} attached to worker {} in {:.1f} ms", device, worker.process.pid,
              static_cast<double>(answer->body.value("ns", std::int64_t{0})) / 1e6);
      attached_[device] = std::move(worker);
      return {};
    }
    failure = tl::unexpected<Error>(answer.error());
    worker.process.Signal(SIGKILL);
    worker.process.WaitEnd(2000);
    if (answer.error().code != ErrorCode::kUnavailable) break;  // the worker said no: another will, too
  }
  return failure;
}

Status InstanceManager::Prepare(const std::vector<DeviceId>& devices, std::uint64_t epoch,
                                const MemoryMap& map) {
  const Json request = {{"op", "prepare"}, {"epoch", epoch}, {"memory", ToJson(map)}};
  for (const DeviceId device : devices)
    if (attached_.count(device) == 0)
      return Fail(ErrorCode::kUnavailable, "preparing epoch {}: device {} has no worker", epoch, device);
  Status status;
  std::vector<DeviceId> asked;
  for (const DeviceId device : devices) {
    if (Status sent = attached_.at(device).channel.Send(request); sent)
      asked.push_back(device);
    else if (status)
      status = std::move(sent);
  }
  // Every answer is taken, also where one could not be asked, so that no later call reads an answer of this
  // one.
  for (const DeviceId device : asked) {
    Worker& worker = attached_.at(device);
    auto answer = worker.channel.Receive(AnswerTimeoutMs());
    if (!answer) worker.process.Signal(SIGKILL);  // gone, or silent for too long: it might answer yet
    Status one = answer ? StatusOf(answer->body) : tl::unexpected<Error>(answer.error());
    if (!one && status) status = std::move(one);
  }
  return status;
}

Status InstanceManager::SetKvChunks(const MemoryMap& map, DomainId id) {
  const DomainMap* domain = map.Find(id);
  if (domain == nullptr) return Fail(ErrorCode::kNotFound, "sizing KV: domain={} is not open", id);
  Status status;
  for (auto& [device, worker] : attached_) {
    if (map.DomainOf(device) != id) continue;
    auto answer =
        worker.channel.Call({{"op", "set_kv"}, {"kv_chunks", domain->kv_chunks}}, AnswerTimeoutMs());
    if (answer) continue;
    if (answer.error().code == ErrorCode::kDeadlineExceeded) worker.process.Signal(SIGKILL);
    if (status) status = tl::unexpected<Error>(std::move(answer.error()));
  }
  return status;
}

void InstanceManager::Quiesce(const std::vector<DeviceId>& devices) {
  for (const DeviceId device : devices) {
    const auto at = attached_.find(device);
    if (at == attached_.end() || at->second.process.Ended()) continue;
    if (auto answer = at->second.channel.Call({{"op", "ping"}}, AnswerTimeoutMs()); !answer) {
      LogWarn("worker {} of device {} does not answer: it is killed", at->second.process.pid, device);
      at->second.process.Signal(SIGKILL);
      at->second.process.WaitEnd(2000);
    }
  }
}

void InstanceManager::Kill(DeviceId device) {
  const auto at = attached_.find(device);
  if (at == attached_.end()) return;
  at->second.process.Signal(SIGKILL);
  at->second.process.WaitEnd(2000);
}

void InstanceManager::End(Worker& worker) {
  worker.channel.Close();
  if (worker.process.WaitEnd(2000)) return;
  worker.process.Signal(SIGKILL);
  worker.process.WaitEnd(2000);
}

void InstanceManager::Retire(DeviceId device) {
  const auto at = attached_.find(device);
  if (at == attached_.end()) return;
  Worker worker = std::move(at->second);
  attached_.erase(at);
  if (auto detached = worker.channel.Call({{"op", "detach"}}, AnswerTimeoutMs()); !detached)
    End(worker);
  else
    standby_.push_front(std::move(worker));
  while (StandbyCount() > std::max(options_.standby, options_.standby_limit)) {
    End(standby_.back());
    standby_.pop_back();
  }
}

std::vector<DeviceId> InstanceManager::TakeDead() {
  std::erase_if(standby_, [](const Worker& worker) {
    if (!worker.process.Ended()) return false;
    worker.process.WaitEnd(0);
    LogWarn("standby worker {} ended", worker.process.pid);
    return true;
  });
  std::vector<DeviceId> dead;
  for (auto at = attached_.begin(); at != attached_.end();) {
    if (at->second.process.Ended()) {
      at->second.process.WaitEnd(0);
      dead.push_back(at->first);
      at = attached_.erase(at);
    } else {
      ++at;
    }
  }
  return dead;
}

std::vector<int> InstanceManager::AttachedPidfds() const {
  std::vector<int> fds;
  for (const auto& [device, worker] : attached_) fds.push_back(worker.process.pidfd.get());
  return fds;
}

std::vector<int> InstanceManager::StandbyPidfds() const {
  std::vector<int> fds;
  for (const Worker& worker : standby_) fds.push_back(worker.process.pidfd.get());
  return fds;
}

std::vector<DeviceId> InstanceManager::Attached() const {
  std::vector<DeviceId> devices;
  for (const auto& [device, worker] : attached_) devices.push_back(device);
  return devices;
}

int InstanceManager::PidOf(DeviceId device) const {
  const auto at = attached_.find(device);
  return at == attached_.end() ? -1 : at->second.process.pid;
}

}  // namespace elasticmoe::runtime
