// int8 and int4: what packing loses, and that every table multiplies exactly what was packed. Sums of
// integers are exact and the float32 steps are the same everywhere, so all tables agree to the last bit.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "base/rng.h"
#include "compute/kernels.h"
#include "compute/quantize.h"
#include "compute/quantized_row.h"

namespace elasticmoe::compute {
namespace {

float Normal(Rng& rng) {
  double sum = 0;
  for (int i = 0; i < 6; ++i) sum += rng.Uniform() - 0.5;
  return static_cast<float>(sum);
}

struct Matrix {
  int n, k;
  WeightFormat format;
  std::vector<float> plain;  // [n, k] before quantizing
  std::vector<std::byte> packed;

  Matrix(Rng& rng, WeightFormat format, int n, int k)
      : n(n), k(k), format(format), plain(std::size_t(n) * k), packed(PackedBytes(n, k, format)) {
    for (float& value : plain) value = Normal(rng);
    PackRows(plain.data(), DType::kF32, 0, n, k, packed.data(), format);
  }
  PackedMatrix View() const { return {packed.data(), n, k, format}; }
  int Panels() const { return (n + kPanel - 1) / kPanel; }
  std::vector<float> Row(int row) const {
    std::vector<float> values(k);
    UnpackRow(View(), row, values.data());
    return values;
  }
};

class EveryFormat : public ::testing::TestWithParam<WeightFormat> {};

TEST_P(EveryFormat, AWeightIsOffByLessThanHalfAStepOfItsGroup) {
  Rng rng(1);
  const int steps = GetParam() == WeightFormat::kInt8 ? 127 : 8;
  double lost = 0, all = 0;
  for (const int k : {1, 3, 63, 64, 65, 200, 384}) {
    const Matrix w(rng, GetParam(), 40, k);
    for (int row = 0; row < 40; ++row) {
      const std::vector<float> got = w.Row(row);
      for (int begin = 0; begin < k; begin += kGroup) {
        const int end = std::min(k, begin + kGroup);
        float most = 0;
        for (int i = begin; i < end; ++i) most = std::max(most, std::abs(w.plain[row * k + i]));
        for (int i = begin; i < end; ++i) {
          const float error = std::abs(got[i] - w.plain[row * k + i]);
          // int4 may clip the largest values where that rounds the others better.
          ASSERT_LE(error, most * (GetParam() == WeightFormat::kInt8 ? 0.51F : 2.1F) / steps)
              << row << " " << i;
          lost += error * error;
          all += w.plain[row * k + i] * w.plain[row * k + i];
        }
      }
    }
  }
  EXPECT_LT(std::sqrt(lost / all), GetParam() == WeightFormat::kInt8 ? 0.006 : 0.10);
}

TEST_P(EveryFormat, ZerosStayZerosAndRowsLeaveTheirNeighboursAlone) {
  Rng rng(2);
  const int k = 130;
  Matrix w(rng, GetParam(), 33, k);
  const std::vector<float> before = w.Row(31), after = w.Row(32);
  const std::vector<float> zeros(k);
  PackRows(zeros.data(), DType::kF32, 30, 1, k, w.packed.data(), GetParam());
  EXPECT_EQ(zeros, w.Row(30));
  EXPECT_EQ(before, w.Row(31));
  EXPECT_EQ(after, w.Row(32));
}

TEST_P(EveryFormat, RowsPackedInPartsAreTheSameBytes) {
  Rng rng(8);
  for (const int k : {1, 63, 64, 130}) {
    constexpr int kRows = 70;
    const Matrix whole(rng, GetParam(), kRows, k);
    for (const int part : {1, 5, 15, 16, 17, 33}) {
      std::vector<std::byte> packed(whole.packed.size());
      for (int row = 0; row < kRows; row += part)
        PackRows(&whole.plain[std::size_t(row) * k], DType::kF32, row, std::min(part, kRows - row), k,
                 packed.data(), GetParam());
      ASSERT_EQ(whole.packed, packed) << "k=" << k << " part=" << part;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Quantized, EveryFormat, ::testing::Values(WeightFormat::kInt8, WeightFormat::kInt4),
                         [](const auto& info) {
                           return info.param == WeightFormat::kInt8 ? "int8" : "int4";
                         });

using TableAndFormat = std::tuple<const Kernels*, WeightFormat>;

class EveryQuantizedTable : public ::testing::TestWithParam<TableAndFormat> {
 protected:
  const Kernels& kernels_ = *std::get<0>(GetParam());
  const WeightFormat format_ = std::get<1>(GetParam());
  const Kernels& reference_ = *AvailableKernels().back();
  class EvenRows;

  // Values that every activation format holds.
  static std::vector<float> Plain(Rng& rng, int k) {
    std::vector<float> plain(k);
    for (float& value : plain) value = ToFloat(ToBf16(Normal(rng)));
    return plain;
  }
  static std::vector<std::byte> Quantize(const Kernels& kernels, const std::vector<float>& plain) {
    const int k = static_cast<int>(plain.size());
    std::vector<std::byte> activations(plain.size() * kernels.activation_bytes);
    kernels.to_activation(plain.data(), k, activations.data());
    std::vector<std::byte> row(QuantizedRow::Bytes(k));
    kernels.quantized.quantize(activations.data(), k, row.data());
    return row;
  }
  static std::vector<float> Matmul(const Kernels& kernels, const Matrix& w,
                                   const std::vector<std::byte>& row) {
    std::vector<float> out(w.n);
    const void* rows[] = {row.data()};
    float* outs[] = {out.data()};
    kernels.quantized.matmul(w.View(), rows, 1, 0, w.Panels(), outs);
    return out;
  }
};

// Rows at one distance from each other, as tiles want them.
class EveryQuantizedTable::EvenRows {
 public:
  EvenRows(const EveryQuantizedTable& test, Rng& rng, int count, int k)
      : bytes_(QuantizedRow::Bytes(k)), stride_((bytes_ + 63) / 64 * 64), memory_(stride_ * count) {
    for (int i = 0; i < count; ++i) {
      const std::vector<std::byte> row = Quantize(test.kernels_, Plain(rng, k));
      std::copy(row.begin(), row.end(), memory_.data() + i * stride_);
    }
  }
  const std::byte* Row(int i) const { return memory_.data() + i * stride_; }
  std::vector<std::byte> Copy(int i) const { return {Row(i), Row(i) + bytes_}; }

 private:
  std::size_t bytes_, stride_;
  std::vector<std::byte> memory_;
};

TEST_P(EveryQuantizedTable, WeightsArePackedAlike) {
  Rng rng(7);
  for (int i = 0; i < 300; ++i) {
    std::vector<float> values(kGroup * kPackLanes);
    for (float& value : values) value = i < 200 ? Normal(rng) : static_cast<float>(rng.Below(3)) - 1.0F;
    std::vector<std::byte> want(GroupBytes(format_)), got(GroupBytes(format_));
    reference_.quantized.pack(values.data(), format_, i % 2 * kPackLanes, want.data());
    kernels_.quantized.pack(values.data(), format_, i % 2 * kPackLanes, got.data());
    ASSERT_EQ(want, got) << i;
  }
}

TEST_P(EveryQuantizedTable, RowsAreQuantizedAlike) {
  Rng rng(3);
  for (const int k : {1, 15, 16, 17, 63, 64, 65, 100, 384}) {
    std::vector<float> plain = Plain(rng, k);
    if (k > 20) plain[20] = 1000;  // an outlier costs its group only
    const std::vector<std::byte> row = Quantize(kernels_, plain);
    EXPECT_EQ(Quantize(reference_, plain), row) << k;
    const QuantizedRow view = QuantizedRow::At(row.data(), GroupsOf(k));
    for (int i = 0; i < k; ++i) {
      const float scale = view.scales[i / kGroup];
      ASSERT_NEAR(plain[i], scale * view.values[i], 0.5001F * scale) << k << " " << i;
    }
  }
  const std::vector<float> zeros(70);
  const std::vector<std::byte> row = Quantize(kernels_, zeros);
  for (int i = 0; i < 128; ++i) ASSERT_EQ(std::byte{0}, row[i]);
}

TEST_P(EveryQuantizedTable, MatmulIsTheReferencesToTheLastBit) {
  Rng rng(4);
  for (const int n : {1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100}) {
    for (const int k : {1, 4, 7, 63, 64, 65, 127, 128, 384}) {
      const Matrix w(rng, format_, n, k);
      const std::vector<float> plain = Plain(rng, k);
      const std::vector<std::byte> row = Quantize(kernels_, plain);
      const std::vector<float> got = Matmul(kernels_, w, row);
      ASSERT_EQ(Matmul(reference_, w, row), got) << n << " x " << k;
      const QuantizedRow x = QuantizedRow::At(row.data(), GroupsOf(k));
      for (int j = 0; j < n; ++j) {
        const std::vector<float> weights = w.Row(j);
        double want = 0, size = 0;
        for (int i = 0; i < k; ++i) {
          const double product = double{weights[i]} * x.values[i] * x.scales[i / kGroup];
          want += product;
          size += std::abs(product);
        }
        ASSERT_NEAR(want, got[j], (GroupsOf(k) + 4) * 0x1p-23 * size + 1e-30) << n << " x " << k << " " << j;
      }
    }
  }
}

TEST_P(EveryQuantizedTable, MatmulGivesTheSameBitsForAnyRowsAndPanels) {
  Rng rng(5);
  for (const auto& [n, k] : {std::pair{70, 77}, {161, 128}, {97, 515}, {64, 1100}}) {
    const Matrix w(rng, format_, n, k);
    const EvenRows rows(*this, rng, 60, k);
    std::vector<std::vector<float>> alone;
    for (int i = 0; i < 60; ++i) alone.push_back(Matmul(kernels_, w, rows.Copy(i)));
    for (int m = 1; m <= 60; ++m) {
      // From some row on, or around the end: then the rows do not lie evenly.
      const int shift = static_cast<int>(rng.Below(m % 2 == 0 ? 60 : 61 - m));
      const int cut = static_cast<int>(rng.Below(w.Panels() + 1));
      std::vector<const void*> in;
      std::vector<std::vector<float>> out(m, std::vector<float>(n + 1, -1.0F));
      std::vector<float*> outs;
      for (int i = 0; i < m; ++i) {
        in.push_back(rows.Row((i + shift) % 60));
        outs.push_back(out[i].data());
      }
      kernels_.quantized.matmul(w.View(), in.data(), m, cut, w.Panels(), outs.data());
      kernels_.quantized.matmul(w.View(), in.data(), m, 0, cut, outs.data());
      for (int i = 0; i < m; ++i) {
        ASSERT_EQ(0, std::memcmp(alone[(i + shift) % 60].data(), out[i].data(), n * sizeof(float))) << m;
        ASSERT_EQ(-1.0F, out[i][n]);
      }
    }
  }
}

TEST_P(EveryQuantizedTable, GateUpIsRightAndTheSameForAnyRowsAndPanels) {
  Rng rng(6);
  for (const auto& [n, k] : {std::pair{1, 5}, {31, 64}, {33, 70}, {64, 128}, {161, 200}}) {
    const Matrix gate(rng, format_, n, k), up(rng, format_, n, k);
    constexpr int kRows = 100;
    const EvenRows rows(*this, rng, kRows, k);
    const std::size_t bytes = QuantizedRow::Bytes(n);
    const auto run = [&](int first, int m, int cut) {
      std::vector<std::vector<std::byte>> out(m, std::vector<std::byte>(bytes + 4, std::byte{0x77}));
      std::vector<const void*> in;
      std::vector<void*> outs;
      for (int i = 0; i < m; ++i) {
        in.push_back(rows.Row(first + i));
        outs.push_back(out[i].data());
      }
      kernels_.quantized.gate_up(gate.View(), up.View(), {}, in.data(), m, cut, gate.Panels(), outs.data());
      kernels_.quantized.gate_up(gate.View(), up.View(), {}, in.data(), m, 0, cut, outs.data());
      return out;
    };
    std::vector<std::vector<std::byte>> alone;
    for (int i = 0; i < kRows; ++i) alone.push_back(run(i, 1, 0)[0]);
    for (const int m : {1, 2, 3, 4, 5, 6, 7, 12, 13, 47, 48, 49, 97, 100}) {
      const int first = static_cast<int>(rng.Below(kRows - m + 1));
      const int cut = static_cast<int>(rng.Below(gate.Panels() / 2 + 1)) * 2;
      const auto got = run(first, m, cut);
      for (int i = 0; i < m; ++i) ASSERT_EQ(alone[first + i], got[i]) << n << " x " << k << " m=" << m;
    }
    for (int i = 0; i < kRows; ++i) {
      const std::vector<float> g = Matmul(reference_, gate, rows.Copy(i)),
                               u = Matmul(reference_, up, rows.Copy(i));
      const QuantizedRow got = QuantizedRow::At(alone[i].data(), GroupsOf(n));
      for (int j = 0; j < n; ++j) {
        const double want = g[j] / (1 + std::exp(-double{g[j]})) * u[j];
        ASSERT_NEAR(want, got.scales[j / kGroup] * got.values[j], 0.501 * got.scales[j / kGroup] + 1e-6);
      }
      for (int group = 0; group < GroupsOf(n); ++group) {
        int sum = 0;
        for (int j = 0; j < kGroup; ++j) sum += got.values[group * kGroup + j];
        ASSERT_EQ(-128 * sum, got.offsets[group]);
      }
    }
  }
}

std::vector<TableAndFormat> All() {
  std::vector<TableAndFormat> all;
  for (const Kernels* table : AvailableKernels())
    for (const WeightFormat format : {WeightFormat::kInt8, WeightFormat::kInt4})
      all.emplace_back(table, format);
  return all;
}

INSTANTIATE_TEST_SUITE_P(Kernels, EveryQuantizedTable, ::testing::ValuesIn(All()), [](const auto& info) {
  return std::string(std::get<0>(info.param)->name) +
         (std::get<1>(info.param) == WeightFormat::kInt8 ? "_int8" : "_int4");
});

}  // namespace
}  // namespace elasticmoe::compute
