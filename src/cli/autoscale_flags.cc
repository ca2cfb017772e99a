#include "cli/autoscale_flags.h"

#include <CLI/CLI.hpp>
#include <algorithm>

#include "runtime/process.h"
#include "sim/capacity.h"

namespace elasticmoe::cli {
namespace {

sim::ModelShape ShapeOf(const core::ModelSpec& spec) {
  constexpr double kInt8Bytes = 1 + 2.0 / 64,
                   kInt4Bytes = 0.5 + 2.0 / 64;  // a weight, with its share of a scale
  return sim::ShapeOf(spec, spec.weights == core::WeightFormat::kInt8   ? kInt8Bytes
                            : spec.weights == core::WeightFormat::kInt4 ? kInt4Bytes
                                                                        : 2);
}

}  // namespace

void AddAutoscaleFlags(CLI::App& app, AutoscaleFlags& flags) {
  app.add_option("--autoscale", flags.policy,
                 "off, static (watch and tell only), threshold (the paper's example) or slo (by forecast)")
      ->check(CLI::IsMember({"off", "static", "threshold", "slo"}))
      ->capture_default_str()
      ->group("Autoscaling");
  app.add_option("--slo-ttft", flags.slo_ttft_ms, "Limit of the time to the first token, milliseconds")
      ->check(CLI::Range(0.1, 1e7))
      ->capture_default_str()
      ->group("Autoscaling");
  app.add_option("--slo-tpot", flags.slo_tpot_ms, "Limit of the mean time per later token, milliseconds")
      ->check(CLI::Range(0.01, 1e6))
      ->capture_default_str()
      ->group("Autoscaling");
  app.add_option("--slo-attainment", flags.slo_attainment, "Share of requests that must keep both limits")
      ->check(CLI::Range(0.01, 1.0))
      ->capture_default_str()
      ->group("Autoscaling");
  app.add_option(
         "--min-devices", flags.min_devices,
         "Smallest size (largest: --max-devices); 0: without requests the server sleeps, the first one "
         "wakes it")
      ->check(CLI::Range(0, runtime::kMaxDevices))
      ->capture_default_str()
      ->group("Autoscaling");
  app.add_flag("--autoscale-observe", flags.observe, "Tell decisions, do not apply them")
      ->group("Autoscaling");
  app.add_option("--autoscale-window", flags.window_s,
                 "Seconds of the past that attainment and load are seen by")
      ->check(CLI::Range(0.25, 600.0))
      ->capture_default_str()
      ->group("Autoscaling");
  app.add_option("--autoscale-hold", flags.hold_s,
                 "Seconds for which a size that a person asked for stays; 0: until it is released")
      ->check(CLI::Range(0.0, 1e6))
      ->capture_default_str()
      ->group("Autoscaling");
  app.add_option("--autoscale-strategy", flags.strategy, "elastic; to compare with: drain, cold-restart")
      ->check(CLI::IsMember({"elastic", "drain", "cold-restart"}))
      ->capture_default_str()
      ->group("Autoscaling");
}

Expected<std::unique_ptr<runtime::Autoscaler>> MakeAutoscaler(const AutoscaleFlags& flags, int max_devices,
                                                              runtime::ReplicaSet& replicas) {
  if (flags.policy == "off") return nullptr;
  runtime::AutoscalerSettings settings;
  EM_ASSIGN_OR_RETURN(settings.policy.kind, core::ParsePolicy(flags.policy));
  settings.policy.slo = {.ttft_s = flags.slo_ttft_ms * 1e-3,
                         .tpot_s = flags.slo_tpot_ms * 1e-3,
                         .attainment = flags.slo_attainment};
  settings.policy.min_devices = flags.min_devices;
  const runtime::EngineOptions& engine = replicas.options();
  const int cores = runtime::UsableCores();
  settings.policy.max_devices =
      max_devices > 0
          ? engine.max_devices
          : std::min(engine.max_devices, std::max(engine.devices, cores / engine.threads_per_device));
  if (flags.min_devices > settings.policy.max_devices)
    return Fail(ErrorCode::kInvalidArgument, "--min-devices: {} is above --max-devices={}", flags.min_devices,
                settings.policy.max_devices);
  settings.policy.window_ns = static_cast<TimeNs>(flags.window_s * 1e9);
  // Until resizes were measured: ours waits for two steps, and for copies between domains at half of what
  // memory can do; others start an engine.
  settings.policy.resize_s = settings.policy.stopped_s = flags.strategy == "cold-restart" ? 3.0 : 0.05;
  if (flags.strategy == "elastic") settings.policy.stopped_s = 0.01;
  if (engine.domain_per_device && flags.strategy != "cold-restart")
    settings.policy.resize_s += ShapeOf(replicas.Spec()).AllBytes() / 5e9;
  settings.policy.observe = flags.observe;
  settings.strategy = flags.strategy;
  settings.hold_ns = static_cast<TimeNs>(flags.hold_s * 1e9);
  // Until steps were measured, a core does what the simulator's profile says.
  EM_ASSIGN_OR_RETURN(sim::ClusterProfile core, sim::ProfileOf("cpu-core"));
  core.flops *= engine.threads_per_device;
  core.memory_bytes_s *= engine.threads_per_device;
  return runtime::Autoscaler::Make(settings, replicas.Shape(), sim::CostOf(core, ShapeOf(replicas.Spec())),
                                   replicas);
}

}  // namespace elasticmoe::cli
