// Every table this machine can run: right within the rounding of its formats, and bit for bit the same
// whatever rows, panels and queries share a call. Tolerances: a float32 sum of k products errs by less than
// (k + 2) 2^-23 times the sum of their magnitudes, whatever the order.
#include "compute/kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "base/rng.h"

namespace elasticmoe::compute {
namespace {

constexpr float kUntouched = -12345.0F;

// A value that bf16 holds exactly, in (-1, 1).
float Exact(Rng& rng) {
  return ToFloat(ToBf16(static_cast<float>(2 * rng.Uniform() - 1)));
}

std::vector<float> ExactVector(Rng& rng, std::size_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = Exact(rng);
  return values;
}

struct Matrix {
  int n, k;
  std::vector<float> plain;  // [n, k]
  std::vector<Bf16> packed;

  Matrix(Rng& rng, int n, int k)
      : n(n), k(k), plain(ExactVector(rng, std::size_t(n) * k)), packed(PackedBytes(n, k) / sizeof(Bf16)) {
    PackRows(plain.data(), DType::kF32, 0, n, k, packed.data());
  }
  PackedMatrix View() const { return {packed.data(), n, k}; }
  int Panels() const { return (n + kPanel - 1) / kPanel; }
  // {x . row j, its error bound}
  std::pair<double, double> Dot(const std::vector<float>& x, int j) const {
    double sum = 0, size = 0;
    for (int i = 0; i < k; ++i) {
      const double product = double{x[i]} * plain[std::size_t(j) * k + i];
      sum += product;
      size += std::abs(product);
    }
    return {sum, (k + 2) * 0x1p-23 * size};
  }
};

// m rows of k activations in the table's format, and what they hold.
struct Rows {
  std::vector<std::vector<float>> plain;
  std::vector<std::vector<std::byte>> bytes;

  Rows(const Kernels& kernels, Rng& rng, int m, int k) {
    for (int i = 0; i < m; ++i) {
      plain.push_back(ExactVector(rng, k));
      kernels.to_activation(plain[i].data(), k,
                            bytes.emplace_back(std::size_t(k) * kernels.activation_bytes).data());
    }
  }
  std::vector<const void*> Pointers() const {
    std::vector<const void*> pointers;
    for (const auto& row : bytes) pointers.push_back(row.data());
    return pointers;
  }
};

class EveryTable : public ::testing::TestWithParam<const Kernels*> {
 protected:
  const Kernels& kernels_ = *GetParam();

  // All of x * w in one call.
  std::vector<std::vector<float>> Matmul(const Matrix& w, const std::vector<const void*>& rows) {
    std::vector<std::vector<float>> out(rows.size(), std::vector<float>(w.n, kUntouched));
    std::vector<float*> pointers;
    for (auto& row : out) pointers.push_back(row.data());
    kernels_.matmul(w.View(), rows.data(), static_cast<int>(rows.size()), 0, w.Panels(), pointers.data());
    return out;
  }
  std::vector<std::vector<std::byte>> GateUp(const Matrix& gate, const Matrix& up,
                                             const std::vector<const void*>& rows,
                                             const compute::Activation& activation = {}) {
    std::vector<std::vector<std::byte>> out(
        rows.size(), std::vector<std::byte>(std::size_t(gate.n) * kernels_.activation_bytes));
    std::vector<void*> pointers;
    for (auto& row : out) pointers.push_back(row.data());
    kernels_.gate_up(gate.View(), up.View(), activation, rows.data(), static_cast<int>(rows.size()), 0,
                     gate.Panels(), pointers.data());
    return out;
  }
  double Activation(const std::byte* bytes, int i) const {
    float value;
    if (kernels_.activation_bytes == 2) {
      Bf16 half;
      std::memcpy(&half, bytes + i * 2, 2);
      return ToFloat(half);
    }
    std::memcpy(&value, bytes + i * 4, 4);
    return value;
  }
};

TEST_P(EveryTable, MatmulIsRightForEveryTail) {
  Rng rng(1);
  for (const int n : {1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 70}) {
    for (int k = 1; k <= 70; ++k) {
      const Matrix w(rng, n, k);
      const Rows x(kernels_, rng, 3, k);
      const auto got = Matmul(w, x.Pointers());
      for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < n; ++j) {
          const auto [want, bound] = w.Dot(x.plain[i], j);
          ASSERT_NEAR(want, got[i][j], bound) << "n=" << n << " k=" << k << " row " << i << " output " << j;
        }
      }
    }
  }
}

