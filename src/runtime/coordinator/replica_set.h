// The engines of a server: one, while it resizes by itself; several, while one replaces another or replicas
// stand side by side. Requests go to the least loaded one that accepts. The strategies that others resize by
// are here, so that they can be measured against ours on the same engine:
//
//   elastic       ours, by the engine's own controller (resize_controller.h)
//   drain         the paper's switch-over, there too: new requests wait until the running ones have ended
//   cold-restart  the engine ends, and with it every request; another one is started at the new size
//   extravagant   another engine is loaded beside the old one, on other cores where there are some, then
//   takes over colocated     the same on the same cores, with the KV memory shared between both while both
//   are there horizontal    a replica of the present size is loaded and stays; the other way, one is drained
//   and ends
//
// At zero devices the engine sleeps: its workers have given their memory up, weights and KV stay with the
// HMM. The first request wakes it, to one device.
//
// Thread-safe.
#pragma once

#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "runtime/coordinator/autoscaler.h"
#include "runtime/coordinator/cost_meter.h"
#include "runtime/coordinator/elastic_engine.h"
#include "runtime/coordinator/resize_controller.h"
#include "runtime/coordinator/serving_log.h"

namespace elasticmoe::runtime {

class ReplicaSet : public Engine, public ScalingTarget {
 public:
  using Progress = std::function<void(std::uint64_t, std::uint64_t)>;  // loaded and all bytes

  static Expected<std::unique_ptr<ReplicaSet>> Start(const EngineOptions& options, const Progress& progress);
  ~ReplicaSet() override;

  Status Submit(core::GenerationRequest request, Sink sink) override;
  void Cancel(RequestId request) override;
  EngineStats Stats() const override;  // sums; devices of all engines
  const core::ModelSpec& Spec() const override { return spec_; }
  int MaxModelLen() const override { return max_model_len_; }
  void StopAccepting();

  // Starts an operation, or finds it again by its id. Errors as ResizeController::Start's; kInvalidArgument
  // names an unknown strategy or a size that the strategy cannot have. This one is a person's: an autoscaler
  // is told.
  Expected<core::ResizeReport> Resize(core::ResizeCommand command);

  // For the autoscaler.
  ScalingSnapshot Snapshot() override;
  Status ResizeTo(int devices, const std::string& strategy) override;
  std::optional<core::BalanceOutlook> Balance() override;
  Status Rebalance() override;
  // Exchanges experts until the devices' loads are even; `operation` names it. Errors as Resize's.
  Expected<core::ResizeReport> StartRebalance(std::string operation = "");
  double ExpertImbalance() const;  // by the rows since the last commit; 1 = even
  core::ServingShape Shape() const;

  Expected<core::ResizeReport> CancelResize(const std::string& operation);
  std::optional<core::ResizeReport> FindResize(const std::string& operation) const;
  std::optional<core::ResizeReport> RunningResize() const;
  std::optional<core::ResizeReport> AwaitResize(const std::string& operation, TimeNs timeout_ns) const;

  // As a Chrome trace; nothing where the operation is unknown or forgotten.
  std::optional<Json> TraceOf(const std::string& operation) const;
  // Called with each operation's last report, on some thread; it must not call back. Before requests come.
  void SetResizeObserver(std::function<void(const core::ResizeReport&)> observer);

  int Devices() const;   // of all engines
  int Replicas() const;  // engines that accept requests
  // The engine that serves (the oldest of several) and its controller; null while it is restarted. Keeps them
  // alive for the caller.
  struct Replica {
    std::unique_ptr<ElasticEngine> engine;
    std::unique_ptr<ResizeController> controller;
    ~Replica();
  };
  std::shared_ptr<Replica> Primary() const;
  const EngineOptions& options() const { return options_; }

 private:
  // What the routing knows of a replica.
  struct Member {
    std::shared_ptr<Replica> replica;
    bool accepts = true;
    int requests = 0;
    std::optional<TimeNs> first_token;
  };
  using MemberId = std::uint64_t;

  explicit ReplicaSet(EngineOptions options)
      : options_(std::move(options)), cost_(options_.threads_per_device, EnergyCounters::Open()) {}

  Expected<core::ResizeReport> StartResize(core::ResizeCommand command);
  Status Sleep(core::ResizeReport& report);
  Status Wake(core::ResizeReport& report, int devices);
  // By the engine's own controller, as a part of the operation that runs here.
  Status ResizeWithin(const core::ResizeReport& report, int devices);
  void WakeForRequests();
  void Account() const;  // the devices that are paid for, from now on

  void Loop(const std::stop_token& stop);
  Status Run(core::ResizeReport& report);  // on the thread
  Status ColdRestart(core::ResizeReport& report, int devices);
  Status ReplaceBeside(core::ResizeReport& report, int devices, bool colocated);
  Status Horizontal(core::ResizeReport& report, int devices);
  std::shared_ptr<Replica> Wrap(std::unique_ptr<ElasticEngine> engine);
  Expected<MemberId> Add(EngineOptions options);
  void Serves(core::ResizeReport& report);  // the new size does, from now on
  void AwaitFirstToken(core::ResizeReport& report, MemberId member);
  void DrainAndEnd(MemberId member);
  void Note(MemberId member, const core::TokenEvent& event);
  void Publish(const core::ResizeReport& report);
  void Ended(const core::ResizeReport& report);
  Status Traced(std::string name, const std::function<Status()>& task);
  std::vector<MemberId> Accepting() const;
  EngineOptions Beside(int devices, bool other_cores);

  EngineOptions options_;
  mutable CostMeter cost_;
  ServingLog log_;
  std::atomic<TimeNs> commanded_{-1};             // when a person last asked for a size
  std::atomic<std::uint64_t> next_operation_{1};  // of those that nobody else has named
  ResizeTrace trace_;
  std::mutex observer_mutex_;
  std::function<void(const core::ResizeReport&)> observer_;
  core::ModelSpec spec_;
  int max_model_len_ = 0;

  std::mutex start_mutex_;    // whether an operation runs, and starting one, are one; before mutex_
  mutable std::mutex mutex_;  // guards what follows
  mutable std::condition_variable_any changed_;
  std::map<MemberId, Member> members_;
  std::map<RequestId, MemberId> routes_;
  MemberId next_member_ = 1;
  bool stopping_ = false;
  std::deque<core::ResizeReport> reports_;  // of the strategies here, the running one last
  std::optional<std::string> running_;
  // An operation whose new member has given no token yet; it may have ended.
  std::optional<std::pair<std::string, MemberId>> awaits_token_;
  std::uint64_t refused_ = 0, failed_ = 0;
  TimeNs last_token_ = 0, longest_gap_ = 0;
  int beside_ = 0;  // engines that were started beside another one
  std::jthread thread_;
};

}  // namespace elasticmoe::runtime
