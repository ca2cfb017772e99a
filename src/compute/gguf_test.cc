// A model's logits do not depend on the file it comes from.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>

#include "compute/test_model.h"
#include "model/gguf/export.h"

namespace elasticmoe::compute {
namespace {

using model::Encoding;
using testing::Driver;
using testing::TestModel;

const int kNoCpu[] = {-1, -1};
const std::vector<TokenId> kPrompt = {100, 200, 7, 250, 30, 31, 32, 5, 6, 77, 12, 319 % 300};

std::vector<float> Logits(const TestModel& model) {
  ThreadPool threads(kNoCpu);
  Driver driver(model, *FindKernels("reference").value(), threads, static_cast<int>(kPrompt.size()), 2);
  return driver.Step({{0, kPrompt}});
}

class GgufLogits : public ::testing::TestWithParam<const char*> {
 protected:
  TestModel Exported(Encoding encoding) {
    const auto path = std::filesystem::path(::testing::TempDir()) /
                      fmt::format("elasticmoe-logits-{}-{}.gguf", getpid(), GetParam()[0]);
    const auto written = model::ExportGguf({Directory(), path, encoding});
    EXPECT_TRUE(written) << written.error().message;
    TestModel model = TestModel::Load(path);
    std::filesystem::remove(path);
    return model;
  }
  static std::filesystem::path Directory() {
    return std::string(GetParam()) == "demo"
               ? std::filesystem::path(ELASTICMOE_MODELS) / "demo"
               : std::filesystem::path(ELASTICMOE_TESTDATA) / "goldens" / GetParam();
  }
};
INSTANTIATE_TEST_SUITE_P(Models, GgufLogits,
                         ::testing::Values("demo", "mixtral", "qwen2_moe", "olmoe", "deepseek_v2_lite",
                                           "deepseek_v3", "glm4_moe", "gpt_oss_mxfp4"));

TEST_P(GgufLogits, OfBf16AreThoseOfTheDirectory) {
  EXPECT_EQ(Logits(Exported(Encoding::kBf16)), Logits(TestModel::Load(Directory())));
}

TEST_P(GgufLogits, OfQuantisedWeightsAreNear) {
  const std::vector<float> want = Logits(TestModel::Load(Directory()));
  const auto distance = [&](const std::vector<float>& got) {  // root mean square, as a share of the logits'
    double squares = 0, all = 0;
    for (std::size_t i = 0; i < want.size(); ++i) {
      squares += (got[i] - want[i]) * (got[i] - want[i]);
      all += want[i] * want[i];
    }
    return std::sqrt(squares / all);
  };
  const double q8 = distance(Logits(Exported(Encoding::kQ8_0)));
  const double q4 = distance(Logits(Exported(Encoding::kQ4_0)));
  EXPECT_GT(q8, 0);
  EXPECT_LT(q8, 0.05);
  EXPECT_LT(q8, q4);
  EXPECT_LT(q4, 0.5);
}

}  // namespace
}  // namespace elasticmoe::compute
