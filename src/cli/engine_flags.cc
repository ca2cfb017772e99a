#include "cli/engine_flags.h"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>

#include "base/log.h"
#include "runtime/process.h"

namespace elasticmoe::cli {
namespace {

// KV of a device where nothing is said: a sixteenth of the machine's memory over all of max-devices, within
// these bounds.
constexpr std::size_t kLeastKv = std::size_t{64} << 20;
constexpr std::size_t kMostKv = std::size_t{1} << 30;

Expected<runtime::PageKind> ParsePages(const std::string& text) {
  if (text == "auto") return runtime::BestPageKind();
  if (text == "thp") return runtime::PageKind::kTransparentHuge;
  if (text == "hugetlb") return runtime::PageKind::kHugetlb;
  if (text == "small") return runtime::PageKind::kSmall;
  return Fail(ErrorCode::kInvalidArgument, "--pages: {} is none of auto, thp, hugetlb, small", text);
}

void DrawProgress(std::uint64_t loaded, std::uint64_t total) {
  if (isatty(STDERR_FILENO) == 0 || total == 0) return;
  constexpr int kWidth = 32;
  const int done = static_cast<int>(loaded * kWidth / total);
  std::string bar(static_cast<std::size_t>(done), '#');
  bar.resize(kWidth, '.');
  std::fprintf(stderr, "\rloading [%s] %3d %%  %.1f / %.1f MiB", bar.c_str(),
               static_cast<int>(loaded * 100 / total), static_cast<double>(loaded) / (1 << 20),
               static_cast<double>(total) / (1 << 20));
  if (loaded == total) std::fprintf(stderr, "\r\033[K");
  std::fflush(stderr);
}

Expected<runtime::EngineOptions> CompleteOptions(EngineFlags flags, const std::string& name) {
  runtime::EngineOptions& o = flags.options;
  const int cores = runtime::UsableCores();
  if (flags.devices == 0) flags.devices = std::max(2, cores / o.threads_per_device);
  if (flags.max_devices == 0) flags.max_devices = std::max({8, cores / o.threads_per_device, flags.devices});
  o.devices = std::min(flags.devices, runtime::kMaxDevices);
  o.max_devices = std::min(flags.max_devices, runtime::kMaxDevices);
  if (o.devices > o.max_devices)
    return Fail(ErrorCode::kInvalidArgument, "--devices: {} is above --max-devices={}", o.devices,
                o.max_devices);
  if (o.devices * o.threads_per_device > std::max(cores, 2))
    LogWarn(
        "{} devices of {} threads are more than the {} cores that this process may use: they wait for each "
        "other; lower --devices or --threads-per-device",
        o.devices, o.threads_per_device, cores);
  EM_ASSIGN_OR_RETURN(o.pages, ParsePages(flags.pages));
  if (flags.expert_table == "remap") o.expert_table = runtime::ExpertTableKind::kRemap;
  if (o.kv_memory_bytes == 0)
    // Of all memory, not of what is free now: a restarted server must ask for what the one before asked for.
    o.kv_memory_bytes =
        std::clamp(runtime::TotalMemory() / 16 / static_cast<std::size_t>(o.max_devices), kLeastKv, kMostKv);
  o.hmm_socket = HmmSocketOf(name);
  return o;
}

}  // namespace

std::string HmmSocketOf(const std::string& name) {
  return fmt::format("elasticmoe/{}/{}", ::geteuid(), name);
}

void AddWeightsFlag(CLI::App& app, core::WeightFormat& weights) {
  app.add_option_function<std::string>(
         "--weights",
         [&weights](const std::string& name) {
           const auto format = core::WeightFormatOf(name);
           if (!format) throw CLI::ValidationError("--weights", format.error().message);
           weights = *format;
         },
         "How matrices are kept and multiplied: bf16, int8 or int4 (groups of 64 share a scale)")
      ->default_str(std::string(core::NameOf(weights)));
}

void AddEngineFlags(CLI::App& app, EngineFlags& flags) {
  runtime::EngineOptions& o = flags.options;
  const auto bytes = CLI::AsSizeValue(false);
  app.add_option("model", o.model,
                 "Hugging Face model directory (config.json, *.safetensors, tokenizer.json), or a .gguf file")
      ->required();
  app.add_option("--devices", flags.devices,
                 "Devices that share the experts, each a process (default: one a core, at least 2)")
      ->take_last()
      ->check(CLI::Range(1, runtime::kMaxDevices));
  app.add_option("--max-devices", flags.max_devices,
                 "Devices the server may grow to (default: what the machine holds)")
      ->check(CLI::Range(1, runtime::kMaxDevices));
  app.add_option("--threads-per-device,--threads", o.threads_per_device, "Pinned threads of a device")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app.add_flag("--domain-per-device", o.domain_per_device,
               "A memory domain a device: experts are copied between devices, as on accelerators");
  app.add_option(
         "--isa,--kernels", o.kernels,
         "Instruction set: auto (the best this machine has), amxbf16, avx512bf16, avx512vnni, avx512, "
         "avx2 or reference (float32)")
      ->capture_default_str();
  AddWeightsFlag(app, o.weights);
  app.add_option(
         "--kv-memory", o.kv_memory_bytes,
         "KV cache of a device, e.g. 512MiB (default: a share of the machine's memory, 64MiB to 1GiB)")
      ->transform(bytes);
  app.add_option("--device-memory", o.device_memory_bytes,
                 "Budget of a device for weights and KV, e.g. 4GiB (default: the machine's)")
      ->transform(bytes);
  app.add_option("--pages", flags.pages, "auto, thp, hugetlb or small")->capture_default_str();
  app.add_option("--expert-table", flags.expert_table,
                 "How a device finds its experts: pointer (into the domain's one mapping) or remap (each "
                 "layer's side "
                 "by side in addresses, as the paper has them)")
      ->check(CLI::IsMember({"pointer", "remap"}))
      ->capture_default_str();
  app.add_option("--max-model-len", o.max_model_len, "Context limit in tokens (default: the model's)")
      ->check(CLI::PositiveNumber);
  app.add_option("--max-num-seqs", o.max_running, "Sequences that run at once")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app.add_option("--max-num-batched-tokens", o.max_step_rows, "Token rows a device a step")
      ->check(CLI::Range(16, 8192))
      ->capture_default_str();
  app.add_option("--max-chunk-tokens", o.max_chunk_rows, "Prompt tokens of one request a step")
      ->check(CLI::Range(1, 8192))
      ->capture_default_str();
  app.add_option("--max-waiting", o.max_waiting, "Requests that may queue; more are answered 429")
      ->check(CLI::Range(0, 1'000'000))
      ->capture_default_str();
  app.add_flag("!--no-prefix-cache", o.prefix_cache,
               "Do not share KV between requests with the same beginning");
  app.add_option(
         "--standby", o.standby,
         "Workers kept ready to take over or to grow; with --domain-per-device also the memory of one "
         "more device and what experts leave behind, where the machine has it to spare")
      ->check(CLI::Range(0, 64))
      ->capture_default_str();
  app.add_option("--standby-limit", o.standby_limit,
                 "Workers kept at most, those of retired devices included")
      ->check(CLI::Range(0, 64))
      ->capture_default_str();
  app.add_option("--device-weights", o.device_weights,
                 "Relative speeds of devices 0, 1, ..., e.g. 1,1,0.5: their shares of experts and sequences")
      ->delimiter(',')
      ->check(CLI::PositiveNumber);
  app.add_option("--redundant-experts", o.redundant_experts,
                 "Further copies of the hottest experts a layer, made with the next resize")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  app.add_option("--copy-rate", o.copy_bytes_per_second,
                 "Limit of copies between domains, bytes a second, e.g. 2GiB (default: none)")
      ->transform(bytes);
  app.add_option("--step-timeout", o.step_timeout_seconds,
                 "Seconds after which a device that hangs in a step is replaced")
      ->check(CLI::Range(1, 3600))
      ->capture_default_str();
  app.add_option("--step-attempts", o.step_attempts,
                 "Runs of a step that kills workers, before the requests in it end with an error")
      ->check(CLI::Range(1, 1'000'000))
      ->capture_default_str();
  app.add_option("--worker-attempts", o.worker_attempts,
                 "Workers tried for a device that has lost its own, and memory daemons for one that ended, "
                 "before all requests end with an error")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  app.add_option("--worker-timeout", o.answer_timeout_seconds,
                 "Seconds after which a worker that does not answer between steps is replaced")
      ->check(CLI::Range(1, 3600))
      ->capture_default_str();
  app.add_option("--linger", o.linger_seconds, "Seconds that the memory daemon outlives a crashed server")
      ->check(CLI::Range(0, 86'400))
      ->capture_default_str();
}

Expected<std::unique_ptr<runtime::ElasticEngine>> StartEngine(const EngineFlags& flags,
                                                              const std::string& name) {
  EM_ASSIGN_OR_RETURN(const runtime::EngineOptions options, CompleteOptions(flags, name));
  return runtime::ElasticEngine::Start(options, DrawProgress);
}

Expected<std::unique_ptr<runtime::ReplicaSet>> StartReplicas(const EngineFlags& flags,
                                                             const std::string& name) {
  EM_ASSIGN_OR_RETURN(const runtime::EngineOptions options, CompleteOptions(flags, name));
  return runtime::ReplicaSet::Start(options, DrawProgress);
}

}  // namespace elasticmoe::cli
