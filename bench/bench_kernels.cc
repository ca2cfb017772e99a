// What the kernels reach of what the machine could: GFLOP/s and GB/s of each table, with the share of the
// measured read bandwidth and of the instruction set's peak, on weights that no cache holds. One core,
// pinned, unless the name says otherwise. `bench_kernels --benchmark_filter=avx512bf16/matmul`
#include <benchmark/benchmark.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>

#include "base/rng.h"
#include "compute/forward.h"
#include "compute/kernels.h"
#include "compute/sampler.h"

namespace elasticmoe::compute {
namespace {

constexpr std::size_t kColdBytes =
    std::size_t{384} << 20;  // of weights, cycled through: more than a core's share of any cache

struct AlignedFree {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using AlignedArray = std::unique_ptr<T[], AlignedFree>;

// Written once, on huge pages where the machine gives them.
template <class T>
AlignedArray<T> Allocate(std::size_t count, T value) {
  const std::size_t bytes = (count * sizeof(T) + (2 << 20) - 1) / (2 << 20) * (2 << 20);
  auto* p = static_cast<T*>(std::aligned_alloc(2 << 20, bytes));
  madvise(p, bytes, MADV_HUGEPAGE);
  std::fill(p, p + count, value);
  return AlignedArray<T>(p);
}

const Bf16* ColdWeights() {
  static const AlignedArray<Bf16> weights = Allocate<Bf16>(kColdBytes / sizeof(Bf16), ToBf16(0.01F));
  return weights.get();
}

double Seconds(const auto& body) {
  const auto begin = std::chrono::steady_clock::now();
  body();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Bytes a second that one core reads from memory: best of a few passes, a line ahead of the adds.
double ReadBandwidth() {
  static const double best = [] {
    const auto* words = reinterpret_cast<const std::uint64_t*>(ColdWeights());
    double best = 0;
    for (int i = 0; i < 5; ++i) {
      std::uint64_t sums[8] = {};
      const double seconds = Seconds([&] {
        for (std::size_t at = 0; at < kColdBytes / 8; at += 8) {
          __builtin_prefetch(words + at + 256);
          for (int lane = 0; lane < 8; ++lane) sums[lane] += words[at + lane];
        }
        benchmark::DoNotOptimize(sums);
      });
      best = std::max(best, kColdBytes / seconds);
    }
    return best;
  }();
  return best;
}

#if defined(__x86_64__)
__attribute__((target("avx512f,avx512bf16"))) double PeakAvx512Bf16() {
  constexpr int kRounds = 2'000'000;
  __m512 acc[16];
  for (__m512& a : acc) a = _mm512_setzero_ps();
  const __m512bh x = (__m512bh)_mm512_set1_epi32(0x3c003c00);
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < kRounds; ++i) {
#pragma GCC unroll 16
    for (__m512& a : acc) a = _mm512_dpbf16_ps(a, x, x);
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  for (__m512& a : acc) benchmark::DoNotOptimize(a);
  return 16.0 * 64 * kRounds / seconds;
}

// Tiles loaded once; AvailableKernels has asked for leave to use them.
__attribute__((target("amx-tile,amx-bf16"))) double PeakAmxBf16() {
  constexpr int kRounds = 1'000'000;
  struct alignas(64) {
    std::uint8_t palette = 1, rest[15] = {};
    std::uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  asm volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < kRounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  _tile_release();
  return 4.0 * 16 * 16 * 32 * 2 * kRounds / seconds;
}

__attribute__((target("avx2,fma"))) double PeakAvx2() {
  constexpr int kRounds = 2'000'000;
  __m256 acc[12];
  for (__m256& a : acc) a = _mm256_setzero_ps();
  const __m256 x = _mm256_set1_ps(0.5F);
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
    for (__m256& a : acc) a = _mm256_fmadd_ps(a, x, x);
  }
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  for (__m256& a : acc) benchmark::DoNotOptimize(a);
  return 12.0 * 16 * kRounds / seconds;
}
#endif

// Floating point operations a second of one core with the table's dot product; 0 = no such measure.
double Peak(const Kernels& kernels) {
  static std::map<std::string_view, double> peaks;
  const auto [found, is_new] = peaks.try_emplace(kernels.name, 0.0);
#if defined(__x86_64__)
  if (is_new && kernels.name == "amxbf16") found->second = PeakAmxBf16();
  if (is_new && kernels.name == "avx512bf16") found->second = PeakAvx512Bf16();
  if (is_new && kernels.name == "avx2") found->second = PeakAvx2();
#endif
  return found->second;
}

// Runs `body` for the state's iterations and reports its rates.
void Measure(benchmark::State& state, const Kernels& kernels, double flops, double bytes, const auto& body,
             int threads = 1) {
  const double seconds = Seconds([&] {
    for (auto _ : state) body();
  });
  const double rate = static_cast<double>(state.iterations()) / seconds;
  state.counters["GFLOP/s"] = flops * rate / 1e9;
  state.counters["GB/s"] = bytes * rate / 1e9;
  state.counters["of_bandwidth"] = bytes * rate / ReadBandwidth() / threads;
  if (Peak(kernels) > 0) state.counters["of_peak"] = flops * rate / Peak(kernels) / threads;
}

// m rows of activations and as many of output.
struct Rows {
  AlignedArray<float> in, out;
  std::vector<const void*> in_rows;
  std::vector<float*> out_rows;
  std::vector<void*> activation_rows;
  Rows(int m, int k, int n)
      : in(Allocate<float>(std::size_t(m) * (k + 16), 0.0F)), out(Allocate<float>(std::size_t(m) * n, 0.0F)) {
    for (int i = 0; i < m; ++i) {
      in_rows.push_back(reinterpret_cast<const std::byte*>(in.get()) + std::size_t(i) * (k * 2 + 64));
      out_rows.push_back(out.get() + std::size_t(i) * n);
      activation_rows.push_back(out_rows.back());
    }
  }
};

void BenchMatmul(benchmark::State& state, const Kernels& kernels) {
  const int k = static_cast<int>(state.range(0)), n = static_cast<int>(state.range(1)),
            m = static_cast<int>(state.range(2));
  Rows rows(m, k, n);
  const std::size_t step = PackedBytes(n, k) / sizeof(Bf16), count = kColdBytes / PackedBytes(n, k);
  std::size_t next = 0;
  const auto body = [&] {
    const PackedMatrix w{ColdWeights() + next++ % count * step, n, k};
    kernels.matmul(w, rows.in_rows.data(), m, 0, (n + kPanel - 1) / kPanel, rows.out_rows.data());
  };
  Measure(state, kernels, 2.0 * m * n * k, static_cast<double>(PackedBytes(n, k)), body);
}

void BenchGateUp(benchmark::State& state, const Kernels& kernels) {
  const int k = static_cast<int>(state.range(0)), n = static_cast<int>(state.range(1)),
            m = static_cast<int>(state.range(2));
  Rows rows(m, k, n);
  const std::size_t step = PackedBytes(n, k) / sizeof(Bf16), count = kColdBytes / PackedBytes(n, k) / 2;
  std::size_t next = 0;
  const auto body = [&] {
    const Bf16* pair = ColdWeights() + next++ % count * 2 * step;
    kernels.gate_up({pair, n, k}, {pair + step, n, k}, {}, rows.in_rows.data(), m, 0,
                    (n + kPanel - 1) / kPanel, rows.activation_rows.data());
  };
  Measure(state, kernels, 4.0 * m * n * k, 2.0 * static_cast<double>(PackedBytes(n, k)), body);
}

void BenchRouter(benchmark::State& state, const Kernels& kernels) {
  const int m = static_cast<int>(state.range(0)), experts = 128, hidden = 2048;
  const auto x = Allocate<float>(std::size_t(m) * hidden, 0.1F), w = Allocate<float>(experts * hidden, 0.1F);
  std::vector<float> logits(std::size_t(m) * experts);
  const auto body = [&] { kernels.router(x.get(), m, w.get(), experts, hidden, logits.data()); };
  Measure(state, kernels, 2.0 * m * experts * hidden, 0, body);
}

// `rows` consecutive rows of one sequence over `tokens` tokens, groups of 8 heads of 128 a kv head (as
// Qwen3-30B-A3B).
void BenchAttend(benchmark::State& state, const Kernels& kernels) {
  const int rows = static_cast<int>(state.range(0)), tokens = static_cast<int>(state.range(1)), group = 8,
            dim = 128;
  const KvLayout layout{1, 1, dim, kernels.kv_element_bytes};
  std::vector<std::uint32_t> table(tokens / kBlockTokens + 1);
  std::iota(table.begin(), table.end(), 0u);
  const auto memory = Allocate<float>(table.size() * layout.BlockBytes() / sizeof(float), 0.0F);
  std::byte* const chunk = reinterpret_cast<std::byte*>(memory.get());
  const KvCache cache{layout, &chunk, static_cast<std::uint32_t>(table.size())};
  std::vector<float> q(std::size_t(rows) * group * dim, 0.5F), out(q.size());
  std::vector<Query> queries;
  for (int i = 0; i < rows * group; ++i)
    queries.push_back({&q[std::size_t(i) * dim], &out[std::size_t(i) * dim], tokens - rows + 1 + i / group});
  const auto body = [&] { kernels.attend(cache, 0, 0, table.data(), queries.data(), rows * group, 0.1F); };
  Measure(state, kernels, 4.0 * rows * group * dim * tokens, 2.0 * tokens * dim * kernels.kv_element_bytes,
          body);
}

// A MoE layer as one device runs it: `experts` experts of Qwen3-30B-A3B's shape with `rows` rows each, on
// `threads` pinned threads.
void BenchExperts(benchmark::State& state, const Kernels& kernels) {
  const int experts = static_cast<int>(state.range(0)), rows = static_cast<int>(state.range(1)),
            threads = static_cast<int>(state.range(2));
  core::ModelSpec spec;
  spec.hidden = 2048;
  spec.moe.expert_width = 768;
  const std::size_t step = PackedBytes(768, 2048) / sizeof(Bf16),
                    count = kColdBytes / sizeof(Bf16) / step / 3;
  std::vector<int> cpus(threads);
  std::iota(cpus.begin(), cpus.end(), 0);
  ThreadPool pool(cpus);
  Rows all(experts * rows, spec.hidden, spec.hidden);
  std::vector<ExpertRow> visits;
  for (int i = 0; i < experts * rows; ++i) visits.push_back({all.in_rows[i], all.out_rows[i]});
  std::vector<std::byte> scratch;
  std::size_t next = 0;
  const auto body = [&] {
    std::vector<ExpertBatch> batches;
    for (int e = 0; e < experts; ++e) {
      const Bf16* w = ColdWeights() + next++ % count * 3 * step;
      batches.push_back({{{w, 768, 2048}, {w + step, 768, 2048}, {w + 2 * step, 2048, 768}},
                         {visits.data() + e * rows, std::size_t(rows)}});
    }
    RunExperts(spec, kernels, pool, batches, scratch);
  };
  Measure(state, kernels, 6.0 * experts * rows * 768 * 2048, 6.0 * static_cast<double>(step) * experts, body,
          threads);
}

void BenchSample(benchmark::State& state, core::SamplingParams params) {
  constexpr int kVocab = 151936;
  std::vector<float> logits(kVocab), work(kVocab);
  for (int i = 0; i < kVocab; ++i) {
    double sum = 0;  // about normal, as logits are
    for (int j = 0; j < 6; ++j) sum += UniformAt(i, j) - 0.5;
    logits[i] = static_cast<float>(4 * sum);
  }
  int position = 0;
  for (auto _ : state) {
    std::copy(logits.begin(), logits.end(), work.begin());
    benchmark::DoNotOptimize(Sample({.logits = work, .params = &params, .position = position++}));
  }
}

void Register() {
  using benchmark::RegisterBenchmark;
  for (const Kernels* table : AvailableKernels()) {
    const std::string name(table->name);
    const auto add = [&](const std::string& what, auto* body) {
      return RegisterBenchmark((name + "/" + what).c_str(),
                               [table, body](benchmark::State& state) { body(state, *table); })
          ->Unit(benchmark::kMicrosecond);
    };
    auto* matmul = add("matmul/K/N/M", BenchMatmul);
    auto* gate_up = add("gate_up/K/N/M", BenchGateUp);
    auto* router = add("router/M", BenchRouter);
    auto* attend = add("attend/rows/tokens", BenchAttend);
    auto* experts = add("experts/experts/rows/threads", BenchExperts);
    for (const int m : {1, 4, 16, 64, 256, 512}) {
      if (name == "reference" && m > 16) continue;  // it is not meant to be fast
      matmul->Args({2048, 1536, m})->Args({768, 2048, m});
      gate_up->Args({2048, 768, m});
    }
    router->Arg(1)->Arg(64);
    attend->Args({1, 512})->Args({1, 8192})->Args({2, 512})->Args({16, 512});
    for (const int threads : {1, 2})
      experts->Args({8, 1, threads})->Args({8, 64, threads})->Args({64, 4, threads});
  }
  const auto sample = [](const char* name, const core::SamplingParams& params) {
    RegisterBenchmark(name, [params](benchmark::State& state) {
      BenchSample(state, params);
    })->Unit(benchmark::kMicrosecond);
  };
  sample("sample/greedy", {.temperature = 0});
  sample("sample/temperature", {.temperature = 0.8F});
  sample("sample/top_k", {.temperature = 0.8F, .top_k = 40});
  sample("sample/top_p", {.temperature = 0.8F, .top_p = 0.95F});
  sample("sample/min_p", {.temperature = 0.8F, .min_p = 0.05F});
  sample("sample/logprobs", {.temperature = 0, .logprobs = 5});
}

}  // namespace
}  // namespace elasticmoe::compute

int main(int argc, char** argv) {
  cpu_set_t first;
  CPU_ZERO(&first);
  CPU_SET(0, &first);
  sched_setaffinity(0, sizeof(first), &first);
  benchmark::Initialize(&argc, argv);
  benchmark::AddCustomContext("read GB/s a core",
                              fmt::format("{:.1f}", elasticmoe::compute::ReadBandwidth() / 1e9));
  for (const auto* table : elasticmoe::compute::AvailableKernels())
    benchmark::AddCustomContext(fmt::format("{} peak GFLOP/s a core", table->name),
                                fmt::format("{:.0f}", elasticmoe::compute::Peak(*table) / 1e9));
  elasticmoe::compute::Register();
  benchmark::RunSpecifiedBenchmarks();
}
