// Pointer table against vpage-remap (runtime/worker/expert_table.h), which the paper did not take apart: what
// each costs to prepare an epoch, and what its page tables cost the kernels that read the weights. Both on
// the same memory, in turn. Counters: mappings, page tables in KiB, GB/s read.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <memory>
#include <string>

#include "runtime/worker/expert_table.h"

namespace elasticmoe::runtime {
namespace {

constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;
constexpr std::uint64_t kAllBytes = 768 * kMiB;
constexpr int kLayers = 4;
constexpr int kEpochs = 4;

struct Domain {
  Fd fd;
  Mapping mapping;
};

// One memory of experts for all benchmarks of a page kind, backed once.
const Domain& Memory(PageKind kind) {
  static std::map<PageKind, Domain> memories;
  Domain& domain = memories[kind];
  if (!domain.fd) {
    domain.fd = *CreateMemory("bench-experts", kAllBytes, kind);
    domain.mapping = *Map(domain.fd.get(), 0, kAllBytes, true);
    if (!Populate(domain.mapping.data(), kAllBytes, kind)) std::abort();
  }
  return domain;
}

double PageTableKiB() {
  std::ifstream status("/proc/self/status");
  std::string word;
  double kilobytes = 0;
  while (status >> word)
    if (word == "VmPTE:" && status >> kilobytes) return kilobytes;
  return 0;
}

struct Case {
  ExpertTableKind kind;
  PageKind pages;
  std::uint64_t expert_bytes;

  std::unique_ptr<ExpertTable> Table() const {
    const ExpertTableShape shape{kLayers, Experts(), expert_bytes, expert_bytes, kEpochs};
    const Domain& domain = Memory(pages);
    return MakeExpertTable(kind, shape, domain.mapping, domain.fd.get());
  }
  int Experts() const { return static_cast<int>(kAllBytes / expert_bytes / kLayers); }
  // The first half of each layer; with `moved`, one expert of each layer is another.
  std::vector<OwnedExpert> Owned(bool moved) const {
    std::vector<OwnedExpert> owned;
    for (int layer = 0; layer < kLayers; ++layer)
      for (int i = 0; i < Experts() / 2; ++i) {
        const int expert = moved && i + 1 == Experts() / 2 ? Experts() - 1 : i;
        owned.push_back(
            {layer, expert, static_cast<std::uint64_t>(layer * Experts() + expert) * expert_bytes});
      }
    return owned;
  }
};

void PrepareAll(benchmark::State& state, Case c) {
  const std::vector<OwnedExpert> owned = c.Owned(false);
  std::size_t mappings = 0;
  for (auto _ : state) {
    const auto table = c.Table();
    benchmark::DoNotOptimize(table->Prepare(1, owned));
    mappings = table->Mappings();
  }
  state.counters["mappings"] = static_cast<double>(mappings);
  state.counters["experts"] = static_cast<double>(owned.size());
}

// The steady state of a server that resizes: epochs follow one another, one expert a layer differs.
void PrepareNext(benchmark::State& state, Case c) {
  const auto table = c.Table();
  const std::vector<OwnedExpert> owned[] = {c.Owned(false), c.Owned(true)};
  std::uint64_t epoch = 0;
  for (; epoch < kEpochs; ++epoch) benchmark::DoNotOptimize(table->Prepare(epoch, owned[epoch / 2 % 2]));
  for (auto _ : state) {
    benchmark::DoNotOptimize(table->Prepare(epoch, owned[epoch / 2 % 2]));
    ++epoch;
  }
  state.counters["mappings"] = static_cast<double>(table->Mappings());
}

// Reads every owned expert once, as a step of one row does: no cache holds them, each page is looked up anew.
void ReadExperts(benchmark::State& state, Case c) {
  const double before = PageTableKiB();
  const auto table = c.Table();
  const std::vector<OwnedExpert> owned = c.Owned(false);
  const auto addresses = *table->Prepare(1, owned);
  const double after = PageTableKiB();
  for (auto _ : state) {
    std::uint64_t sum = 0;
    for (const std::byte* address : addresses) {
      const auto* words = reinterpret_cast<const std::uint64_t*>(address);
      for (std::uint64_t i = 0; i < c.expert_bytes / 8; ++i) sum += words[i];
    }
    benchmark::DoNotOptimize(sum);
  }
  state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations() * owned.size() * c.expert_bytes));
  state.counters["page_tables_KiB"] = after - before;
}

// Single words all over the experts: what is left of a row's cost when page tables are all that matters.
void TouchPages(benchmark::State& state, Case c) {
  const auto table = c.Table();
  const auto addresses = *table->Prepare(1, c.Owned(false));
  std::uint64_t touched = 0;
  for (auto _ : state) {
    std::uint64_t sum = 0;
    for (std::uint64_t at = 0; at < c.expert_bytes; at += 4096)
      for (const std::byte* address : addresses) sum += *reinterpret_cast<const std::uint64_t*>(address + at);
    benchmark::DoNotOptimize(sum);
    touched += addresses.size() * (c.expert_bytes / 4096);
  }
  state.SetItemsProcessed(static_cast<std::int64_t>(touched));
}

void RegisterAll() {
  const std::pair<const char*, void (*)(benchmark::State&, Case)> bodies[] = {{"prepare_all", PrepareAll},
                                                                              {"prepare_next", PrepareNext},
                                                                              {"read", ReadExperts},
                                                                              {"touch", TouchPages}};
  for (const auto& [what, body] : bodies)
    for (const std::uint64_t mib : {1, 3, 8})
      for (const PageKind pages : {PageKind::kSmall, PageKind::kTransparentHuge})
        for (const ExpertTableKind kind : {ExpertTableKind::kPointer, ExpertTableKind::kRemap})
          benchmark::RegisterBenchmark(
              (std::string(what) + "/" + std::to_string(mib) + "MiB/" +
               (pages == PageKind::kSmall ? "4KiB_pages" : "2MiB_pages") + "/" + std::string(ToString(kind)))
                  .c_str(),
              [body = body, c = Case{kind, pages, mib * kMiB}](benchmark::State& state) { body(state, c); })
              ->Unit(benchmark::kMillisecond);
}

}  // namespace
}  // namespace elasticmoe::runtime

int main(int argc, char** argv) {
  elasticmoe::runtime::RegisterAll();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
}
