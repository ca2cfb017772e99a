// elasticmoe bench load: from a model on disk to its first token, beside what the disk gives.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>

#include "base/clock.h"
#include "base/log.h"
#include "cli/bench_report.h"
#include "cli/client.h"
#include "cli/command.h"
#include "cli/engine_flags.h"
#include "model/checkpoint.h"
#include "runtime/fd.h"

namespace elasticmoe::cli {
namespace {

constexpr char kCommand[] = "bench load";
constexpr std::size_t kBlock = std::size_t{4} << 20;           // of a probe's read
constexpr std::uint64_t kProbeBytes = std::uint64_t{2} << 30;  // read by a probe, at most
constexpr int kProbeThreads = 4;                               // reads under way: more gave no more here

struct Options {
  EngineFlags engine;
  ReportFlags report;
  int rounds = 3;
  bool warm = true, cold = true;
};

// Whether the files' pages are in the kernel's cache.
enum class Cache { kCold, kWarm };
std::string_view NameOf(Cache cache) {
  return cache == Cache::kCold ? "cold" : "warm";
}

struct Files {
  std::vector<std::filesystem::path> paths;
  std::uint64_t bytes = 0;
};

Expected<Files> FilesOf(const std::filesystem::path& model) {
  EM_ASSIGN_OR_RETURN(const model::Checkpoint checkpoint, model::Checkpoint::Open(model));
  Files files{checkpoint.files, 0};
  for (const auto& path : files.paths) {
    std::error_code code;
    files.bytes += std::filesystem::file_size(path, code);
    if (code) return Fail(ErrorCode::kUnavailable, "{}: {}", path.string(), code.message());
  }
  return files;
}

// Best effort: pages that somebody has mapped or not yet written stay.
void DropFromCache(const Files& files) {
  for (const auto& path : files.paths) {
    const runtime::Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    if (!fd) continue;
    ::fdatasync(fd.get());
    ::posix_fadvise(fd.get(), 0, 0, POSIX_FADV_DONTNEED);
  }
}

// Bytes a second of plain reads by a few threads: past the cache (kCold; through it where the file system
// has no direct reads), or out of it (kWarm, read before). 0 = nothing to read.
double ProbeReads(const Files& files, Cache cache) {
  double best = 0;
  if (cache == Cache::kCold) DropFromCache(files);
  for (int pass = 0; pass < (cache == Cache::kWarm ? 3 : 1); ++pass) {
    std::uint64_t read_bytes = 0;
    const TimeNs begin = Now();
    for (const auto& path : files.paths) {
      if (read_bytes >= kProbeBytes) break;
      runtime::Fd fd(cache == Cache::kCold ? ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT) : -1);
      if (!fd) fd = runtime::Fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
      if (!fd) continue;
      std::atomic<std::uint64_t> next{0}, total{0};
      const std::uint64_t most = kProbeBytes - read_bytes;
      const auto run = [&] {
        const std::unique_ptr<void, decltype(&std::free)> block(std::aligned_alloc(4096, kBlock), &std::free);
        for (;;) {
          const std::uint64_t at = next.fetch_add(kBlock);
          if (at >= most) return;
          const ssize_t got = ::pread(fd.get(), block.get(), kBlock, static_cast<off_t>(at));
          if (got <= 0) return;
          total += static_cast<std::uint64_t>(got);
        }
      };
      {
        std::vector<std::jthread> threads;
        for (int i = 0; i < kProbeThreads; ++i) threads.emplace_back(run);
      }
      read_bytes += total;
    }
    const double seconds = static_cast<double>(Now() - begin) * 1e-9;
    best = std::max(best, static_cast<double>(read_bytes) / seconds);
  }
  return best;
}

struct Loaded {
  double ready_s = 0;        // the engine takes requests
  double first_token_s = 0;  // of a prompt of 16 tokens, from the beginning
};

Expected<Loaded> Load(const EngineFlags& flags) {
  Loaded loaded;
  const TimeNs begin = Now();
  const auto since = [begin] { return static_cast<double>(Now() - begin) * 1e-9; };
  EM_ASSIGN_OR_RETURN(const auto engine, StartEngine(flags, fmt::format("bench-load-{}", ::getpid())));
  loaded.ready_s = since();
  core::GenerationRequest request;
  request.id = RequestId(1);
  request.prompt.assign(16, 1);
  request.sampling.temperature = 0;
  request.max_tokens = 1;
  request.ignore_eos = true;
  std::mutex mutex;
  std::condition_variable changed;
  bool finished = false;
  std::string error;
  EM_RETURN_IF_ERROR(engine->Submit(std::move(request), [&](const core::TokenEvent& event) {
    const std::scoped_lock lock(mutex);
    if (!event.tokens.empty()) loaded.first_token_s = since();
    if (!event.finish) return;
    error = event.error;
    finished = true;
    changed.notify_one();
  }));
  std::unique_lock lock(mutex);
  changed.wait(lock, [&] { return finished; });
  if (loaded.first_token_s == 0) return Fail(ErrorCode::kUnavailable, "generating: {}", error);
  return loaded;
}

Expected<Json> Measure(const Options& options, const Files& files, Cache cache) {
  std::vector<double> ready, first;
  double probe = 0;
  for (int round = 0; round < options.rounds; ++round) {
    probe = std::max(probe, ProbeReads(files, cache));
    if (cache == Cache::kCold) DropFromCache(files);
    EM_ASSIGN_OR_RETURN(const Loaded loaded, Load(options.engine));
    ready.push_back(loaded.ready_s);
    first.push_back(loaded.first_token_s);
  }
  const double seconds = Median(ready), rate = static_cast<double>(files.bytes) / seconds;
  return Json{
      {"name", fmt::format("load_{}_{}", NameOf(cache), core::NameOf(options.engine.options.weights))},
      {"value", rate / 1e9},
      {"unit", "GB/s"},
      {"bytes", files.bytes},
      {"seconds", seconds},
      {"first_token_s", Median(first)},
      {"read_gb_per_s", probe / 1e9},
      {"limit_fraction", probe > 0 ? Json(rate / probe) : Json()}};
}

int Run(Options options) {
  InitLog("bench", "warn");
  options.engine.options.standby = 0;
  options.engine.options.log_level = "warn";
  const auto kernels = compute::FindKernels(options.engine.options.kernels);
  if (!kernels) return Complain(kCommand, kernels.error());
  const auto files = FilesOf(options.engine.options.model);
  if (!files) return Complain(kCommand, files.error());
  Json rows = Json::array();
  std::vector<std::vector<std::string>> cells{
      {"", "MiB", "s", "GB/s", "reads give", "of limit", "first token, s"}};
  for (const Cache cache : {Cache::kCold, Cache::kWarm}) {
    if (!(cache == Cache::kCold ? options.cold : options.warm)) continue;
    const auto row = Measure(options, *files, cache);
    if (!row) return Complain(kCommand, row.error());
    const auto number = [&](const char* key) { return (*row)[key].get<double>(); };
    cells.push_back(
        {(*row)["name"], fmt::format("{:.0f}", number("bytes") / (1 << 20)),
         fmt::format("{:.2f}", number("seconds")), fmt::format("{:.2f}", number("value")),
         fmt::format("{:.2f}", number("read_gb_per_s")),
         (*row)["limit_fraction"].is_null() ? "-" : fmt::format("{:.0f} %", number("limit_fraction") * 100),
         fmt::format("{:.2f}", number("first_token_s"))});
    rows.push_back(*row);
  }
  std::vector<int> cpus = runtime::AllowedCpus();
  compute::ThreadPool threads(cpus);
  const MachineLimits limits =
      MeasureLimits(**kernels, options.engine.options.weights, threads, compute::ReadProbe(threads));
  return Report(options.report, kCommand, limits, rows,
                fmt::format("{}\n{}; medians of {} round{}\n\n{}", Describe(limits),
                            options.engine.options.model.string(), options.rounds,
                            options.rounds == 1 ? "" : "s", AlignColumns(cells)));
}

}  // namespace

void RegisterBenchLoad(CLI::App& bench, Action& action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub = bench.add_subcommand("load", "From a model on disk to its first token");
  sub->footer(
      "Example:\n  elasticmoe bench load /tmp/made --devices 2\n"
      "\ncold: the files' pages were dropped from the kernel's cache before (as far as it lets go of them); "
      "warm: "
      "they\nare there. reads give: what four threads read of the same files in the same way, without "
      "anything "
      "done to it.");
  AddEngineFlags(*sub, options->engine);
  sub->add_option("--rounds", options->rounds, "Loads of each kind; their median is shown")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  auto* no_warm = sub->add_flag("!--no-warm", options->warm, "Leave out the loads from the kernel's cache");
  sub->add_flag("!--no-cold", options->cold, "Leave out the loads from disk")->excludes(no_warm);
  AddReportFlags(*sub, options->report);
  sub->callback([&action, options] { action = [options] { return Run(*options); }; });
}

}  // namespace elasticmoe::cli
