// Products of int8 and int4 matrices, one loop a formula. Integer sums are exact in every table; what differs
// is how an activation was rounded before it was quantized.
#include <algorithm>
#include <cmath>
#include <vector>

#include "compute/kernel_tables.h"
#include "compute/quantize.h"
#include "compute/quantize_group.h"
#include "compute/quantized_row.h"

namespace elasticmoe::compute {
namespace {

void QuantizeGroup(const float* values, int count, int group, const QuantizedRowOut& out) {
  float most = 0;
  for (int i = 0; i < count; ++i) most = std::max(most, std::abs(values[i]));
  out.scales[group] = most * (1.0F / 127.0F);
  const float inverse = most > 0 ? 127.0F / most : 0.0F;
  int sum = 0;
  for (int i = 0; i < kGroup; ++i) {
    const float q = i < count ? std::nearbyint(values[i] * inverse) : 0.0F;
    const auto value = static_cast<std::int8_t>(std::clamp(q, -127.0F, 127.0F));
    out.values[group * kGroup + i] = value;
    sum += value;
  }
  out.offsets[group] = -128 * sum;
}

void Quantize(const void* activations, int k, void* quantized) {
  const QuantizedRowOut out = QuantizedRowOut::At(quantized, GroupsOf(k));
  for (int group = 0; group < GroupsOf(k); ++group)
    QuantizeGroup(static_cast<const float*>(activations) + group * kGroup,
                  std::min(kGroup, k - group * kGroup), group, out);
}

// sums[j] = x . output j of the panel.
void PanelDot(const PackedMatrix& w, int panel, const void* row, float (&sums)[kPanel]) {
  const int groups = GroupsOf(w.k);
  const QuantizedRow x = QuantizedRow::At(row, groups);
  for (float& sum : sums) sum = 0;
  const std::byte* at = w.Panel(panel);
  for (int group = 0; group < groups; ++group, at += GroupBytes(w.format)) {
    for (int j = 0; j < kPanel; ++j) {
      const StoredGroup stored{at, w.format, j};
      std::int32_t acc = x.offsets[group];
      for (int i = 0; i < kGroup; ++i) acc += stored.Unsigned(i) * x.values[group * kGroup + i];
      sums[j] = std::fma(static_cast<float>(acc), stored.Scale() * x.scales[group], sums[j]);
    }
  }
}

void Matmul(const PackedMatrix& w, const void* const* rows, int m, int panel_begin, int panel_end,
            float* const* out) {
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    const int begin = panel * kPanel;
    for (int i = 0; i < m; ++i) {
      float sums[kPanel];
      PanelDot(w, panel, rows[i], sums);
      std::copy(sums, sums + std::min(kPanel, w.n - begin), out[i] + begin);
    }
  }
}

void GateUp(const PackedMatrix& gate, const PackedMatrix& up, const Activation& activation,
            const void* const* rows, int m, int panel_begin, int panel_end, void* const* out) {
  for (int i = 0; i < m; ++i) {
    const QuantizedRowOut to = QuantizedRowOut::At(out[i], GroupsOf(gate.n));
    for (int panel = panel_begin; panel < panel_end; panel += 2) {
      float values[kGroup] = {};
      for (int half = 0; half < 2 && panel + half < panel_end; ++half) {
        float g[kPanel], u[kPanel];
        PanelDot(gate, panel + half, rows[i], g);
        PanelDot(up, panel + half, rows[i], u);
        for (int j = 0; j < kPanel; ++j) {
          const int output = (panel + half) * kPanel + j;
          if (activation.gate_bias != nullptr && output < gate.n) {
            g[j] += activation.gate_bias[output];
            u[j] += activation.up_bias[output];
          }
          values[half * kPanel + j] = Activate(activation.spec, g[j], u[j]);
        }
      }
      QuantizeGroup(values, std::min(kGroup, gate.n - panel * kPanel), panel / 2, to);
    }
  }
}

void PackGroups(const float* values, WeightFormat format, int first_lane, std::byte* group) {
  QuantizeGroupsBody(values, format, first_lane, group);
}

}  // namespace

QuantizedKernels ReferenceQuantizedKernels() {
  return {PackGroups, Quantize, Matmul, GateUp};
}

}  // namespace elasticmoe::compute
