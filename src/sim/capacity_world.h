// The world of one capacity run: engines, arrivals, the autoscaler, resizes by a strategy, faults; one loop
// over the next thing that happens. Pure. Devices here are groups of tensor-parallel devices.
#pragma once

#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "sim/capacity.h"

namespace elasticmoe::sim {

class CapacityWorld {
 public:
  // `input` without groups, and alive as long as this.
  CapacityWorld(const CapacityInput& input, core::Autoscaler policy, const core::ServingShape& shape,
                const EngineLimits& limits, int start_devices, int least_devices);
  Expected<CapacityResult> Run();

 private:
  struct Engine {
    std::unique_ptr<Instance> instance;
    bool accepts = true;
    double stopped_until = 0;
  };
  struct State {
    double first = -1, last = -1, ttft = 0, tpot = 0;
    int tokens = 0;
    Instance* owner = nullptr;
  };
  struct Pending {
    int to = 0;
    double start = 0, ready = 0, copy_s = 0;
  };

  int Size() const;  // that takes requests
  int Paid() const;
  bool Stepping() const;
  bool AllIdle() const;
  bool Drains() const;  // an old engine ends its requests
  Engine& Least();      // loaded, of those that take requests
  double Next() const;
  void MoveTo(double to);
  void Arrive();
  void FinishSteps();
  void StartSteps();
  void End(std::size_t index, bool failed);
  Status Tick();
  Status Begin(core::Decision decision);
  void Advance();
  void Finish();
  void Strike();
  void Restart(Engine& engine, double seconds);
  void LoseDevice(Engine& engine, int device);
  void AddEngine(int devices);
  void StopIntake(Engine& engine);  // what waits there goes to others
  void HandOver(RequestId request, Instance& from);
  void Sample(const core::SchedulerStats& stats);
  core::SchedulerStats Stats() const;

  const CapacityInput& input_;
  const core::StepCost cost_;
  const core::ServingShape shape_;
  const EngineLimits limits_;
  const int replica_, least_;
  core::Autoscaler policy_;
  std::vector<Engine> engines_;
  std::vector<State> states_;
  std::unique_ptr<Pending> pending_;
  std::map<std::pair<int, int>, ResizeCost> resize_cost_;
  CapacityResult result_;
  std::vector<double> ttft_, tpot_;
  std::size_t next_ = 0, next_resize_ = 0, next_fault_ = 0;
  double now_ = 0, next_tick_ = 0, gap_ = 0, last_end_ = 0;
  double waiting_tokens_ = 0;
  CapacitySample sample_;  // since the last one
};

}  // namespace elasticmoe::sim
