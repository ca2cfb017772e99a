#include "cli/machine_speed.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "runtime/vmm.h"

namespace elasticmoe::cli {

Expected<double> CopyBandwidth() {
  constexpr std::size_t kBytes = std::size_t{128} << 20, kPiece = std::size_t{8} << 20;
  const runtime::PageKind pages = runtime::BestPageKind();
  EM_ASSIGN_OR_RETURN(const runtime::Fd from_fd, runtime::CreateMemory("bench-from", kBytes, pages));
  EM_ASSIGN_OR_RETURN(const runtime::Mapping from, runtime::Map(from_fd.get(), 0, kBytes, true));
  EM_RETURN_IF_ERROR(runtime::Populate(from.data(), kBytes, pages));
  double best = 0;
  for (int round = 0; round < 5; ++round) {
    EM_ASSIGN_OR_RETURN(const runtime::Fd to_fd, runtime::CreateMemory("bench-to", kBytes, pages));
    EM_ASSIGN_OR_RETURN(const runtime::Mapping to, runtime::Map(to_fd.get(), 0, kBytes, true));
    const auto start = std::chrono::steady_clock::now();
    for (std::size_t at = 0; at < kBytes; at += kPiece) {
      EM_RETURN_IF_ERROR(runtime::Populate(to.data() + at, kPiece, pages));
      runtime::CopyPastCaches(to.data() + at, from.data() + at, kPiece);
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, kBytes / seconds);
  }
  return best;
}

Expected<double> ParallelCopyBandwidth(std::size_t bytes, int threads) {
  constexpr std::size_t kPiece = std::size_t{1} << 20;
  const runtime::PageKind pages = runtime::BestPageKind();
  if (2 * bytes > runtime::AvailableMemory())
    return Fail(ErrorCode::kResourceExhausted, "measuring copies: {} MiB twice (available={} MiB)",
                bytes >> 20, runtime::AvailableMemory() >> 20);
  EM_ASSIGN_OR_RETURN(const runtime::Fd from_fd, runtime::CreateMemory("bench-from", bytes, pages));
  EM_ASSIGN_OR_RETURN(const runtime::Fd to_fd, runtime::CreateMemory("bench-to", bytes, pages));
  EM_ASSIGN_OR_RETURN(const runtime::Mapping from, runtime::Map(from_fd.get(), 0, bytes, true));
  EM_ASSIGN_OR_RETURN(const runtime::Mapping to, runtime::Map(to_fd.get(), 0, bytes, true));
  for (const runtime::Mapping* mapping : {&from, &to})
    EM_RETURN_IF_ERROR(runtime::Populate(mapping->data(), bytes, pages));
  double best = 0;
  for (int round = 0; round < 6; ++round) {
    std::atomic<std::size_t> next{0};
    const auto copy = [&] {
      for (std::size_t at; (at = next.fetch_add(kPiece)) < bytes;) {
        const std::size_t piece = std::min(kPiece, bytes - at);
        // Which of the two is the faster depends on the machine.
        if (round % 2 == 0)
          std::memcpy(to.data() + at, from.data() + at, piece);
        else
          runtime::CopyPastCaches(to.data() + at, from.data() + at, piece);
      }
    };
    const auto start = std::chrono::steady_clock::now();
    {
      std::vector<std::jthread> others;
      for (int i = 1; i < threads; ++i) others.emplace_back(copy);
      copy();
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, static_cast<double>(bytes) / seconds);
  }
  return best;
}

}  // namespace elasticmoe::cli