TEST_P(EveryTable, MatmulGivesTheSameBitsForAnyRowsAndPanels) {
  Rng rng(2);
  for (const auto& [n, k] : {std::pair{70, 77}, {32, 1}, {161, 128}, {97, 515}}) {
    const Matrix w(rng, n, k);
    const Rows x(kernels_, rng, 40, k);
    std::vector<std::vector<float>> alone;
    for (const auto& row : x.bytes) alone.push_back(Matmul(w, {row.data()})[0]);
    for (int m = 1; m <= 40; ++m) {
      std::vector<int> order(40);
      std::iota(order.begin(), order.end(), 0);
      for (int i = 0; i < m; ++i) std::swap(order[i], order[i + rng.Below(40 - i)]);
      std::vector<const void*> in;
      std::vector<std::vector<float>> out(m, std::vector<float>(n + 1, kUntouched));
      std::vector<float*> pointers;
      for (int i = 0; i < m; ++i) {
        in.push_back(x.bytes[order[i]].data());
        pointers.push_back(out[i].data());
      }
      // The panels in two calls, the second part first.
      const int cut = static_cast<int>(rng.Below(w.Panels() + 1));
      kernels_.matmul(w.View(), in.data(), m, cut, w.Panels(), pointers.data());
      for (int i = 0; i < m; ++i)
        for (int j = 0; j < std::min(n, cut * kPanel); ++j) ASSERT_EQ(kUntouched, out[i][j]);
      kernels_.matmul(w.View(), in.data(), m, 0, cut, pointers.data());
      for (int i = 0; i < m; ++i) {
        ASSERT_EQ(0, std::memcmp(alone[order[i]].data(), out[i].data(), n * sizeof(float)))
            << "n=" << n << " k=" << k << " m=" << m;
        ASSERT_EQ(kUntouched, out[i][n]);
      }
    }
  }
}

TEST_P(EveryTable, GateUpIsRightForEveryTail) {
  Rng rng(3);
  const double rounding =
      kernels_.activation_bytes == 2 ? 0x1p-8 : 0x1p-20;  // of the result; the rest: exp, division
  for (const int n : {1, 2, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 70}) {
    for (int k = 1; k <= 70; k += n % 3 + 1) {
      const Matrix gate(rng, n, k), up(rng, n, k);
      const Rows x(kernels_, rng, 2, k);
      const auto got = GateUp(gate, up, x.Pointers());
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < n; ++j) {
          const auto [g, g_bound] = gate.Dot(x.plain[i], j);
          const auto [u, u_bound] = up.Dot(x.plain[i], j);
          const double silu = g / (1 + std::exp(-g));
          // silu's slope is below 1.1.
          const double bound = 1.1 * g_bound * (std::abs(u) + u_bound) + std::abs(silu) * u_bound +
                               rounding * std::abs(silu * u) + 1e-30;
          ASSERT_NEAR(silu * u, Activation(got[i].data(), j), bound) << "n=" << n << " k=" << k;
        }
      }
    }
  }
}

