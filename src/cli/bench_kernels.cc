// elasticmoe bench kernels: what each kernel reaches of what this machine could, on weights that no cache
// holds.
#include <sys/mman.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>

#include "base/check.h"
#include "base/clock.h"
#include "base/rng.h"
#include "cli/bench_report.h"
#include "cli/client.h"
#include "cli/command.h"
#include "cli/engine_flags.h"
#include "compute/activation.h"
#include "compute/forward.h"
#include "compute/quantized_row.h"
#include "compute/sampler.h"
#include "compute/work.h"
#include "model/tensor_source.h"
#include "runtime/process.h"

namespace elasticmoe::cli {
namespace {

using compute::Bf16;
using compute::PackedMatrix;

constexpr char kCommand[] = "bench kernels";
constexpr std::size_t kColdBytes = std::size_t{768} << 20;  // of weights, cycled through

struct Options {
  std::string isa = "auto";
  core::WeightFormat weights = core::WeightFormat::kBf16;
  bool all_weights = false;
  int threads = 0;  // 0 = one, and then all cores for what a device does with several
  std::string filter;
  int rounds = 5;
  double seconds = 0.02;  // a round, at least
  ReportFlags report;
};

// Memory in huge pages where the machine gives them, every value set once.
template <class T>
class Array {
 public:
  Array(std::size_t count, T value) : bytes_(count * sizeof(T)) {
    void* memory = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    EM_CHECK(memory != MAP_FAILED, "bytes={}", bytes_);
    ::madvise(memory, bytes_, MADV_HUGEPAGE);
    data_ = static_cast<T*>(memory);
    std::fill(data_, data_ + count, value);
  }
  ~Array() { ::munmap(data_, bytes_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T* data() const { return data_; }

 private:
  std::size_t bytes_;
  T* data_ = nullptr;
};

class KernelBench {
 public:
  KernelBench(const Options& options, const compute::Kernels& kernels, std::vector<int> cpus)
      : options_(options),
        kernels_(kernels),
        pool_(cpus),
        // Read as any of the formats: small numbers, small scales.
        weights_(kColdBytes / sizeof(Bf16), compute::ToBf16(0.01F)),
        limits_(MeasureLimits(kernels, options.weights, pool_, compute::ReadProbe(pool_))) {}

  void Run() {
    for (const int m : {1, 2, 4, 8, 16, 64, 512}) Matmul(2048, 1536, m);
    for (const int m : {1, 2, 4, 8, 16, 64, 512}) Matmul(768, 2048, m);
    for (const int m : {1, 2, 4, 8, 16, 64, 512}) GateUp(2048, 768, m);
    for (const int m : {1, 64}) Router(m);
    const compute::KvLayout latents{1, 1, 576, kernels_.kv_element_bytes, 512};  // DeepSeek's
    for (const auto& [rows, tokens] : {std::pair{1, 512}, {1, 8192}, {2, 512}, {16, 512}})
      Attend("", {1, 1, 128, kernels_.kv_element_bytes}, 8, rows, tokens);  // Qwen3-30B-A3B's groups
    Attend("mla16/", latents, 16, 16, 512);
    Attend("mla128/", latents, 128, 16, 512);
    for (const auto& [experts, rows] : {std::pair{8, 1}, {8, 64}, {64, 4}, {64, 32}}) Experts(experts, rows);
    for (const int tokens : {1024, 4096}) {
      Decode("gqa4x8", {1, 4, 128, kernels_.kv_element_bytes}, 32, tokens);  // Qwen3-30B-A3B
      Decode("mla16", latents, 16, tokens);                                  // DeepSeek-V2-Lite
      Decode("mla128", latents, 128, tokens);                                // DeepSeek-V3
    }
    if (pool_.Size() > 1) return;  // a token is sampled by one thread, and a slice loaded by one
    for (const LoadForm& form : LoadForms()) Load(form);
    Sample("greedy", {.temperature = 0});
    Sample("temperature", {.temperature = 0.8F});
    Sample("top_k", {.temperature = 0.8F, .top_k = 40});
    Sample("top_p", {.temperature = 0.8F, .top_p = 0.95F});
    Sample("min_p", {.temperature = 0.8F, .min_p = 0.05F});
    Sample("logprobs", {.temperature = 0, .logprobs = 5});
  }

  const Json& rows() const { return rows_; }
  const MachineLimits& limits() const { return limits_; }

 private:
  // Runs `body` for rounds of at least options.seconds; the median of a call. `body` does `work` once.
  void Measure(const std::string& what, const Work& work, const std::function<void()>& body) {
    const std::string name =
        fmt::format("{}/{}/{}/t{}", kernels_.name, core::NameOf(options_.weights), what, pool_.Size());
    if (name.find(options_.filter) == std::string::npos) return;
    body();
    std::vector<double> rounds;
    int calls = 1;
    while (static_cast<int>(rounds.size()) < options_.rounds) {
      const TimeNs begin = Now();
      for (int i = 0; i < calls; ++i) body();
      const double seconds = static_cast<double>(Now() - begin) * 1e-9;
      if (seconds < options_.seconds && calls < (1 << 24)) {
        calls *= 2;
        continue;
      }
      rounds.push_back(seconds / calls);
    }
    const double seconds = Median(rounds);
    Json row = {{"name", name}, {"value", 1 / seconds}, {"unit", "calls/s"}, {"us", seconds * 1e6}};
    if (work.operations > 0 || work.bytes > 0) row.update(RatesOf(work, seconds, limits_));
    rows_.push_back(std::move(row));
  }

  // The `index`th matrix of that shape among the cold weights, which begins anew after the last.
  PackedMatrix Cold(int n, int k, std::size_t index) const {
    const std::size_t bytes = compute::PackedBytes(n, k, options_.weights);
    const auto* data = reinterpret_cast<const std::byte*>(weights_.data());
    return {data + index % (kColdBytes / bytes) * bytes, n, k, options_.weights};
  }

  // Splits panels over the pool's threads, two at a time: pairs share a group of a quantized output.
  void Split(int n, const std::function<void(int first, int last)>& part) {
    const int threads = pool_.Size(), panels = compute::PanelsOf(n), pairs = (panels + 1) / 2;
    pool_.Run(threads,
              [&](int i) { part(pairs * i / threads * 2, std::min(panels, pairs * (i + 1) / threads * 2)); });
  }

  bool Quantized() const { return options_.weights != core::WeightFormat::kBf16; }

  // m rows of activations (zeros) in the form that the format's products take, and as many of output.
  struct Rows {
    static constexpr std::size_t kGap = 64;  // bytes between rows, so that they do not fall on the same sets
    Array<std::byte> in, out;
    std::vector<const void*> in_rows;
    std::vector<float*> out_rows;
    std::vector<void*> activation_rows;
    Rows(int m, std::size_t in_bytes, int n)
        : in(m * (in_bytes + kGap), std::byte{0}),
          out(std::size_t(m) * (n * sizeof(float) + 4096), std::byte{0}) {
      for (int i = 0; i < m; ++i) {
        in_rows.push_back(in.data() + std::size_t(i) * (in_bytes + kGap));
        activation_rows.push_back(out.data() + std::size_t(i) * (n * sizeof(float) + 4096));
        out_rows.push_back(static_cast<float*>(activation_rows.back()));
      }
    }
  };
  std::size_t InputBytes(int k) const {
    return Quantized() ? compute::QuantizedRow::Bytes(k) : std::size_t(k) * kernels_.activation_bytes;
  }

  void Matmul(int k, int n, int m) {
    Rows rows(m, InputBytes(k), n);
    const auto run = Quantized() ? kernels_.quantized.matmul : kernels_.matmul;
    Measure(fmt::format("matmul/{}x{}/m{}", k, n, m),
            {2.0 * m * n * k, static_cast<double>(compute::PackedBytes(n, k, options_.weights))},
            [&, next = std::size_t{0}]() mutable {
              const PackedMatrix w = Cold(n, k, next++);
              Split(n, [&](int first, int last) {
                run(w, rows.in_rows.data(), m, first, last, rows.out_rows.data());
              });
            });
  }

  void GateUp(int k, int n, int m) {
    Rows rows(m, InputBytes(k), n);
    const auto run = Quantized() ? kernels_.quantized.gate_up : kernels_.gate_up;
    const compute::Activation silu;
    Measure(fmt::format("gate_up/{}x{}/m{}", k, n, m),
            {4.0 * m * n * k, 2.0 * static_cast<double>(compute::PackedBytes(n, k, options_.weights))},
            [&, next = std::size_t{0}]() mutable {
              const PackedMatrix gate = Cold(n, k, next++), up = Cold(n, k, next++);
              Split(n, [&](int first, int last) {
                run(gate, up, silu, rows.in_rows.data(), m, first, last, rows.activation_rows.data());
              });
            });
  }

  void Router(int m) {
    constexpr int kExperts = 128, kHidden = 2048;
    const Array<float> x(std::size_t(m) * kHidden, 0.1F), w(std::size_t(kExperts) * kHidden, 0.1F);
    std::vector<float> logits(std::size_t(m) * kExperts);
    if (pool_.Size() > 1) return;              // its rows are split, not a row
    Measure(fmt::format("router/m{}", m), {},  // float32: none of the limits is its own
            [&] { kernels_.router(x.data(), m, w.data(), kExperts, kHidden, logits.data()); });
  }

  // `rows` consecutive rows of one sequence over `tokens` tokens, `heads` heads of each over one KV head.
  void Attend(const char* what, const compute::KvLayout& layout, int heads, int rows, int tokens) {
    if (pool_.Size() > 1) return;
    const int dim = layout.head_dim, out_dim = layout.latent_values > 0 ? layout.latent_values : dim;
    std::vector<std::uint32_t> table(static_cast<std::size_t>(tokens / compute::kBlockTokens + 1));
    std::iota(table.begin(), table.end(), 0u);
    const Array<float> memory(table.size() * layout.BlockBytes() / sizeof(float), 0.0F);
    std::byte* const chunk = reinterpret_cast<std::byte*>(memory.data());
    const compute::KvCache cache{layout, &chunk, static_cast<std::uint32_t>(table.size())};
    std::vector<float> q(std::size_t(rows) * heads * dim, 0.5F), out(std::size_t(rows) * heads * out_dim);
    std::vector<compute::Query> queries;
    for (int i = 0; i < rows * heads; ++i)
      queries.push_back(
          {&q[std::size_t(i) * dim], &out[std::size_t(i) * out_dim], tokens - rows + 1 + i / heads});
    std::vector<compute::AttendUnit> units;
    for (int i = 0; i < rows * heads; i += compute::kUnitQueries)
      units.push_back(
          {table.data(), 0, queries.data() + i, std::min(compute::kUnitQueries, rows * heads - i)});
    // What is in caches already counts as no reading.
    Measure(fmt::format("attend/{}rows{}/tokens{}", what, rows, tokens),
            {2.0 * rows * heads * (dim + out_dim) * tokens, 0},
            [&] { kernels_.attend(cache, 0, units.data(), static_cast<int>(units.size()), 0.1F); });
  }

  // A layer's attention for one new token a thread, each of another sequence of `tokens` tokens that no cache
  // holds; over latents in absorbed form, without the products that lead into them and out.
  void Decode(const char* what, const compute::KvLayout& layout, int heads, int tokens) {
    if (options_.weights != core::WeightFormat::kBf16 && options_.all_weights) return;  // it has none
    const std::uint32_t blocks = static_cast<std::uint32_t>(tokens / compute::kBlockTokens);
    const auto all = static_cast<std::uint32_t>(kColdBytes / layout.BlockBytes());
    std::byte* const chunk = reinterpret_cast<std::byte*>(weights_.data());
    const compute::KvCache cache{layout, &chunk, all};
    const bool latent = layout.latent_values > 0;
    const int group = heads / layout.kv_heads, out_dim = latent ? layout.latent_values : layout.head_dim;
    std::vector<float> q(std::size_t(heads) * layout.head_dim, 0.5F);
    std::vector<std::vector<float>> out(pool_.Size(), std::vector<float>(std::size_t(heads) * out_dim));
    std::vector<std::vector<std::uint32_t>> tables(pool_.Size(), std::vector<std::uint32_t>(blocks));
    const double threads = pool_.Size();
    Measure(fmt::format("decode/{}/tokens{}", what, tokens),
            {threads * 2 * heads * (layout.head_dim + out_dim) * tokens,
             threads * blocks * static_cast<double>(layout.BlockBytes())},
            [&, next = std::uint32_t{0}]() mutable {
              for (std::vector<std::uint32_t>& table : tables) {
                if (next + blocks > all) next = 0;
                std::iota(table.begin(), table.end(), next);
                next += blocks;
              }
              pool_.Run(pool_.Size(), [&](int thread) {
                std::vector<compute::Query> queries;
                for (int head = 0; head < heads; ++head)
                  queries.push_back({&q[std::size_t(head) * layout.head_dim],
                                     &out[thread][std::size_t(head) * out_dim], tokens});
                std::vector<compute::AttendUnit> units;
                for (int kv_head = 0; kv_head < layout.kv_heads; ++kv_head)
                  for (int i = 0; i < group; i += compute::kUnitQueries)
                    units.push_back({tables[thread].data(), kv_head, &queries[kv_head * group + i],
                                     std::min(compute::kUnitQueries, group - i)});
                kernels_.attend(cache, 0, units.data(), static_cast<int>(units.size()), 0.1F);
              });
            });
  }

  // How a checkpoint may hold a matrix [768, 2048], an expert of Qwen3-30B-A3B.
  static constexpr int kLoadRows = 768, kLoadColumns = 2048;
  struct LoadForm {
    const char* name;
    model::TensorData data;
    double scale_bytes = 0;  // a value
  };
  static std::vector<LoadForm> LoadForms() {
    using model::Encoding;
    constexpr std::uint32_t kRows = kLoadRows, kColumns = kLoadColumns;
    const auto form = [](const char* name, Encoding encoding) {
      return LoadForm{name, {encoding, 0, 0, model::EncodedBytes(encoding, kRows * kColumns)}};
    };
    std::vector<LoadForm> forms = {form("bf16", Encoding::kBf16), form("f16", Encoding::kF16),
                                   form("q8_0", Encoding::kQ8_0), form("q4_0", Encoding::kQ4_0),
                                   form("q4_k", Encoding::kQ4K),  form("q6_k", Encoding::kQ6K)};
    const auto scaled = [&](const char* name, Encoding encoding, model::BlockScales scales, double bytes) {
      forms.push_back(form(name, encoding));
      forms.back().data.scales = scales;
      forms.back().scale_bytes = bytes;
      return &forms.back().data;
    };
    scaled("fp8", Encoding::kF8E4M3, {.encoding = Encoding::kF32, .block_rows = 128, .block_columns = 128},
           4.0 / (128 * 128));
    scaled("mxfp4", Encoding::kF4E2M1, {.encoding = Encoding::kE8M0, .block_columns = 32}, 1.0 / 32);
    const model::BlockScales groups{.encoding = Encoding::kF16, .block_columns = 128, .zero = 8};
    scaled("int4", Encoding::kU4, groups, 2.0 / 128);
    model::BlockScales words = groups;
    words.transposed_rows = kRows;
    words.zeros = {.layout = model::ZeroPoints::Layout::kAcross, .bits = 4, .add = 1};
    scaled("gptq", Encoding::kU4, words, 2.5 / 128)->order = {.columns = kRows,
                                                              .words = model::RowOrder::Words::kDown};
    words.zeros = {.layout = model::ZeroPoints::Layout::kAwq, .bits = 4};
    scaled("awq", Encoding::kU4, words, 2.5 / 128)->order = {.columns = kRows,
                                                             .words = model::RowOrder::Words::kAwq};
    return forms;
  }

  // Reading (from memory that no cache holds), decoding and packing, by one thread.
  void Load(const LoadForm& form) {
    const auto stored = static_cast<double>(form.data.bytes) + form.scale_bytes * kLoadRows * kLoadColumns;
    const std::size_t packed_bytes = compute::PackedBytes(kLoadRows, kLoadColumns, options_.weights);
    const Array<std::byte> packed(packed_bytes, std::byte{0});
    const auto* base = reinterpret_cast<const std::byte*>(weights_.data());
    model::RowReader reader([&](int, std::uint64_t offset, std::byte* out, std::uint64_t bytes) -> Status {
      std::memcpy(out, base + offset, bytes);
      return {};
    });
    Measure(fmt::format("load/{}", form.name), {0, stored + static_cast<double>(packed_bytes)},
            [&, next = std::uint64_t{0}]() mutable {
              model::TensorData data = form.data;
              next = next + 2 * data.bytes > kColdBytes ? 0 : next + data.bytes;
              data.offset = next;
              const int slice = data.order.columns > 0 ? kLoadRows : kLoadRows / 6;
              for (int row = 0; row < kLoadRows; row += slice) {
                const auto rows = reader.Read(data, kLoadColumns, row, slice);
                EM_CHECK(rows.has_value());
                compute::PackRows(rows->data, rows->type, row, slice, kLoadColumns, packed.data(),
                                  options_.weights);
              }
            });
  }

  // A MoE layer as one device runs it: `count` experts of Qwen3-30B-A3B's shape with `rows` rows each.
  void Experts(int count, int rows) {
    core::ModelSpec spec;
    spec.hidden = 2048;
    spec.moe.expert_width = 768;
    spec.weights = options_.weights;
    Rows all(count * rows, std::size_t(spec.hidden) * kernels_.activation_bytes, spec.hidden);
    std::vector<compute::ExpertRow> visits;
    for (int i = 0; i < count * rows; ++i) visits.push_back({all.in_rows[i], all.out_rows[i]});
    std::vector<std::byte> scratch;
    const double bytes = 2.0 * static_cast<double>(compute::PackedBytes(768, 2048, options_.weights)) +
                         static_cast<double>(compute::PackedBytes(2048, 768, options_.weights));
    Measure(
        fmt::format("experts/{}/rows{}", count, rows), {6.0 * count * rows * 768 * 2048, bytes * count},
        [&, next = std::size_t{0}]() mutable {
          std::vector<compute::ExpertBatch> batches;
          for (int e = 0; e < count; ++e, next += 3) {
            batches.push_back({{Cold(768, 2048, next), Cold(768, 2048, next + 1), Cold(2048, 768, next + 2)},
                               {visits.data() + std::size_t(e) * rows, std::size_t(rows)}});
          }
          compute::RunExperts(spec, kernels_, pool_, batches, scratch);
        });
  }

  void Sample(const char* what, const core::SamplingParams& params) {
    constexpr int kVocab = 151936;  // Qwen3's
    std::vector<float> logits(kVocab), work(kVocab);
    for (int i = 0; i < kVocab; ++i) {
      double sum = 0;  // about normal, as logits are
      for (int j = 0; j < 6; ++j) sum += UniformAt(static_cast<std::uint64_t>(i), j) - 0.5;
      logits[static_cast<std::size_t>(i)] = static_cast<float>(4 * sum);
    }
    Measure(fmt::format("sample/{}", what), {}, [&, position = 0]() mutable {
      std::copy(logits.begin(), logits.end(), work.begin());
      (void)compute::Sample({.logits = work, .params = &params, .position = position++});
    });
  }

  const Options& options_;
  const compute::Kernels& kernels_;
  compute::ThreadPool pool_;
  const Array<Bf16> weights_;
  const MachineLimits limits_;
  Json rows_ = Json::array();
};

std::string Table(const Json& rows) {
  std::vector<std::vector<std::string>> cells{
      {"", "us", "GFLOP/s", "of peak", "GB/s", "of bandwidth", "of limit"}};
  for (const Json& row : rows) {
    const auto number = [&](const char* key, int digits) {
      return row.contains(key) && !row[key].is_null() ? fmt::format("{:.{}f}", row[key].get<double>(), digits)
                                                      : std::string("-");
    };
    const auto percent = [&](const char* key) {
      return row.contains(key) && !row[key].is_null() ? fmt::format("{:.0f} %", row[key].get<double>() * 100)
                                                      : std::string("-");
    };
    cells.push_back({row["name"], number("us", 1), number("gflop_per_s", 1), percent("of_peak"),
                     number("gb_per_s", 1), percent("of_bandwidth"), percent("limit_fraction")});
  }
  return AlignColumns(cells);
}

int Run(const Options& options) {
  std::vector<const compute::Kernels*> tables;
  if (options.isa == "all") {
    tables = compute::AvailableKernels();
  } else {
    const auto found = compute::FindKernels(options.isa);
    if (!found) return Complain(kCommand, found.error());
    tables = {*found};
  }
  const std::vector<int> cpus = runtime::AllowedCpus();
  std::vector<int> counts{options.threads};
  if (options.threads == 0)
    counts = cpus.size() > 1 ? std::vector{1, static_cast<int>(cpus.size())} : std::vector{1};
  if (options.threads > static_cast<int>(cpus.size()))
    return Complain(kCommand,
                    Error{ErrorCode::kInvalidArgument,
                          fmt::format("--threads: {} (limit={}, the cores)", options.threads, cpus.size())});
  std::vector<std::pair<core::WeightFormat, int>> runs;
  for (const auto format : {core::WeightFormat::kBf16, core::WeightFormat::kInt8, core::WeightFormat::kInt4})
    for (const int count : counts)
      if (options.all_weights || format == options.weights) runs.emplace_back(format, count);
  Json rows = Json::array();
  std::string text;
  std::optional<MachineLimits> limits;
  for (const compute::Kernels* table : tables) {
    for (const auto& [format, threads] : runs) {
      Options of = options;
      of.weights = format;
      KernelBench bench(of, *table, {cpus.begin(), cpus.begin() + threads});
      bench.Run();
      if (bench.rows().empty()) continue;
      text +=
          fmt::format("{}{}\n\n{}", text.empty() ? "" : "\n", Describe(bench.limits()), Table(bench.rows()));
      for (const Json& row : bench.rows()) rows.push_back(row);
      limits = bench.limits();
    }
  }
  if (!limits)
    return Complain(kCommand, Error{ErrorCode::kInvalidArgument,
                                    fmt::format("--filter: no kernel's name holds \"{}\"", options.filter)});
  return Report(options.report, kCommand, *limits, rows, text);
}

}  // namespace

void RegisterBenchKernels(CLI::App& bench, Action& action) {
  auto options = std::make_shared<Options>();
  CLI::App* sub =
      bench.add_subcommand("kernels", "Each kernel's rate, and its share of this machine's limits");
  sub->footer(
      "Examples:\n  elasticmoe bench kernels\n  elasticmoe bench kernels --isa all --filter matmul\n"
      "\nA name is TABLE/WEIGHTS/KERNEL/SHAPE/tTHREADS: matmul and gate_up KxN on m rows, experts COUNT with "
      "rows each;\n"
      "decode is a layer's attention for one token a thread: grouped queries (4 KV heads, 8 query heads "
      "each) or "
      "latents (MLA)\n"
      "with 16 or 128 heads; load is a matrix of a checkpoint's format decoded and packed.\n"
      "The limits are measured first, with the same threads: a read of memory, and the table's dot product "
      "on "
      "registers.");
  sub->add_option("--isa,--kernels", options->isa,
                  "auto, all, or a table: amxbf16, avx512bf16, avx2, reference")
      ->capture_default_str();
  AddWeightsFlag(*sub, options->weights);
  sub->add_flag("--all-weights", options->all_weights, "Every format of --weights, one after another");
  sub->add_option("--threads", options->threads, "Pinned threads (default: one, then all cores)")
      ->check(CLI::Range(1, 1024));
  sub->add_option("--filter", options->filter, "Only what has this in its name");
  sub->add_option("--rounds", options->rounds, "Rounds of each; their median is shown")
      ->check(CLI::Range(1, 10'000))
      ->capture_default_str();
  sub->add_option("--seconds", options->seconds, "Of a round, at least")
      ->check(CLI::Range(1e-4, 60.0))
      ->capture_default_str();
  AddReportFlags(*sub, options->report);
  sub->callback([&action, options] { action = [options] { return Run(*options); }; });
}

}  // namespace elasticmoe::cli
