// Each format against blocks that are put together here from chosen scales and levels, by the documented
// order of their bits, and whose values are then computed in float64.
#include "model/encoding.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <set>

#include "base/file.h"
#include "base/json.h"
#include "base/rng.h"
#include "model/numbers.h"

namespace elasticmoe::model {
namespace {

using Bytes = std::vector<std::uint8_t>;

std::vector<float> Decoded(Encoding encoding, const Bytes& bytes) {
  const std::size_t blocks = bytes.size() / BlockBytes(encoding);
  EXPECT_EQ(bytes.size(), blocks * BlockBytes(encoding));
  std::vector<float> out(blocks * BlockValues(encoding));
  Decode(encoding, reinterpret_cast<const std::byte*>(bytes.data()), out.size(), out.data());
  return out;
}

void Half(Bytes& bytes, std::uint16_t half) {
  bytes.push_back(half & 0xff);
  bytes.push_back(half >> 8);
}

// Products and one difference of float32: a few units in the last place.
void ExpectNear(const std::vector<float>& got, const std::vector<double>& want) {
  ASSERT_EQ(got.size(), want.size());
  double largest = 0;
  for (const double value : want) largest = std::max(largest, std::fabs(value));
  for (std::size_t i = 0; i < got.size(); ++i) ASSERT_NEAR(got[i], want[i], largest * 1e-6) << "value " << i;
}

TEST(Numbers, HalfsOfAllBitsReadAsIeeeSaysAndComeBack) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const double sign = half & 0x8000 ? -1 : 1;
    const float value = HalfToFloat(half);
    if (exponent == 31) {
      EXPECT_EQ(std::isnan(value), mantissa != 0) << bits;
      if (mantissa == 0) {
        EXPECT_EQ(value, sign * std::numeric_limits<float>::infinity());
      }
    } else {
      const double size = exponent == 0 ? mantissa * 0x1p-24 : (1024 + mantissa) * std::exp2(exponent - 25);
      ASSERT_EQ(value, sign * size) << bits;
    }
    if (!std::isnan(value)) {
      ASSERT_EQ(FloatToHalf(value), half);
    }
  }
}

TEST(Numbers, HalfsRoundToTheNearestAndToEvenBetween) {
  EXPECT_EQ(FloatToHalf(1.0F + 0x1p-11F), 0x3c00);  // a tie: to even
  EXPECT_EQ(FloatToHalf(1.0F + 3 * 0x1p-11F), 0x3c02);
  EXPECT_EQ(FloatToHalf(std::nextafter(1.0F + 0x1p-11F, 2.0F)), 0x3c01);
  EXPECT_EQ(FloatToHalf(2047.5F * 0x1p-25F), 0x0400);  // from subnormal into normal
  EXPECT_EQ(FloatToHalf(0x1p-25F), 0);
  EXPECT_EQ(FloatToHalf(0x1.8p-25F), 1);
  EXPECT_EQ(FloatToHalf(2047.75F), 0x6800);  // carries into the exponent
  EXPECT_EQ(FloatToHalf(65519.9F), 0x7bff);
  EXPECT_EQ(FloatToHalf(65520.0F), 0x7c00);
  EXPECT_EQ(FloatToHalf(-1e30F), 0xfc00);
  EXPECT_TRUE(std::isnan(HalfToFloat(FloatToHalf(std::nanf("")))));
}

TEST(Numbers, F8E4M3IsWhatOcpDefines) {
  // Table 1 of the specification: landmarks, then steps of one mantissa unit.
  EXPECT_EQ(F8E4M3ToFloat(0x00), 0.0F);
  EXPECT_TRUE(std::signbit(F8E4M3ToFloat(0x80)));
  EXPECT_EQ(F8E4M3ToFloat(0x01), 0x1p-9F);
  EXPECT_EQ(F8E4M3ToFloat(0x07), 7 * 0x1p-9F);
  EXPECT_EQ(F8E4M3ToFloat(0x08), 0x1p-6F);
  EXPECT_EQ(F8E4M3ToFloat(0x38), 1.0F);
  EXPECT_EQ(F8E4M3ToFloat(0x7e), 448.0F);
  EXPECT_TRUE(std::isnan(F8E4M3ToFloat(0x7f)));
  EXPECT_TRUE(std::isnan(F8E4M3ToFloat(0xff)));
  float step = 0x1p-9F;
  for (int bits = 1; bits < 0x7f; ++bits) {
    if (bits % 8 == 1 && bits > 16) step *= 2;
    EXPECT_EQ(F8E4M3ToFloat(bits) - F8E4M3ToFloat(bits - 1), step) << bits;
    EXPECT_EQ(F8E4M3ToFloat(bits | 0x80), -F8E4M3ToFloat(bits));
  }
}

