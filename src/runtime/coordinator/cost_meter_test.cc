#include "runtime/coordinator/cost_meter.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>

namespace elasticmoe::runtime {
namespace {

namespace fs = std::filesystem;
constexpr TimeNs kSecond = 1'000'000'000;

class Powercap : public ::testing::Test {
 protected:
  void SetUp() override {
    root_ = fs::temp_directory_path() / ("powercap-" + std::to_string(::getpid()));
    fs::remove_all(root_);
    for (const char* zone : {"intel-rapl", "intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"})
      fs::create_directories(root_ / zone);
    for (const char* zone : {"intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"}) {
      Write(zone, "max_energy_range_uj", 1'000'000'000);
      Write(zone, "energy_uj", 5'000'000);
    }
  }
  void TearDown() override { fs::remove_all(root_); }
  void Write(const std::string& zone, const char* file, std::uint64_t value) {
    std::ofstream(root_ / zone / file) << value << "\n";
  }
  fs::path root_;
};

TEST_F(Powercap, PackagesAreSummedAndTheirPartsAreNot) {
  auto counters = EnergyCounters::Open(root_);
  ASSERT_TRUE(counters);
  Write("intel-rapl:0", "energy_uj", 7'000'000);
  Write("intel-rapl:1", "energy_uj", 6'000'000);
  Write("intel-rapl:0:0", "energy_uj", 90'000'000);
  EXPECT_DOUBLE_EQ(3, counters->Joules());
}

TEST_F(Powercap, ACounterThatWrapsGoesOn) {
  auto counters = EnergyCounters::Open(root_);
  Write("intel-rapl:0", "energy_uj", 999'000'000);
  EXPECT_DOUBLE_EQ(994, counters->Joules());
  Write("intel-rapl:0", "energy_uj", 1'000'000);
  EXPECT_DOUBLE_EQ(996, counters->Joules());
}

TEST_F(Powercap, NoneWhereTheMachineHasNone) {
  EXPECT_FALSE(EnergyCounters::Open(root_ / "absent"));
  fs::remove(root_ / "intel-rapl:0" / "energy_uj");
  fs::remove(root_ / "intel-rapl:1" / "energy_uj");
  EXPECT_FALSE(EnergyCounters::Open(root_));
}

TEST(CostMeter, DevicesCountFromWhenTheyAreSetUntilTheyAreGone) {
  CostMeter meter(1, std::nullopt);
  meter.SetDevices(10 * kSecond, 2);
  meter.SetDevices(13 * kSecond, 1);
  meter.SetDevices(14 * kSecond, 0);
  EXPECT_DOUBLE_EQ(7, meter.Read(20 * kSecond, 0).device_s);
}

TEST(CostMeter, TheModelChargesIdleAndBusyCores) {
  CostMeter meter(4, std::nullopt);
  meter.SetDevices(0, 2);
  const CostStats cost = meter.Read(10 * kSecond, 5);
  EXPECT_FALSE(cost.measured);
  EXPECT_DOUBLE_EQ(4 * (15 * kIdleWatts + 5 * kBusyWatts), cost.joules);
}

TEST_F(Powercap, CountersAreTakenWhereTheyAre) {
  CostMeter meter(1, EnergyCounters::Open(root_));
  meter.SetDevices(0, 1);
  Write("intel-rapl:1", "energy_uj", 45'000'000);
  const CostStats cost = meter.Read(kSecond, 0);
  EXPECT_TRUE(cost.measured);
  EXPECT_DOUBLE_EQ(40, cost.joules);
}

}  // namespace
}  // namespace elasticmoe::runtime
