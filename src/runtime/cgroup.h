// What the control groups of this process leave it of the machine: a container's CPU quota and memory limit.
// Version 2 and version 1. Effects: reads files. Thread-safe.
#pragma once

#include <cstdint>
#include <filesystem>
#include <limits>

namespace elasticmoe::runtime {

struct CgroupLimits {
  double cpus = std::numeric_limits<double>::infinity();  // of time, whatever cores it is spent on
  std::uint64_t memory_bytes = std::numeric_limits<std::uint64_t>::max();
  std::uint64_t free_bytes =
      std::numeric_limits<std::uint64_t>::max();  // of that, page cache counted as free
};

// The tightest of the process's group and all above it. What cannot be read or understood limits nothing.
// Files are looked for under `root`: https://docs.kernel.org/admin-guide/cgroup-v2.html (cpu.max, memory.max,
// memory.current, memory.stat) and cgroup-v1 (cpu.cfs_quota_us, memory.limit_in_bytes, ...).
CgroupLimits ReadCgroupLimits(const std::filesystem::path& root = "/");

}  // namespace elasticmoe::runtime
