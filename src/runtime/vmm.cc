#include "runtime/vmm.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <fstream>

#include "base/check.h"
#include "runtime/cgroup.h"
#include "runtime/vmm_calls.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Linux 5.14 and 6.1; Debian 12's C library headers may lack them.
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

namespace elasticmoe::runtime {
namespace {

std::size_t RoundUp(std::size_t value, std::size_t unit) {
  return (value + unit - 1) / unit * unit;
}

std::string FirstLine(const char* path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::size_t Meminfo(const std::string& key) {
  std::ifstream file("/proc/meminfo");
  std::string word;
  while (file >> word) {
    std::size_t kilobytes = 0;
    if (word == key && file >> kilobytes) return kilobytes << 10;
  }
  return 0;
}

// With [never], advice does nothing, and collapsing does without any setting.
bool MustCollapse() {
  static const bool must =
      FirstLine("/sys/kernel/mm/transparent_hugepage/shmem_enabled").find("[never]") != std::string::npos;
  return must;
}

}  // namespace

std::string_view ToString(PageKind kind) {
  switch (kind) {
    case PageKind::kSmall:
      return "4 KiB";
    case PageKind::kTransparentHuge:
      return "2 MiB transparent";
    case PageKind::kHugetlb:
      return "2 MiB hugetlb";
  }
  return "unknown";
}

std::size_t HugeMapped(const std::byte* data) {
  std::ifstream smaps("/proc/self/smaps");
  std::string line;
  bool inside = false;
  while (std::getline(smaps, line)) {
    unsigned long begin = 0, end = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx ", &begin, &end) == 2)
      inside =
          begin <= reinterpret_cast<std::uintptr_t>(data) && reinterpret_cast<std::uintptr_t>(data) < end;
    unsigned long kilobytes = 0;
    if (inside && std::sscanf(line.c_str(), "ShmemPmdMapped: %lu", &kilobytes) == 1) return kilobytes << 10;
    if (inside && std::sscanf(line.c_str(), "Private_Hugetlb: %lu", &kilobytes) == 1 && kilobytes > 0)
      return kilobytes << 10;
  }
  return 0;
}

Mapping::Mapping(Mapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Mapping& Mapping::operator=(Mapping&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Mapping::~Mapping() {
  if (data_ != nullptr) ::munmap(data_, bytes_);
}

Expected<Fd> CreateMemory(const std::string& name, std::size_t bytes, PageKind kind) {
  unsigned flags = MFD_CLOEXEC;
  if (kind == PageKind::kHugetlb) flags |= MFD_HUGETLB;
  Fd fd(CallMemfdCreate(name.c_str(), flags));
  if (!fd)
    return Fail(ErrorCode::kResourceExhausted, "making shared memory {}: memfd_create: {}{}", name,
                std::strerror(errno), errno == EMFILE ? "; raise ulimit -n" : "");
  if (CallFtruncate(fd.get(), static_cast<off_t>(RoundUp(bytes, kHugePage))) != 0)
    return Fail(ErrorCode::kResourceExhausted, "making shared memory {}: {} bytes: {}", name, bytes,
                std::strerror(errno));
  return fd;
}

Expected<Mapping> Reserve(std::size_t bytes) {
  const std::size_t wanted = RoundUp(bytes, kHugePage);
  void* raw =
      CallMmap(nullptr, wanted + kHugePage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED)
    return Fail(ErrorCode::kResourceExhausted, "reserving {} bytes of addresses: {}; see ulimit -v", bytes,
                std::strerror(errno));
  auto* begin = static_cast<std::byte*>(raw);
  const std::size_t skip =
      RoundUp(reinterpret_cast<std::uintptr_t>(begin), kHugePage) - reinterpret_cast<std::uintptr_t>(begin);
  if (skip > 0) ::munmap(begin, skip);
  ::munmap(begin + skip + wanted, kHugePage - skip);
  return Mapping(begin + skip, wanted);
}

Status MapInto(const Mapping& range, std::size_t at, int fd, std::size_t offset, std::size_t bytes,
               bool writable) {
  EM_CHECK(at + bytes <= range.size());
  void* result = CallMmap(range.data() + at, bytes, PROT_READ | (writable ? PROT_WRITE : 0),
                          MAP_SHARED | MAP_FIXED, fd, static_cast<off_t>(offset));
  if (result == MAP_FAILED)
    return Fail(ErrorCode::kResourceExhausted, "mapping {} bytes of shared memory: {}{}", bytes,
                std::strerror(errno), errno == ENOMEM ? "; see sysctl vm.max_map_count" : "");
  return {};
}

Status Unmap(const Mapping& range, std::size_t at, std::size_t bytes) {
  EM_CHECK(at + bytes <= range.size());
  if (CallMmap(range.data() + at, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
               -1, 0) == MAP_FAILED)
    return Fail(ErrorCode::kResourceExhausted, "unmapping {} bytes of shared memory: {}", bytes,
                std::strerror(errno));
  return {};
}

Expected<Mapping> Map(int fd, std::size_t offset, std::size_t bytes, bool writable) {
  const std::size_t lead = offset % kHugePage;  // keeps address = offset (mod 2 MiB)
  EM_ASSIGN_OR_RETURN(Mapping range, Reserve(lead + bytes));
  EM_CHECK(lead == 0, "offset={} is no multiple of 2 MiB", offset);
  EM_RETURN_IF_ERROR(MapInto(range, 0, fd, offset, bytes, writable));
  return range;
}

Status Populate(std::byte* data, std::size_t bytes, PageKind kind) {
  if (bytes == 0) return {};
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  if (kind == PageKind::kTransparentHuge) {
    CallMadvise(data - begin % kHugePage, RoundUp(begin % kHugePage + bytes, kHugePage), MADV_HUGEPAGE);
    const std::uintptr_t first = RoundUp(begin, kHugePage), last = (begin + bytes) / kHugePage * kHugePage;
    if (MustCollapse() && first < last) {
      // An empty huge page is not collapsed, one with a single small page is: far cheaper than backing all
      // small pages first. Where it fails, those come below.
      for (std::uintptr_t at = first; at < last; at += kHugePage)
        std::atomic_ref(*reinterpret_cast<std::uint8_t*>(at)).fetch_or(0);
      CallMadvise(reinterpret_cast<void*>(first), last - first, MADV_COLLAPSE);
    }
  }
  const std::uintptr_t page = begin / 4096 * 4096;
  if (CallMadvise(reinterpret_cast<void*>(page), begin + bytes - page, MADV_POPULATE_WRITE) != 0)
    return Fail(ErrorCode::kResourceExhausted,
                "backing {} bytes with memory: {}; free memory or lower the budgets", bytes,
                std::strerror(errno));
  return {};
}

#if defined(__x86_64__)
namespace {

void StreamLine(std::byte* to, const std::byte* from) {
  const auto* source = reinterpret_cast<const __m128i*>(from);
  auto* target = reinterpret_cast<__m128i*>(to);
  const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
  const __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
  _mm_stream_si128(target, a);
  _mm_stream_si128(target + 1, b);
  _mm_stream_si128(target + 2, c);
  _mm_stream_si128(target + 3, d);
}

// Four lines at a time: a tenth faster.
[[gnu::target("avx512f")]] std::size_t StreamAvx512(std::byte* to, const std::byte* from, std::size_t bytes) {
  std::size_t at = 0;
  for (; at + 256 <= bytes; at += 256)
    for (std::size_t line = at; line < at + 256; line += 64)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + line), _mm512_loadu_si512(from + line));
  return at;
}

}  // namespace
#endif

void CopyPastCaches(std::byte* to, const std::byte* from, std::size_t bytes) {
#if defined(__x86_64__)
  const std::size_t lead = std::min(bytes, (64 - reinterpret_cast<std::uintptr_t>(to) % 64) % 64);
  std::memcpy(to, from, lead);
  to += lead, from += lead, bytes -= lead;
  static const bool avx512 = __builtin_cpu_supports("avx512f");
  const std::size_t streamed = avx512 ? StreamAvx512(to, from, bytes) : 0;
  to += streamed, from += streamed, bytes -= streamed;
  for (; bytes >= 64; to += 64, from += 64, bytes -= 64) StreamLine(to, from);
  _mm_sfence();
#endif
  std::memcpy(to, from, bytes);
}

void Prefault(std::byte* data, std::size_t bytes) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data) / 4096 * 4096;
  const auto end = RoundUp(reinterpret_cast<std::uintptr_t>(data) + bytes, 4096);
  CallMadvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_READ);
}

Status Discard(int fd, std::size_t offset, std::size_t bytes) {
  if (CallFallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                    static_cast<off_t>(bytes)) != 0)
    return Fail(ErrorCode::kInternal, "giving {} bytes back: {}", bytes, std::strerror(errno));
  return {};
}

PageKind BestPageKind() {
  const std::string setting = FirstLine("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
  if (setting.find("[deny]") != setting.npos || setting.empty()) return PageKind::kSmall;
  return PageKind::kTransparentHuge;  // by advice or, with [never], by collapse
}

std::size_t MappingLimit() {
  std::ifstream file("/proc/sys/vm/max_map_count");
  std::size_t limit = 65'530;  // the kernel's default
  file >> limit;
  return limit;
}

std::size_t AvailableMemory() {
  return std::min<std::size_t>(Meminfo("MemAvailable:"), ReadCgroupLimits().free_bytes);
}
std::size_t TotalMemory() {
  return std::min<std::size_t>(Meminfo("MemTotal:"), ReadCgroupLimits().memory_bytes);
}

}  // namespace elasticmoe::runtime
