// Physical memory as objects that can be mapped by several processes (memfd), and mappings of it. The
// mechanism under the HMM and the workers; it decides nothing. Effects: mmap and friends.
//
// All addresses and file offsets agree modulo 2 MiB: only then does the kernel map huge pages as such.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "base/error.h"
#include "runtime/fd.h"

namespace elasticmoe::runtime {

inline constexpr std::size_t kHugePage = std::size_t{2} << 20;

enum class PageKind { kSmall, kTransparentHuge, kHugetlb };
std::string_view ToString(PageKind kind);

// A range of addresses that is unmapped by its owner.
class Mapping {
 public:
  Mapping() = default;
  Mapping(std::byte* data, std::size_t bytes) : data_(data), bytes_(bytes) {}
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&& other) noexcept;
  ~Mapping();

  std::byte* data() const { return data_; }
  std::size_t size() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// Bytes of memory without a name in any file system; zero where never written, and taking no memory there.
// `kind` = what was asked for; see Populate for what one gets. kResourceExhausted names the limit.
Expected<Fd> CreateMemory(const std::string& name, std::size_t bytes, PageKind kind);

// Maps [offset, offset + bytes) of `fd`, readable and writable (read-only if !writable), at a 2 MiB-aligned
// address. REQUIRES: offset a multiple of 4 KiB.
Expected<Mapping> Map(int fd, std::size_t offset, std::size_t bytes, bool writable);

// Reserves addresses without memory, then maps pieces of memory into them, over what was there
// (readers never fault, but may see old and new mixed: only for pages that no step reads).
Expected<Mapping> Reserve(std::size_t bytes);
Status MapInto(const Mapping& range, std::size_t at, int fd, std::size_t offset, std::size_t bytes,
               bool writable);

// Back to addresses without memory.
Status Unmap(const Mapping& range, std::size_t at, std::size_t bytes);

// Backs the range with memory now, in huge pages where `kind` asks for them and whole ones lie in the range
// (by advice where the system allows it, else by MADV_COLLAPSE). What is there stays. kResourceExhausted if
// memory runs out.
Status Populate(std::byte* data, std::size_t bytes, PageKind kind);

// Bytes of the mapping at `data` that this process has mapped by 2 MiB entries. Reads /proc: milliseconds.
std::size_t HugeMapped(const std::byte* data);

// memcpy for megabytes: past the caches, so that it neither empties them nor reads what it overwrites (1.7
// times faster than memcpy for an expert of 3 MiB here).
void CopyPastCaches(std::byte* to, const std::byte* from, std::size_t bytes);

// Makes this process's page tables for a range that is backed already, so that no step pays for it. Best
// effort.
void Prefault(std::byte* data, std::size_t bytes);

// Gives the memory of a range of `fd` back to the machine; it reads as zero afterwards.
Status Discard(int fd, std::size_t offset, std::size_t bytes);

// kTransparentHuge where the kernel can (advice or collapse), else kSmall.
PageKind BestPageKind();

// Mappings that a process may have (vm.max_map_count).
std::size_t MappingLimit();

// Memory that the machine, within the limits of this process's control groups, could give now (MemAvailable)
// and has, bytes.
std::size_t AvailableMemory();
std::size_t TotalMemory();

}  // namespace elasticmoe::runtime