TEST(Numbers, F4E2M1AndItsScalesAreWhatOcpDefines) {
  const float levels[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  for (int bits = 0; bits < 8; ++bits) {
    EXPECT_EQ(F4E2M1ToFloat(bits), levels[bits]);
    EXPECT_EQ(F4E2M1ToFloat(bits | 8), -levels[bits]);
  }
  EXPECT_EQ(E8M0ToFloat(127), 1.0F);
  EXPECT_EQ(E8M0ToFloat(0), 0x1p-127F);
  EXPECT_EQ(E8M0ToFloat(254), 0x1p127F);
  EXPECT_TRUE(std::isnan(E8M0ToFloat(255)));
}

TEST(Encodings, PlainNumbersDecode) {
  EXPECT_EQ(Decoded(Encoding::kBf16, {0x80, 0x3f, 0x00, 0xc0}), (std::vector<float>{1.0F, -2.0F}));
  EXPECT_EQ(Decoded(Encoding::kF16, {0x00, 0x3c}), (std::vector<float>{1.0F}));
  EXPECT_EQ(Decoded(Encoding::kF32, {0, 0, 0x20, 0x41}), (std::vector<float>{10.0F}));
  EXPECT_EQ(Decoded(Encoding::kF8E4M3, {0x38, 0xc0}), (std::vector<float>{1.0F, -2.0F}));
  EXPECT_EQ(Decoded(Encoding::kF4E2M1, {0x72, 0x9f}), (std::vector<float>{1.0F, 6.0F, -6.0F, -0.5F}));
}

class Blocks : public ::testing::TestWithParam<std::uint64_t> {
 protected:
  int Random(int below) { return static_cast<int>(rng_.Uniform() * below); }
  std::uint16_t RandomHalf() { return FloatToHalf(static_cast<float>(rng_.Uniform() * 2 - 1)); }
  // 16 bytes: levels 0 to 15 in the low halves.
  static void Nibbles(Bytes& bytes, const std::vector<int>& levels) {
    for (int i = 0; i < 16; ++i)
      bytes.push_back(static_cast<std::uint8_t>((levels[i] & 15) | (levels[i + 16] & 15) << 4));
  }
  std::vector<int> Levels(int count, int below) {
    std::vector<int> levels(count);
    for (int& level : levels) level = Random(below);
    return levels;
  }

  Rng rng_{GetParam()};
};
INSTANTIATE_TEST_SUITE_P(Seeds, Blocks, ::testing::Values(1, 2, 3));

TEST_P(Blocks, Of32FourBits) {
  const auto d = RandomHalf(), m = RandomHalf();
  const std::vector<int> levels = Levels(32, 16);
  Bytes q40, q41, nl, mx{124};
  Half(q40, d);
  Half(q41, d), Half(q41, m);
  Half(nl, d);
  for (Bytes* bytes : {&q40, &q41, &nl, &mx}) Nibbles(*bytes, levels);
  const int curve[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  const double fp4[] = {0, .5, 1, 1.5, 2, 3, 4, 6, 0, -.5, -1, -1.5, -2, -3, -4, -6};
  std::vector<double> w40, w41, wnl, wmx;
  for (const int level : levels) {
    w40.push_back(double(HalfToFloat(d)) * (level - 8));
    w41.push_back(double(HalfToFloat(d)) * level + double(HalfToFloat(m)));
    wnl.push_back(double(HalfToFloat(d)) * curve[level]);
    wmx.push_back(fp4[level] / 8);
  }
  ExpectNear(Decoded(Encoding::kQ4_0, q40), w40);
  ExpectNear(Decoded(Encoding::kQ4_1, q41), w41);
  ExpectNear(Decoded(Encoding::kIq4Nl, nl), wnl);
  ExpectNear(Decoded(Encoding::kMxfp4, mx), wmx);
}

TEST_P(Blocks, Of32FiveAndEightBits) {
  const auto d = RandomHalf(), m = RandomHalf();
  const std::vector<int> levels = Levels(32, 32);
  std::uint32_t fifth = 0;
  for (int i = 0; i < 32; ++i) fifth |= static_cast<std::uint32_t>(levels[i] >> 4) << i;
  Bytes q50, q51, q80;
  Half(q50, d);
  Half(q51, d), Half(q51, m);
  for (Bytes* bytes : {&q50, &q51}) {
    for (int byte = 0; byte < 4; ++byte) bytes->push_back(fifth >> (8 * byte) & 0xff);
    Nibbles(*bytes, levels);
  }
  Half(q80, d);
  std::vector<double> w50, w51, w80;
  for (const int level : levels) {
    const int signed8 = level * 8 - 128;
    q80.push_back(static_cast<std::uint8_t>(signed8));
    w50.push_back(double(HalfToFloat(d)) * (level - 16));
    w51.push_back(double(HalfToFloat(d)) * level + double(HalfToFloat(m)));
    w80.push_back(double(HalfToFloat(d)) * signed8);
  }
  ExpectNear(Decoded(Encoding::kQ5_0, q50), w50);
  ExpectNear(Decoded(Encoding::kQ5_1, q51), w51);
  ExpectNear(Decoded(Encoding::kQ8_0, q80), w80);
}

TEST_P(Blocks, Of256TwoAndThreeBits) {
  const auto d = RandomHalf(), m = RandomHalf();
  const std::vector<int> two = Levels(256, 4), three = Levels(256, 8);
  const std::vector<int> scale = Levels(16, 16), min = Levels(16, 16), scale6 = Levels(16, 64);
  std::vector<double> w2(256), w3(256);
  Bytes q2, low2(64), high3(32), low3(64), scales3(12);
  for (int i = 0; i < 16; ++i) q2.push_back(static_cast<std::uint8_t>(scale[i] | min[i] << 4));
  // Two halves of 128; in each, four quarters of 32 share 32 bytes, two bits each.
  int at = 0;
  for (int half = 0; half < 2; ++half) {
    for (int quarter = 0; quarter < 4; ++quarter) {
      for (int i = 0; i < 32; ++i, ++at) {
        low2[half * 32 + i] |= two[at] << (2 * quarter);
        low3[half * 32 + i] |= (three[at] & 3) << (2 * quarter);
        high3[i] |= (three[at] >> 2) << (half * 4 + quarter);
        w2[at] = double(HalfToFloat(d)) * scale[at / 16] * two[at] - double(HalfToFloat(m)) * min[at / 16];
        w3[at] = double(HalfToFloat(d)) * (scale6[at / 16] - 32) * (three[at] - 4);
      }
    }
  }
  for (int i = 0; i < 16; ++i) {  // low 4 bits in 8 bytes, high 2 bits in 4
    scales3[i % 8] |= (scale6[i] & 15) << (i / 8 * 4);
    scales3[8 + i % 4] |= (scale6[i] >> 4) << (i / 4 * 2);
  }
  q2.insert(q2.end(), low2.begin(), low2.end());
  Half(q2, d), Half(q2, m);
  Bytes q3 = high3;
  q3.insert(q3.end(), low3.begin(), low3.end());
  q3.insert(q3.end(), scales3.begin(), scales3.end());
  Half(q3, d);
  ExpectNear(Decoded(Encoding::kQ2K, q2), w2);
  ExpectNear(Decoded(Encoding::kQ3K, q3), w3);
}

TEST_P(Blocks, Of256FourAndFiveBits) {
  const auto d = RandomHalf(), m = RandomHalf();
  const std::vector<int> five = Levels(256, 32), scale = Levels(8, 64), min = Levels(8, 64);
  Bytes scales(12), nibbles(128), high(32);
  for (int i = 0; i < 4; ++i) {  // the first four whole, of the others 4 bits and, above the first, 2
    scales[i] = static_cast<std::uint8_t>(scale[i] | scale[i + 4] >> 4 << 6);
    scales[i + 4] = static_cast<std::uint8_t>(min[i] | min[i + 4] >> 4 << 6);
    scales[i + 8] = static_cast<std::uint8_t>((scale[i + 4] & 15) | (min[i + 4] & 15) << 4);
  }
  std::vector<double> w4(256), w5(256);
  for (int chunk = 0; chunk < 4; ++chunk) {
    for (int i = 0; i < 32; ++i) {
      const int a = five[chunk * 64 + i], b = five[chunk * 64 + 32 + i];
      nibbles[chunk * 32 + i] = static_cast<std::uint8_t>((a & 15) | (b & 15) << 4);
      high[i] |= a >> 4 << (2 * chunk) | b >> 4 << (2 * chunk + 1);
    }
  }
  for (int i = 0; i < 256; ++i) {
    w4[i] = double(HalfToFloat(d)) * scale[i / 32] * (five[i] & 15) - double(HalfToFloat(m)) * min[i / 32];
    w5[i] = double(HalfToFloat(d)) * scale[i / 32] * five[i] - double(HalfToFloat(m)) * min[i / 32];
  }
  Bytes q4;
  Half(q4, d), Half(q4, m);
  q4.insert(q4.end(), scales.begin(), scales.end());
  Bytes q5 = q4;
  q5.insert(q5.end(), high.begin(), high.end());
  for (Bytes* bytes : {&q4, &q5}) bytes->insert(bytes->end(), nibbles.begin(), nibbles.end());
  ExpectNear(Decoded(Encoding::kQ4K, q4), w4);
  ExpectNear(Decoded(Encoding::kQ5K, q5), w5);
}

TEST_P(Blocks, Of256SixBitsAndTheCurve) {
  const auto d = RandomHalf();
  const std::vector<int> six = Levels(256, 64), scale = Levels(16, 256), group = Levels(8, 64);
  Bytes low(128), high(64), q6, xs, xs_nibbles;
  std::vector<double> w6(256), wxs(256);
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 32; ++i) {
      const int* level = &six[half * 128];
      low[half * 64 + i] = static_cast<std::uint8_t>((level[i] & 15) | (level[i + 64] & 15) << 4);
      low[half * 64 + 32 + i] = static_cast<std::uint8_t>((level[i + 32] & 15) | (level[i + 96] & 15) << 4);
      for (int quarter = 0; quarter < 4; ++quarter)
        high[half * 32 + i] |= level[quarter * 32 + i] >> 4 << (2 * quarter);
    }
  }
  q6 = low;
  q6.insert(q6.end(), high.begin(), high.end());
  for (const int s : scale) q6.push_back(static_cast<std::uint8_t>(s));
  Half(q6, d);
  const int curve[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  std::uint16_t scales_high = 0;
  Bytes scales_low(4);
  for (int g = 0; g < 8; ++g) {
    scales_high |= group[g] >> 4 << (2 * g);
    scales_low[g / 2] |= (group[g] & 15) << (g % 2 * 4);
    Nibbles(xs_nibbles, {six.begin() + g * 32, six.begin() + g * 32 + 32});
  }
  Half(xs, d), Half(xs, scales_high);
  xs.insert(xs.end(), scales_low.begin(), scales_low.end());
  xs.insert(xs.end(), xs_nibbles.begin(), xs_nibbles.end());
  for (int i = 0; i < 256; ++i) {
    w6[i] = double(HalfToFloat(d)) * static_cast<std::int8_t>(scale[i / 16]) * (six[i] - 32);
    wxs[i] = double(HalfToFloat(d)) * (group[i / 32] - 32) * curve[six[i] & 15];
  }
  ExpectNear(Decoded(Encoding::kQ6K, q6), w6);
  ExpectNear(Decoded(Encoding::kIq4Xs, xs), wxs);
}

std::string FromHex(const std::string& hex) {
  std::string bytes;
  for (std::size_t i = 0; i < hex.size(); i += 2)
    bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  return bytes;
}

// tools/make_gguf_blocks.py: what ggml makes of random blocks. Sums may be rounded in another order.
TEST(GgmlBlocks, DecodeAsInGgml) {
  const auto text = ReadFile(ELASTICMOE_TESTDATA "/gguf/blocks.json");
  ASSERT_TRUE(text) << text.error().message;
  const Json cases = *ParseJson(*text);
  std::set<std::string> types;
  for (const Json& one : cases) {
    const auto type = one["type"].get<std::string>();
    SCOPED_TRACE(type);
    types.insert(type);
    Encoding encoding = Encoding::kQ4_0;
    while (NameOf(encoding) != type) encoding = static_cast<Encoding>(static_cast<int>(encoding) + 1);
    const std::string bytes = FromHex(one["bytes"]), want_bytes = FromHex(one["values"]);
    std::vector<float> want(want_bytes.size() / sizeof(float));
    std::memcpy(want.data(), want_bytes.data(), want_bytes.size());
    ASSERT_EQ(want.size(), static_cast<std::size_t>(BlockValues(encoding)));
    ExpectNear(Decoded(encoding, Bytes(bytes.begin(), bytes.end())), {want.begin(), want.end()});
  }
  EXPECT_EQ(types.size(), 13u);
}

}  // namespace
}  // namespace elasticmoe::model
