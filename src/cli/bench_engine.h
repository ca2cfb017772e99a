// One engine as `serve` starts it (this process schedules, the devices and the memory daemon are processes of
// their own) with no HTTP before it, and beside it the forward pass alone on the same weights: the two sides
// that `bench prefill` and `bench decode` time. Blocking; not thread-safe.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "cli/bench_forward.h"
#include "cli/bench_report.h"
#include "cli/engine_flags.h"

namespace elasticmoe::cli {

using Sequences = std::vector<std::vector<TokenId>>;

struct Timed {
  double seconds = 0;
  Sequences generated;  // by SamplingOf each; after a prefill one token
};

class EngineBench {
 public:
  struct Options {
    EngineFlags engine;
    int sequences = 1;    // most at a time
    int tokens_each = 1;  // most of a sequence, prompt and generated
  };
  // Starts the engine, then measures this machine's limits with as many threads as the devices have.
  static Expected<std::unique_ptr<EngineBench>> Start(Options options);
  ~EngineBench();

  // Prompts of random ids, others for each seed.
  Sequences Prompts(int sequences, int tokens, std::uint64_t seed) const;

  // From the prompt to the token that follows it.
  Expected<Timed> PrefillEngine(const std::vector<TokenId>& prompt);
  Timed PrefillAlone(const std::vector<TokenId>& prompt, Work& work);

  // `steps` steps of all sequences at once, after their prompts were taken in (not timed).
  Expected<Timed> DecodeEngine(const Sequences& prompts, int steps);
  Timed DecodeAlone(const Sequences& prompts, int steps, Work& work);

  const MachineLimits& limits() const { return limits_; }
  // Measures them again and keeps the better: what else runs on the machine, and its clock, change.
  void MeasureLimitsAgain();
  std::string About() const;  // model, devices and threads

 private:
  struct Window;
  EngineBench() = default;
  void FillPrompts(const Sequences& prompts, std::vector<TokenId>& next);
  Expected<std::shared_ptr<Window>> Submit(const Sequences& prompts, int steps, int max_tokens);

  Options options_;
  std::unique_ptr<runtime::ElasticEngine> engine_;
  const compute::Kernels* kernels_ = nullptr;
  std::unique_ptr<ForwardAlone> alone_;
  std::optional<compute::ReadProbe> probe_;
  MachineLimits limits_;
  std::uint64_t next_request_ = 1;
};

}  // namespace elasticmoe::cli
