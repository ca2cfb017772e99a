// For the tests of this module: the forward pass once more, in float64, no cache, no tricks, straight from
// the formulas: everything that a ModelSpec can say.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "compute/test_model.h"

namespace elasticmoe::compute::testing {

using Vector = std::vector<double>;

inline Vector Times(const std::vector<float>& w, const Vector& x) {
  Vector y(w.size() / x.size());
  for (std::size_t j = 0; j < y.size(); ++j)
    for (std::size_t i = 0; i < x.size(); ++i) y[j] += w[j * x.size() + i] * x[i];
  return y;
}

inline void Normalize(const std::vector<float>& weight, float eps, double* x) {
  double sum = 0;
  for (std::size_t i = 0; i < weight.size(); ++i) sum += x[i] * x[i];
  for (std::size_t i = 0; i < weight.size(); ++i)
    x[i] *= weight[i] / std::sqrt(sum / static_cast<double>(weight.size()) + eps);
}

inline Vector Normed(const std::vector<float>& weight, float eps, Vector x) {
  Normalize(weight, eps, x.data());
  return x;
}

struct PlainMlpWeights {
  const std::vector<float>&gate, &up, &down;
  const std::vector<float>&gate_bias, &up_bias, &down_bias;  // or empty
};

inline Vector PlainMlp(const core::ActivationSpec& activation, const PlainMlpWeights& w, const Vector& x) {
  Vector g = Times(w.gate, x), u = Times(w.up, x);
  for (std::size_t i = 0; i < g.size(); ++i) {
    if (!w.gate_bias.empty()) g[i] += w.gate_bias[i], u[i] += w.up_bias[i];
    if (activation.kind == core::ActivationSpec::Kind::kSilu) {
      g[i] = g[i] / (1 + std::exp(-g[i])) * u[i];
    } else {
      const double gate = std::min<double>(g[i], activation.limit);
      const double up = std::clamp<double>(u[i], -activation.limit, activation.limit);
      g[i] = gate / (1 + std::exp(-activation.alpha * gate)) * (up + 1);
    }
  }
  Vector y = Times(w.down, g);
  for (std::size_t i = 0; i < w.down_bias.size(); ++i) y[i] += w.down_bias[i];
  return y;
}

// The experts that logits choose, and their weights.
inline std::vector<std::pair<int, double>> PlainChoice(const core::MoeSpec& moe,
                                                       const std::vector<float>& correction, Vector score) {
  const bool sigmoid = moe.scores == core::MoeSpec::Scores::kSigmoid;
  double sum = 0;
  for (double& value : score) sum += value = sigmoid ? 1 / (1 + std::exp(-value)) : std::exp(value);
  if (!sigmoid)
    for (double& value : score) value /= sum;
  Vector choice = score;
  for (std::size_t e = 0; e < correction.size(); ++e) choice[e] += correction[e];
  const auto falling = [](const Vector& values) {
    std::vector<int> order(values.size());
    std::iota(order.begin(), order.end(), 0);
    std::ranges::stable_sort(order, [&](int a, int b) { return values[a] > values[b]; });
    return order;
  };
  if (moe.chosen_groups < moe.groups) {
    const int size = moe.experts / moe.groups;
    Vector groups;
    for (int g = 0; g < moe.groups; ++g) {
      Vector members(choice.begin() + g * size, choice.begin() + (g + 1) * size);
      std::ranges::sort(members, std::greater<>());
      const bool two = moe.group_score == core::MoeSpec::GroupScore::kTopTwoSum && size > 1;
      groups.push_back(members[0] + (two ? members[1] : 0.0));
    }
    const std::vector<int> best = falling(groups);
    for (int j = moe.chosen_groups; j < moe.groups; ++j)
      std::fill_n(choice.begin() + best[j] * size, size, moe.left_out_as_zero ? 0.0 : -1e300);
  }
  const std::vector<int> order = falling(choice);
  std::vector<std::pair<int, double>> chosen;
  double all = 0;
  for (int j = 0; j < moe.top_k; ++j) all += score[order[j]];
  for (int j = 0; j < moe.top_k; ++j)
    chosen.emplace_back(order[j], score[order[j]] / (moe.renormalize ? all : 1) * moe.scaling);
  return chosen;
}

// All experts whose angle to x is small enough, or the nearest one.
inline std::vector<std::pair<int, double>> PlainAny(const core::MoeSpec& moe,
                                                    const std::vector<float>& thresholds,
                                                    const std::vector<float>& router, const Vector& x) {
  const auto length = [](const auto& values) {
    double sum = 0;
    for (const double value : values) sum += value * value;
    return std::sqrt(sum);
  };
  Vector cosines = Times(router, x);
  for (int e = 0; e < moe.experts; ++e)
    cosines[e] /= length(x) * length(std::span(router).subspan(e * x.size(), x.size()));
  std::vector<int> passing;
  for (int e = 0; e < moe.experts; ++e)
    if (cosines[e] > thresholds[e]) passing.push_back(e);
  if (passing.empty())
    passing.push_back(static_cast<int>(std::ranges::max_element(cosines) - cosines.begin()));
  std::ranges::stable_sort(passing, [&](int a, int b) { return cosines[a] > cosines[b]; });
  passing.resize(std::min<std::size_t>(passing.size(), moe.top_k));
  std::vector<std::pair<int, double>> chosen;
  for (const int e : passing) chosen.emplace_back(e, 1.0 / static_cast<double>(passing.size()));
  return chosen;
}

inline Vector PlainMoe(const TestModel& model, int layer, const Vector& x) {
  const core::ModelSpec& spec = model.Spec();
  const core::MoeSpec& moe = spec.moe;
  Vector logits = Times(model.Plain(Role::kRouter, layer), x);
  for (int e = 0; e < moe.experts && moe.router_bias; ++e)
    logits[e] += model.Plain(Role::kRouterBias, layer)[e];
  Vector out(x.size());
  const auto add = [&](const Vector& y, double weight) {
    for (std::size_t i = 0; i < x.size(); ++i) out[i] += y[i] * weight;
  };
  const std::vector<float>& correction = model.Plain(Role::kRouterCorrection, layer);
  for (const auto& [e, weight] : moe.top_any ? PlainAny(moe, correction, model.Plain(Role::kRouter, layer), x)
                                             : PlainChoice(moe, correction, logits))
    add(PlainMlp(spec.activation,
                 {model.Plain(Role::kExpertGate, layer, e), model.Plain(Role::kExpertUp, layer, e),
                  model.Plain(Role::kExpertDown, layer, e), model.Plain(Role::kExpertGateBias, layer, e),
                  model.Plain(Role::kExpertUpBias, layer, e), model.Plain(Role::kExpertDownBias, layer, e)},
                 x),
        weight);
  if (moe.shared_width == 0) return out;
  const Vector shared =
      PlainMlp(spec.activation,
               {model.Plain(Role::kSharedGate, layer), model.Plain(Role::kSharedUp, layer),
                model.Plain(Role::kSharedDown, layer), model.Plain(Role::kSharedGateBias, layer),
                model.Plain(Role::kSharedUpBias, layer), model.Plain(Role::kSharedDownBias, layer)},
               x);
  add(shared, moe.shared_gate ? 1 / (1 + std::exp(-Times(model.Plain(Role::kSharedMix, layer), x)[0])) : 1.0);
  return out;
}

// The turn of pair i at position 1, after Hugging Face's modeling_rope_utils.py.
inline double PlainFrequency(const core::AttentionSpec& a, std::size_t i) {
  using Scaling = core::RopeSpec::Scaling;
  constexpr double kTurn = 6.283185307179586;
  const core::RopeSpec& rope = a.rope;
  const double dim = a.RopeDim();
  const double plain = std::pow(a.rope_theta, -2.0 * static_cast<double>(i) / dim);
  if (rope.scaling == Scaling::kNone) return plain;
  if (rope.scaling == Scaling::kLinear) return plain / rope.factor;
  if (rope.scaling == Scaling::kLlama3) {
    const double wavelength = kTurn / plain;
    const double longest = rope.original_positions / rope.low_frequency;
    const double shortest = rope.original_positions / rope.high_frequency;
    if (wavelength < shortest) return plain;
    if (wavelength > longest) return plain / rope.factor;
    const double smooth = (rope.original_positions / wavelength - rope.low_frequency) /
                          (rope.high_frequency - rope.low_frequency);
    return (1 - smooth) * plain / rope.factor + smooth * plain;
  }
  const auto correction = [&](double turns) {
    return dim * std::log(rope.original_positions / (turns * kTurn)) / (2 * std::log(a.rope_theta));
  };
  double low = correction(rope.beta_fast), high = correction(rope.beta_slow);
  if (rope.truncate) low = std::floor(low), high = std::ceil(high);
  low = std::max(low, 0.0), high = std::min(high, dim - 1);
  if (low == high) high += 0.001;
  const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
  return plain / rope.factor * ramp + plain * (1 - ramp);
}

inline void PlainTurn(const core::AttentionSpec& a, std::size_t position, double* h) {
  const std::size_t half = static_cast<std::size_t>(a.RopeDim()) / 2;
  for (std::size_t i = 0; i < half; ++i) {
    const double angle = static_cast<double>(position) * PlainFrequency(a, i);
    double& one = h[a.rope.interleaved ? 2 * i : i];
    double& other = h[a.rope.interleaved ? 2 * i + 1 : i + half];
    const double first = one, second = other;
    one = (first * std::cos(angle) - second * std::sin(angle)) * a.rope.amplitude;
    other = (second * std::cos(angle) + first * std::sin(angle)) * a.rope.amplitude;
  }
}

// The same of latent attention, by the keys and values that the latents stand for.
inline std::vector<Vector> PlainLatentAttention(const TestModel& model, int layer,
                                                const std::vector<Vector>& residual) {
  const core::ModelSpec& spec = model.Spec();
  const core::AttentionSpec& a = spec.attention;
  constexpr float kEps = 1e-6F;  // of the latents' norms: DeepSeek's code gives them none of config.json's
  const int plain = a.PlainDim(), rotated = a.RopeDim(), value = a.value_dim, rank = a.kv_lora_rank;
  const auto plus = [&](Vector y, Role bias) {
    const std::vector<float>& values = model.Plain(bias, layer);
    for (std::size_t i = 0; i < values.size(); ++i) y[i] += values[i];
    return y;
  };
  std::vector<Vector> q, latents, keys, out;  // latents as keys without position and values: kKvUp's outputs
  for (std::size_t t = 0; t < residual.size(); ++t) {
    const Vector x = Normed(model.Plain(Role::kAttentionNorm, layer), spec.rms_eps, residual[t]);
    if (a.q_lora_rank > 0) {
      const Vector down = plus(Times(model.Plain(Role::kQDown, layer), x), Role::kQBias);
      q.push_back(
          Times(model.Plain(Role::kQUp, layer), Normed(model.Plain(Role::kQDownNorm, layer), kEps, down)));
    } else {
      q.push_back(Times(model.Plain(Role::kQ, layer), x));
    }
    const Vector down = plus(Times(model.Plain(Role::kKvDown, layer), x), Role::kKBias);
    latents.push_back(Times(
        model.Plain(Role::kKvUp, layer),
        Normed(model.Plain(Role::kKvDownNorm, layer), kEps, Vector(down.begin(), down.begin() + rank))));
    keys.emplace_back(down.begin() + rank, down.end());
    PlainTurn(a, t, keys.back().data());
    Vector& y = out.emplace_back(a.heads * value);
    for (int head = 0; head < a.heads; ++head) {
      double* query = &q[t][head * a.head_dim];
      PlainTurn(a, t, query + plain);
      double sum = 0;
      for (std::size_t s = 0; s <= t; ++s) {
        const double* up = &latents[s][head * (plain + value)];
        double score = 0;
        for (int i = 0; i < plain; ++i) score += query[i] * up[i];
        for (int i = 0; i < rotated; ++i) score += query[plain + i] * keys[s][i];
        const double weight = std::exp(score * a.scale);
        sum += weight;
        for (int i = 0; i < value; ++i) y[head * value + i] += weight * up[plain + i];
      }
      for (int i = 0; i < value; ++i) y[head * value + i] /= sum;
    }
  }
  return out;
}

// out[t] = attention of token t over tokens 0..t, before the output projection.
inline std::vector<Vector> PlainAttention(const TestModel& model, int layer,
                                          const std::vector<Vector>& residual) {
  const core::ModelSpec& spec = model.Spec();
  const core::AttentionSpec& a = spec.attention;
  if (a.Latent()) return PlainLatentAttention(model, layer, residual);
  const std::size_t dim = a.head_dim;
  std::vector<Vector> q, k, v, out;
  for (std::size_t t = 0; t < residual.size(); ++t) {
    const Vector x = Normed(model.Plain(Role::kAttentionNorm, layer), spec.rms_eps, residual[t]);
    const auto project = [&](Role weight, Role bias, Role norm, bool rotate) {
      Vector y = Times(model.Plain(weight, layer), x);
      if (a.qkv_bias)
        for (std::size_t i = 0; i < y.size(); ++i) y[i] += model.Plain(bias, layer)[i];
      if (a.qk_norm_whole && rotate) Normalize(model.Plain(norm, layer), spec.rms_eps, y.data());
      for (double& value : y)
        if (a.clip_qkv > 0) value = std::clamp<double>(value, -a.clip_qkv, a.clip_qkv);
      for (std::size_t head = 0; rotate && head < y.size() / dim; ++head) {
        double* h = &y[head * dim];
        if (a.qk_norm) Normalize(model.Plain(norm, layer), spec.rms_eps, h);
        PlainTurn(a, t, h);
      }
      return y;
    };
    q.push_back(project(Role::kQ, Role::kQBias, Role::kQNorm, true));
    k.push_back(project(Role::kK, Role::kKBias, Role::kKNorm, true));
    v.push_back(project(Role::kV, Role::kVBias, Role::kQNorm, false));
    Vector& y = out.emplace_back(a.heads * dim);
    for (int head = 0; head < a.heads; ++head) {
      const std::size_t kv = head / (a.heads / a.kv_heads) * dim;
      double sum = a.sinks ? std::exp(model.Plain(Role::kSinks, layer)[head]) : 0;
      const int window = spec.layers[layer].window;
      for (std::size_t s = 0; s <= t; ++s) {
        if (window > 0 && s + window <= t) continue;
        double score = 0;
        for (std::size_t i = 0; i < dim; ++i) score += q[t][head * dim + i] * k[s][kv + i];
        const double weight = std::exp(score * a.scale);
        sum += weight;
        for (std::size_t i = 0; i < dim; ++i) y[head * dim + i] += weight * v[s][kv + i];
      }
      for (std::size_t i = 0; i < dim; ++i) y[head * dim + i] /= sum;
    }
  }
  return out;
}

inline std::vector<Vector> PlainForward(const TestModel& model, const std::vector<TokenId>& tokens) {
  const core::ModelSpec& spec = model.Spec();
  const std::vector<float>& embedding = model.Plain(Role::kEmbedding);
  std::vector<Vector> residual;
  for (const TokenId token : tokens)
    residual.emplace_back(embedding.begin() + std::ptrdiff_t(token) * spec.hidden,
                          embedding.begin() + std::ptrdiff_t(token + 1) * spec.hidden);
  for (int layer = 0; layer < spec.LayerCount(); ++layer) {
    const std::vector<Vector> attended = PlainAttention(model, layer, residual);
    for (std::size_t t = 0; t < tokens.size(); ++t) {
      Vector o = Times(model.Plain(Role::kO, layer), attended[t]);
      for (int i = 0; spec.attention.o_bias && i < spec.hidden; ++i)
        o[i] += model.Plain(Role::kOBias, layer)[i];
      for (int i = 0; i < spec.hidden; ++i) residual[t][i] += o[i];
      const Vector x = Normed(model.Plain(Role::kMlpNorm, layer), spec.rms_eps, residual[t]);
      const Vector y =
          spec.layers[layer].moe
              ? PlainMoe(model, layer, x)
              : PlainMlp(spec.activation,
                         {model.Plain(Role::kDenseGate, layer), model.Plain(Role::kDenseUp, layer),
                          model.Plain(Role::kDenseDown, layer), model.Plain(Role::kDenseGateBias, layer),
                          model.Plain(Role::kDenseUpBias, layer), model.Plain(Role::kDenseDownBias, layer)},
                         x);
      for (int i = 0; i < spec.hidden; ++i) residual[t][i] += y[i];
    }
  }
  std::vector<Vector> logits;
  for (const Vector& row : residual)
    logits.push_back(Times(model.Plain(spec.tied_head ? Role::kEmbedding : Role::kLmHead),
                           Normed(model.Plain(Role::kFinalNorm), spec.rms_eps, row)));
  return logits;
}

}  // namespace elasticmoe::compute::testing
