#include "compute/limits.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "base/clock.h"

namespace elasticmoe::compute {
namespace {

constexpr int kPasses = 6;
constexpr std::size_t kPiece = std::size_t{8} << 20;  // of the memory that is read

// Keeps `value` and what made it.
template <class T>
void Keep(const T& value) {
  asm volatile("" ::"m"(value) : "memory");
}

double SecondsSince(TimeNs begin) {
  return static_cast<double>(Now() - begin) * 1e-9;
}

// Some machines read faster when asked ahead, others (Zen 4, by half) when left to see it coming.
template <bool kAsk>
void ReadAll(const std::byte* data, std::size_t bytes) {
  const auto* words = reinterpret_cast<const std::uint64_t*>(data);
  std::uint64_t sums[8] = {};
  for (std::size_t at = 0; at < bytes / 8; at += 8) {
    if constexpr (kAsk) __builtin_prefetch(words + at + 256);
    for (int lane = 0; lane < 8; ++lane) sums[lane] += words[at + lane];
  }
  Keep(sums);
}

#if defined(__x86_64__)
// Each returns the operations that it did.
__attribute__((target("avx512f,avx512bf16"))) double RunAvx512Bf16() {
  constexpr int kRounds = 2'000'000;
  __m512 acc[16];
  for (__m512& a : acc) a = _mm512_setzero_ps();
  const __m512bh x = (__m512bh)_mm512_set1_epi32(0x3c003c00);
  for (int i = 0; i < kRounds; ++i) {
#pragma GCC unroll 16
    for (__m512& a : acc) a = _mm512_dpbf16_ps(a, x, x);
  }
  for (__m512& a : acc) Keep(a);
  return 16.0 * 64 * kRounds;
}

// Shapes of whole tiles: 16 rows of 64 bytes.
struct alignas(64) WholeTiles {
  std::uint8_t palette = 1, rest[15] = {};
  std::uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tiles are not loaded; AvailableKernels has asked for leave to use them.
__attribute__((target("amx-tile,amx-bf16"))) double RunAmxBf16() {
  constexpr int kRounds = 1'000'000;
  const WholeTiles config;
  Keep(config);
  _tile_loadconfig(&config);
  for (int i = 0; i < kRounds; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 4.0 * 16 * 16 * 32 * 2 * kRounds;
}

__attribute__((target("amx-tile,amx-int8"))) double RunAmxInt8() {
  constexpr int kRounds = 1'000'000;
  const WholeTiles config;
  Keep(config);
  _tile_loadconfig(&config);
  for (int i = 0; i < kRounds; ++i) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
  return 4.0 * 16 * 16 * 64 * 2 * kRounds;
}

__attribute__((target("avx2,fma"))) double RunAvx2() {
  constexpr int kRounds = 2'000'000;
  __m256 acc[12];
  for (__m256& a : acc) a = _mm256_setzero_ps();
  const __m256 x = _mm256_set1_ps(0.5F);
  for (int i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
    for (__m256& a : acc) a = _mm256_fmadd_ps(a, x, x);
  }
  for (__m256& a : acc) Keep(a);
  return 12.0 * 16 * kRounds;
}

__attribute__((target("avx512f,avx512vnni"))) double RunVnni() {
  constexpr int kRounds = 2'000'000;
  __m512i acc[16];
  for (__m512i& a : acc) a = _mm512_setzero_si512();
  const __m512i x = _mm512_set1_epi8(1);
  for (int i = 0; i < kRounds; ++i) {
#pragma GCC unroll 16
    for (__m512i& a : acc) a = _mm512_dpbusd_epi32(a, x, x);
  }
  for (__m512i& a : acc) Keep(a);
  return 16.0 * 128 * kRounds;
}

// Without VNNI bytes are multiplied as 16 bits, in pairs (quantized_avx2.cc).
__attribute__((target("avx2"))) double RunAvx2Int8() {
  constexpr int kRounds = 2'000'000;
  __m256i acc[8];
  for (__m256i& a : acc) a = _mm256_setzero_si256();
  __m256i x = _mm256_set1_epi16(1);
  for (int i = 0; i < kRounds; ++i) {
    Keep(x);  // else the product is taken out of the loop
#pragma GCC unroll 8
    for (__m256i& a : acc) a = _mm256_add_epi32(a, _mm256_madd_epi16(x, a));
  }
  for (__m256i& a : acc) Keep(a);
  return 8.0 * 32 * kRounds;
}
#endif

}  // namespace

ReadProbe::ReadProbe(ThreadPool& threads) {
  for (std::size_t bytes = std::size_t{1} << 30; bytes >= std::size_t{512} << 20; bytes /= 2) {
    void* memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) continue;
    ::madvise(memory, bytes, MADV_HUGEPAGE);
    threads.Run(static_cast<int>(bytes / kPiece),
                [&](int i) { std::memset(static_cast<std::byte*>(memory) + i * kPiece, 1, kPiece); });
    memory_ = memory;
    bytes_ = bytes;
    return;
  }
}

ReadProbe::~ReadProbe() {
  if (memory_ != nullptr) ::munmap(memory_, bytes_);
}

double ReadProbe::BytesPerSecond(ThreadPool& threads) const {
  double best = 0;
  for (int pass = 0; pass < kPasses && memory_ != nullptr; ++pass) {
    const TimeNs begin = Now();
    const auto read = pass % 2 == 0 ? ReadAll<false> : ReadAll<true>;
    threads.Run(static_cast<int>(bytes_ / kPiece),
                [&](int i) { read(static_cast<const std::byte*>(memory_) + i * kPiece, kPiece); });
    best = std::max(best, static_cast<double>(bytes_) / SecondsSince(begin));
  }
  return best;
}

double DotPeak([[maybe_unused]] const Kernels& kernels, [[maybe_unused]] WeightFormat format,
               ThreadPool& threads) {
  double (*run)() = nullptr;
#if defined(__x86_64__)
  const bool wide = kernels.name == "amxbf16" || kernels.name == "avx512bf16";
  if (format != WeightFormat::kBf16) {
    if (kernels.name == "amxbf16") {
      run = RunAmxInt8;
    } else if (wide && __builtin_cpu_supports("avx512vnni")) {
      run = RunVnni;
    } else if (wide || kernels.name == "avx2") {
      run = RunAvx2Int8;
    }
  } else {
    if (kernels.name == "amxbf16") run = RunAmxBf16;
    if (kernels.name == "avx512bf16") run = RunAvx512Bf16;
    if (kernels.name == "avx2") run = RunAvx2;
  }
#endif
  if (run == nullptr) return 0;
  double best = 0;
  for (int pass = 0; pass < 3; ++pass) {
    std::vector<double> operations(static_cast<std::size_t>(threads.Size()));
    const TimeNs begin = Now();
    threads.Run(threads.Size(), [&](int i) { operations[static_cast<std::size_t>(i)] = run(); });
    const double seconds = SecondsSince(begin);
    double sum = 0;
    for (const double some : operations) sum += some;
    best = std::max(best, sum / seconds);
  }
  return best;
}

}  // namespace elasticmoe::compute
