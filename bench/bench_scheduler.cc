// What a step of the scheduler costs, Plan and Complete together, and what a resize's Rebalance costs:
// `bench_scheduler`. The time is what every device waits for between two steps.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "core/schedule/scheduler.h"

namespace elasticmoe::core {
namespace {

constexpr int kContext = 1 << 20;

// `count` decoding sequences over `devices` devices of one domain, prompts of 64 tokens.
std::unique_ptr<Scheduler> Decoding(int count, int devices) {
  SchedulerOptions options;
  options.vocab = 1000;
  options.max_model_len = kContext;
  options.max_running = count;
  options.max_step_rows = std::max(count, 512);
  auto scheduler = std::make_unique<Scheduler>(options);
  std::vector<SchedulerDevice> list;
  for (int i = 0; i < devices; ++i) list.push_back({DeviceId(i), DomainId(0)});
  scheduler->SetDevices(list);
  scheduler->SetBlocks(DomainId(0), 1 << 20);
  for (int i = 0; i < count; ++i) {
    GenerationRequest request;
    request.id = RequestId(static_cast<std::uint64_t>(i + 1));
    request.prompt.assign(64, i);
    request.max_tokens = kContext;
    if (!scheduler->Add(std::move(request), 0)) std::abort();
  }
  return scheduler;
}

// False if nothing was planned.
bool Step(Scheduler& scheduler, std::vector<TokenEvent>& events, StepResult& result) {
  const StepPlan plan = scheduler.Plan(0);
  if (plan.Empty()) return false;
  result.step = plan.step;
  result.sequences.clear();
  for (const DevicePlan& device : plan.devices)
    for (const SequenceStep& step : device.sequences) {
      result.sequences.emplace_back().request = step.request;
      result.sequences.back().sampled.token = static_cast<TokenId>(plan.step.value % 1000);
    }
  events.clear();
  scheduler.Complete(result, 0, events);
  return true;
}

void BM_DecodeStep(benchmark::State& state) {
  const auto scheduler = Decoding(static_cast<int>(state.range(0)), static_cast<int>(state.range(1)));
  std::vector<TokenEvent> events;
  StepResult result;
  while (scheduler->Stats().waiting > 0) Step(*scheduler, events, result);
  for (auto _ : state)
    if (!Step(*scheduler, events, result)) state.SkipWithError("nothing to run");
  state.counters["events"] = static_cast<double>(events.size());
}
BENCHMARK(BM_DecodeStep)
    ->Args({1, 1})
    ->Args({32, 2})
    ->Args({256, 1})
    ->Args({256, 8})
    ->Args({1024, 64})
    ->Iterations(2000)
    ->Unit(benchmark::kMicrosecond);

// All sequences of one device change hands, and back.
void BM_RebalanceInsideADomain(benchmark::State& state) {
  const int count = static_cast<int>(state.range(0));
  const auto scheduler = Decoding(count, 2);
  std::vector<TokenEvent> events;
  StepResult result;
  while (scheduler->Stats().waiting > 0) Step(*scheduler, events, result);
  int leaving = 0;
  for (auto _ : state) {
    leaving = 1 - leaving;
    const SchedulerDevice devices[] = {{DeviceId(0), DomainId(0), 1.0, leaving != 0},
                                       {DeviceId(1), DomainId(0), 1.0, leaving != 1}};
    scheduler->SetDevices(devices);
    benchmark::DoNotOptimize(scheduler->Rebalance());
  }
  state.counters["moved"] = scheduler->SequencesOn(DeviceId(1 - leaving));
}
BENCHMARK(BM_RebalanceInsideADomain)->Arg(256)->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace elasticmoe::core

BENCHMARK_MAIN();
