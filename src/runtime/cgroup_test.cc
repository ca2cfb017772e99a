#include "runtime/cgroup.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <string>

namespace elasticmoe::runtime {
namespace {

namespace fs = std::filesystem;

class CgroupTest : public testing::Test {
 protected:
  CgroupTest() { fs::create_directories(root_); }
  ~CgroupTest() override { fs::remove_all(root_); }
  void Write(const std::string& path, const std::string& text) {
    fs::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text;
  }
  CgroupLimits Read() const { return ReadCgroupLimits(root_); }

 private:
  const fs::path root_ = fs::temp_directory_path() / ("cgroup_test-" + std::to_string(::getpid()));
};

TEST_F(CgroupTest, NothingIsLimitedWhereNothingIsSaid) {
  const CgroupLimits none;
  EXPECT_EQ(Read().cpus, none.cpus);
  Write("proc/self/cgroup", "0::/a/b\n");
  Write("sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
  Write("sys/fs/cgroup/a/b/memory.max", "max\n");
  EXPECT_EQ(Read().cpus, none.cpus);
  EXPECT_EQ(Read().memory_bytes, none.memory_bytes);
  EXPECT_EQ(Read().free_bytes, none.free_bytes);
}

TEST_F(CgroupTest, TheTightestGroupOnTheWayUpCounts) {
  Write("proc/self/cgroup", "0::/a/b\n");
  Write("sys/fs/cgroup/a/b/cpu.max", "400000 100000\n");
  Write("sys/fs/cgroup/a/cpu.max", "150000 100000\n");
  Write("sys/fs/cgroup/a/b/memory.max", "1000000\n");
  Write("sys/fs/cgroup/a/b/memory.current", "700000\n");
  Write("sys/fs/cgroup/a/b/memory.stat", "anon 300000\ninactive_file 300000\nactive_file 100000\n");
  Write("sys/fs/cgroup/a/memory.max", "2000000\n");
  Write("sys/fs/cgroup/a/memory.current", "1900000\n");
  EXPECT_EQ(Read().cpus, 1.5);
  EXPECT_EQ(Read().memory_bytes, 1'000'000u);
  EXPECT_EQ(Read().free_bytes, 100'000u);
}

TEST_F(CgroupTest, AContainerIsToldThePathOfItsHostOrSeesItselfAsTheRoot) {
  Write("proc/self/cgroup", "0::/system.slice/docker-1.scope\n");
  Write("sys/fs/cgroup/cpu.max", "200000 100000\n");
  EXPECT_EQ(Read().cpus, 2);
  Write("proc/self/cgroup", "0::/../../elsewhere\n");
  EXPECT_EQ(Read().cpus, 2);
}

TEST_F(CgroupTest, VersionOneIsReadToo) {
  Write("proc/self/cgroup", "9:memory:/box\n4:cpu,cpuacct:/box\n1:name=systemd:/box\n");
  Write("sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us", "300000\n");
  Write("sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us", "100000\n");
  Write("sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "-1\n");
  Write("sys/fs/cgroup/memory/box/memory.limit_in_bytes", "5000\n");
  Write("sys/fs/cgroup/memory/box/memory.usage_in_bytes", "6000\n");
  EXPECT_EQ(Read().cpus, 3);
  EXPECT_EQ(Read().memory_bytes, 5000u);
  EXPECT_EQ(Read().free_bytes, 0u);
}

TEST_F(CgroupTest, NonsenseLimitsNothing) {
  Write("proc/self/cgroup", "nonsense\n0::/a\n::\n");
  Write("sys/fs/cgroup/a/cpu.max", "10e4 0\n");
  Write("sys/fs/cgroup/a/memory.max", "99999999999999999999999\n");
  EXPECT_EQ(Read().cpus, CgroupLimits{}.cpus);
  EXPECT_EQ(Read().memory_bytes, CgroupLimits{}.memory_bytes);
}

}  // namespace
}  // namespace elasticmoe::runtime
