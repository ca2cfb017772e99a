#include "runtime/cgroup.h"

#include <algorithm>
#include <charconv>
#include <fstream>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>

namespace elasticmoe::runtime {
namespace {

namespace fs = std::filesystem;

std::optional<std::uint64_t> Number(std::string_view text) {
  std::uint64_t number = 0;
  const auto [end, code] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (code != std::errc() || end != text.data() + text.size()) return std::nullopt;  // "max", "-1"
  return number;
}

// The file's first words.
std::optional<std::uint64_t> NumberIn(const fs::path& path) {
  std::string word;
  std::ifstream(path) >> word;
  return Number(word);
}

std::uint64_t Field(const fs::path& path, std::string_view name) {
  std::ifstream file(path);
  std::string key, value;
  while (file >> key >> value)
    if (key == name) return Number(value).value_or(0);
  return 0;
}

void Lower(std::optional<std::uint64_t> quota, std::optional<std::uint64_t> period, CgroupLimits& limits) {
  if (quota && period && *quota > 0 && *period > 0)
    limits.cpus = std::min(limits.cpus, static_cast<double>(*quota) / static_cast<double>(*period));
}

void Lower(std::optional<std::uint64_t> limit, std::uint64_t used, std::uint64_t cached,
           CgroupLimits& limits) {
  if (!limit) return;
  const std::uint64_t taken = used - std::min(used, cached);
  limits.memory_bytes = std::min(limits.memory_bytes, *limit);
  limits.free_bytes = std::min(limits.free_bytes, *limit - std::min(*limit, taken));
}

void ReadVersion2(const fs::path& group, CgroupLimits& limits) {
  std::string quota, period;
  std::ifstream(group / "cpu.max") >> quota >> period;
  Lower(Number(quota), Number(period), limits);
  const fs::path stat = group / "memory.stat";
  Lower(NumberIn(group / "memory.max"), NumberIn(group / "memory.current").value_or(0),
        Field(stat, "inactive_file") + Field(stat, "active_file"), limits);
}

void ReadVersion1Cpu(const fs::path& group, CgroupLimits& limits) {
  Lower(NumberIn(group / "cpu.cfs_quota_us"), NumberIn(group / "cpu.cfs_period_us"), limits);
}

void ReadVersion1Memory(const fs::path& group, CgroupLimits& limits) {
  const fs::path stat = group / "memory.stat";
  Lower(NumberIn(group / "memory.limit_in_bytes"), NumberIn(group / "memory.usage_in_bytes").value_or(0),
        Field(stat, "total_inactive_file") + Field(stat, "total_active_file"), limits);
}

// `read` for the group and those above it, up to the mount. A container that sees its own group as the
// mount's root may still be told the host's path: then the mount alone is there.
template <class Read>
void ReadUpwards(const fs::path& mount, const std::string& path, CgroupLimits& limits, const Read& read) {
  fs::path group = (mount / fs::path(path).relative_path()).lexically_normal();
  std::error_code ignored;
  for (; group != mount && group.has_relative_path(); group = group.parent_path())
    if (fs::is_directory(group, ignored)) read(group, limits);
  read(mount, limits);
}

}  // namespace

CgroupLimits ReadCgroupLimits(const fs::path& root) {
  CgroupLimits limits;
  const fs::path mounts = (root / "sys/fs/cgroup").lexically_normal();
  // Lines of ID:CONTROLLERS:PATH, no controllers in version 2.
  std::ifstream groups(root / "proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const std::size_t first = line.find(':');
    const std::size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string path = line.substr(second + 1);
    if (path.find("..") != std::string::npos) path.clear();  // outside of what this process may see
    if (controllers.empty()) ReadUpwards(mounts, path, limits, ReadVersion2);
    std::istringstream names(controllers);
    for (std::string name; std::getline(names, name, ',');) {
      if (name == "cpu") {
        for (const std::string& mount : {std::string("cpu"), controllers})
          ReadUpwards(mounts / mount, path, limits, ReadVersion1Cpu);
      }
      if (name == "memory") ReadUpwards(mounts / "memory", path, limits, ReadVersion1Memory);
    }
  }
  return limits;
}

}  // namespace elasticmoe::runtime