TEST_P(EveryTable, GateUpGivesTheSameBitsForAnyRowsAndPanels) {
  Rng rng(4);
  for (const auto& [n, k] : {std::pair{70, 77}, {161, 128}}) {
    const Matrix gate(rng, n, k), up(rng, n, k);
    const Rows x(kernels_, rng, 40, k);
    std::vector<std::vector<std::byte>> alone;
    for (const auto& row : x.bytes) alone.push_back(GateUp(gate, up, {row.data()})[0]);
    for (int m = 1; m <= 40; ++m) {
      std::vector<const void*> in;
      std::vector<std::vector<std::byte>> out(m,
                                              std::vector<std::byte>(alone[0].size() + 4, std::byte{0x77}));
      std::vector<void*> pointers;
      const int shift = static_cast<int>(rng.Below(40));
      for (int i = 0; i < m; ++i) {
        in.push_back(x.bytes[(i + shift) % 40].data());
        pointers.push_back(out[i].data());
      }
      const int cut = static_cast<int>(rng.Below(gate.Panels() + 1));
      kernels_.gate_up(gate.View(), up.View(), {}, in.data(), m, cut, gate.Panels(), pointers.data());
      kernels_.gate_up(gate.View(), up.View(), {}, in.data(), m, 0, cut, pointers.data());
      for (int i = 0; i < m; ++i) {
        ASSERT_EQ(0, std::memcmp(alone[(i + shift) % 40].data(), out[i].data(), alone[0].size()))
            << "n=" << n << " k=" << k << " m=" << m;
        for (std::size_t end = alone[0].size(); end < out[i].size(); ++end)
          ASSERT_EQ(std::byte{0x77}, out[i][end]);
      }
    }
  }
}

// Products of up to +-16 or so pass the limit on both sides; biases are whole numbers, so that sums are
// exact.
TEST_P(EveryTable, GateUpClampsAndAddsBiases) {
  Rng rng(6);
  const double rounding = kernels_.activation_bytes == 2 ? 0x1p-8 : 0x1p-20;
  for (const int n : {1, 15, 16, 17, 31, 33, 47, 70}) {
    const int k = 24;
    const Matrix gate(rng, n, k), up(rng, n, k);
    const Rows x(kernels_, rng, 3, k);
    std::vector<float> gate_bias(n), up_bias(n);
    for (float& bias : gate_bias) bias = static_cast<float>(rng.Below(25)) - 12;
    for (float& bias : up_bias) bias = static_cast<float>(rng.Below(25)) - 12;
    const compute::Activation activation{
        {compute::Activation::Kind::kClampedSwiglu, 1.702F, 7.0F}, gate_bias.data(), up_bias.data()};
    const auto got = GateUp(gate, up, x.Pointers(), activation);
    for (int i = 0; i < 3; ++i) {
      EXPECT_EQ(got[i], GateUp(gate, up, {x.bytes[i].data()}, activation)[0]);
      for (int j = 0; j < n; ++j) {
        const auto [g_sum, g_bound] = gate.Dot(x.plain[i], j);
        const auto [u_sum, u_bound] = up.Dot(x.plain[i], j);
        const double g = std::min(g_sum + gate_bias[j], 7.0),
                     u = std::clamp(u_sum + up_bias[j], -7.0, 7.0) + 1;
        const double silu = g / (1 + std::exp(-1.702F * g));
        // The slope is below 1.1, alpha or not: of x * sigmoid(a x) it is that of silu at a x.
        const double bound = 1.1 * (g_bound + 1e-6) * (std::abs(u) + u_bound) +
                             std::abs(silu) * (u_bound + 1e-6) + rounding * std::abs(silu * u) + 1e-30;
        ASSERT_NEAR(silu * u, Activation(got[i].data(), j), bound) << "n=" << n << " output " << j;
      }
    }
  }
}

TEST_P(EveryTable, LargeGatesSaturate) {
  // One input, weights of +-100 and +-3e38: silu tends to x or to 0, never to NaN.
  const float weights[] = {100, -100, 3e38F, -3e38F};
  std::vector<Bf16> gate(PackedBytes(4, 1) / 2), up(gate.size());
  const float ones[] = {1, 1, 1, 1};
  PackRows(weights, DType::kF32, 0, 4, 1, gate.data());
  PackRows(ones, DType::kF32, 0, 4, 1, up.data());
  std::vector<std::byte> in(4), out(16);
  kernels_.to_activation(ones, 1, in.data());
  const void* rows[] = {in.data()};
  void* outs[] = {out.data()};
  kernels_.gate_up({gate.data(), 4, 1}, {up.data(), 4, 1}, {}, rows, 1, 0, 1, outs);
  EXPECT_NEAR(100, Activation(out.data(), 0), 0.5);
  EXPECT_NEAR(0, Activation(out.data(), 1), 1e-30);
  EXPECT_NEAR(3e38, Activation(out.data(), 2), 2e36);
  EXPECT_LE(std::abs(Activation(out.data(), 3)), 3.0);  // -x e^-88 / 1 and not NaN
}

TEST_P(EveryTable, RouterIsRightAndTheSameForAnyRows) {
  Rng rng(5);
  for (const auto& [experts, hidden] : {std::pair{1, 1}, {3, 7}, {7, 70}, {16, 256}, {13, 131}}) {
    const std::vector<float> w = ExactVector(rng, std::size_t(experts) * hidden);
    const std::vector<float> x = ExactVector(rng, std::size_t(23) * hidden);
    std::vector<float> alone(23 * experts);
    for (int i = 0; i < 23; ++i)
      kernels_.router(&x[i * hidden], 1, w.data(), experts, hidden, &alone[i * experts]);
    for (int i = 0; i < 23; ++i) {
      for (int e = 0; e < experts; ++e) {
        double want = 0, size = 0;
        for (int j = 0; j < hidden; ++j) {
          want += double{x[i * hidden + j]} * w[e * hidden + j];
          size += std::abs(double{x[i * hidden + j]} * w[e * hidden + j]);
        }
        ASSERT_NEAR(want, alone[i * experts + e], (hidden + 2) * 0x1p-23 * size);
      }
    }
    for (int m = 1; m <= 23; ++m) {
      std::vector<float> together(m * experts);
      kernels_.router(&x[(23 - m) * hidden], m, w.data(), experts, hidden, together.data());
      ASSERT_EQ(0, std::memcmp(&alone[(23 - m) * experts], together.data(), together.size() * sizeof(float)))
          << m;
    }
  }
}

TEST_P(EveryTable, ActivationsAreExactOrRoundToNearestEven) {
  Rng rng(6);
  for (int count = 1; count <= 70; ++count) {
    std::vector<float> values(count);
    for (float& value : values)
      value =
          static_cast<float>((2 * rng.Uniform() - 1) * std::exp2(static_cast<double>(rng.Below(40)) - 20));
    values[0] = ToFloat(0x3f80) + 0x1p-8F;  // half way between two bf16: the even one
    std::vector<std::byte> got((count + 1) * kernels_.activation_bytes, std::byte{0x77});
    kernels_.to_activation(values.data(), count, got.data());
    for (int i = 0; i < count; ++i)
      ASSERT_EQ(kernels_.activation_bytes == 4 ? values[i] : ToFloat(ToBf16(values[i])),
                Activation(got.data(), i));
    ASSERT_EQ(std::byte{0x77}, got[count * kernels_.activation_bytes]);
  }
}

INSTANTIATE_TEST_SUITE_P(Tables, EveryTable, ::testing::ValuesIn(AvailableKernels()),
                         [](const auto& info) { return std::string(info.param->name); });

TEST(FindKernels, KnowsNamesAndSaysWhichThereAre) {
  EXPECT_EQ(AvailableKernels().front(), FindKernels("auto").value());
  EXPECT_EQ("reference", AvailableKernels().back()->name);
  for (const Kernels* table : AvailableKernels()) EXPECT_EQ(table, FindKernels(table->name).value());
  const auto missing = FindKernels("neon");
  ASSERT_FALSE(missing.has_value());
  EXPECT_EQ(ErrorCode::kInvalidArgument, missing.error().code);
  EXPECT_NE(std::string::npos, missing.error().message.find("reference"));
}

}  // namespace
}  // namespace elasticmoe::compute
