// The pure half of make_model.h: from a number of parameters to a shape.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <system_error>

#include "base/check.h"
#include "base/json.h"
#include "model/config_reader.h"
#include "model/families/decoder.h"
#include "model/family.h"
#include "model/make_model.h"

namespace elasticmoe::model {
namespace {

constexpr double kMaxParameters = 1e13;
constexpr double kMaxMiss = 0.03;
constexpr double kGoodMiss = 0.02;  // good enough to prefer a rounder shape

// Proportions by size, after published models: OLMoE (7 B), Qwen3-30B-A3B, Qwen3-235B-A22B; scaled down
// below.
struct Tier {
  double below;  // parameters
  int hidden, layers, experts, top_k, vocab;
};
constexpr Tier kTiers[] = {
    {3e6, 64, 4, 8, 2, 512},        {15e6, 128, 6, 8, 2, 2048},        {40e6, 256, 6, 16, 4, 4096},
    {200e6, 512, 8, 16, 4, 8192},   {800e6, 768, 12, 32, 4, 32768},    {5e9, 1024, 24, 32, 4, 32768},
    {15e9, 2048, 16, 64, 8, 65536}, {100e9, 2048, 48, 128, 8, 151936}, {2e13, 4096, 94, 128, 8, 151936},
};
constexpr double kTiedBelow = 4e9;  // small models tie the head: it would be most of them

Expected<const Family*> FamilyOfShape(const std::string& shape) {
  std::string type = shape;
  std::ranges::replace(type, '-', '_');
  auto family = FindFamily(type);
  if (!family || (type != "qwen3_moe" && type != "mixtral"))
    return Fail(ErrorCode::kInvalidArgument, "making a model: shape={} (expected qwen3-moe or mixtral)",
                Shown(shape));
  return family;
}

Status CheckOverride(const char* name, const std::optional<int>& value, int low, int high) {
  if (!value || (*value >= low && *value <= high)) return {};
  return Fail(ErrorCode::kInvalidArgument, "making a model: {}={} (expected {} to {})", name, *value, low,
              high);
}

Status CheckOverrides(const MakeModelOptions& options) {
  EM_RETURN_IF_ERROR(CheckOverride("hidden", options.hidden, 32, kMaxHidden));
  EM_RETURN_IF_ERROR(CheckOverride("layers", options.layers, 1, kMaxLayers));
  EM_RETURN_IF_ERROR(CheckOverride("experts", options.experts, 1, kMaxExperts));
  EM_RETURN_IF_ERROR(CheckOverride("top-k", options.top_k, 1, options.experts.value_or(kMaxExperts)));
  EM_RETURN_IF_ERROR(CheckOverride("vocab", options.vocab, 2, kMaxVocab));
  EM_RETURN_IF_ERROR(CheckOverride("heads", options.heads, 1, kMaxHeads));
  EM_RETURN_IF_ERROR(CheckOverride("kv-heads", options.kv_heads, 1, kMaxHeads));
  EM_RETURN_IF_ERROR(CheckOverride("head-dim", options.head_dim, 2, kMaxHeadDim));
  if (options.hidden && *options.hidden % 32 != 0)
    return Fail(ErrorCode::kInvalidArgument, "making a model: hidden={} (expected a multiple of 32)",
                *options.hidden);
  if (options.head_dim && *options.head_dim % 2 != 0)
    return Fail(ErrorCode::kInvalidArgument, "making a model: head-dim={} (expected an even number)",
                *options.head_dim);
  return {};
}

// Everything but layers and expert width.
core::ModelSpec BaseSpec(const MakeModelOptions& options, const Family& family, const Tier& tier) {
  core::ModelSpec spec;
  spec.family = family.ModelType();
  spec.vocab = options.vocab.value_or(tier.vocab);
  spec.hidden = options.hidden.value_or(tier.hidden);
  spec.max_positions = 32768;
  spec.tied_head = options.tied_head.value_or(static_cast<double>(options.parameters) < kTiedBelow);
  core::AttentionSpec& attention = spec.attention;
  attention.head_dim = spec.hidden >= 128 ? 32 : 16;
  if (spec.hidden >= 256 && spec.hidden % 64 == 0) attention.head_dim = 64;
  if (spec.hidden >= 2048 && spec.hidden % 128 == 0) attention.head_dim = 128;
  attention.head_dim = options.head_dim.value_or(attention.head_dim);
  attention.heads = options.heads.value_or(std::max(1, spec.hidden / attention.head_dim));
  attention.kv_heads = options.kv_heads.value_or(attention.heads % 4 == 0 ? attention.heads / 4 : 1);
  attention.qk_norm = spec.family == "qwen3_moe";
  attention.rope_theta = 1e6;
  attention.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(attention.head_dim)));
  spec.moe.experts = options.experts.value_or(tier.experts);
  spec.moe.top_k = options.top_k.value_or(std::min(tier.top_k, spec.moe.experts));
  spec.moe.renormalize = true;
  return spec;
}

// Parameters as a function of the two numbers that are searched for.
struct Sizes {
  double fixed, per_layer, per_width;

  double Total(int layers, int width) const { return fixed + layers * (per_layer + width * per_width); }
};

Sizes SizesOf(const core::ModelSpec& spec) {
  const core::AttentionSpec& a = spec.attention;
  const double hidden = spec.hidden;
  const double attention =
      a.QkvRows() * hidden + hidden * a.heads * a.head_dim + (a.qk_norm ? 2.0 * a.head_dim : 0.0);
  return {.fixed = (spec.tied_head ? 1 : 2) * hidden * spec.vocab + hidden,
          .per_layer = attention + 2 * hidden + spec.moe.experts * hidden,
          .per_width = 3.0 * hidden * spec.moe.experts};
}

// A candidate is better if it misses by less than kGoodMiss, then if its width is rounder (up to 256: an
// expert then fills whole pages), then if its depth is nearer to the usual one; else if it misses by less.
struct Candidate {
  int layers = 0;
  int width = 0;
  double miss = 1e9;

  bool BetterThan(const Candidate& other, int usual_layers) const {
    const bool good = miss <= kGoodMiss, other_good = other.miss <= kGoodMiss;
    if (!good || !other_good) return miss < other.miss;
    const int round = std::min(width & -width, 256), other_round = std::min(other.width & -other.width, 256);
    if (round != other_round) return round > other_round;
    const int off = std::abs(layers - usual_layers), other_off = std::abs(other.layers - usual_layers);
    return off != other_off ? off < other_off : miss < other.miss;
  }
};

Candidate BestCandidate(const Sizes& sizes, double wish, int usual_layers, bool fixed_layers) {
  const int least = fixed_layers ? usual_layers : std::max(1, usual_layers * 2 / 3);
  const int most = fixed_layers ? usual_layers : usual_layers * 3 / 2;
  Candidate best;
  for (int layers = least; layers <= most; ++layers) {
    const double exact = ((wish - sizes.fixed) / layers - sizes.per_layer) / sizes.per_width;
    for (int step = 8; step <= 256; step *= 2) {
      const double width = std::clamp(std::round(exact / step) * step, 8.0, static_cast<double>(kMaxWidth));
      Candidate candidate{.layers = layers, .width = static_cast<int>(width)};
      candidate.miss = std::abs(sizes.Total(layers, candidate.width) / wish - 1);
      if (candidate.BetterThan(best, usual_layers)) best = candidate;
    }
  }
  return best;
}

}  // namespace

Expected<std::uint64_t> ParseParameterCount(std::string_view text) {
  double number = 0;
  const auto [end, code] =
      std::from_chars(text.data(), text.data() + text.size(), number, std::chars_format::fixed);
  std::string_view unit = text.substr(static_cast<std::size_t>(end - text.data()));
  double scale = 0;
  if (unit.empty()) scale = 1;
  if (unit == "k" || unit == "K") scale = 1e3;
  if (unit == "m" || unit == "M") scale = 1e6;
  if (unit == "b" || unit == "B") scale = 1e9;
  if (unit == "t" || unit == "T") scale = 1e12;
  if (code != std::errc() || scale == 0)
    return Fail(ErrorCode::kInvalidArgument,
                "reading a number of parameters: found {} (expected like 300M or 1.4B)",
                Shown(std::string(text)));
  const double count = std::round(number * scale);
  if (!(count >= 1 && count <= kMaxParameters))
    return Fail(ErrorCode::kInvalidArgument, "reading a number of parameters: found {} (limit=1 to 10T)",
                Shown(std::string(text)));
  return static_cast<std::uint64_t>(count);
}

Expected<core::ModelSpec> PickShape(const MakeModelOptions& options) {
  EM_RETURN_IF_ERROR(CheckOverrides(options));
  EM_ASSIGN_OR_RETURN(const Family* family, FamilyOfShape(options.shape));
  const double wish = static_cast<double>(options.parameters);
  const Tier* tier = std::ranges::find_if(kTiers, [&](const Tier& t) { return wish < t.below; });
  if (tier == std::end(kTiers) || options.parameters == 0)
    return Fail(ErrorCode::kInvalidArgument, "making a model: parameters={} (limit=1 to 10T)",
                options.parameters);
  core::ModelSpec spec = BaseSpec(options, *family, *tier);
  if (spec.attention.heads % spec.attention.kv_heads != 0)
    return Fail(ErrorCode::kInvalidArgument, "making a model: kv-heads={} (expected a divisor of heads={})",
                spec.attention.kv_heads, spec.attention.heads);
  const Sizes sizes = SizesOf(spec);
  const Candidate best =
      BestCandidate(sizes, wish, options.layers.value_or(tier->layers), options.layers.has_value());
  if (!(best.miss <= kMaxMiss))
    return Fail(
        ErrorCode::kInvalidArgument,
        "making a model: parameters={} cannot be met within 3 % (nearest: {:.0f} with hidden={}, layers={}, "
        "experts={}); change the number or these",
        options.parameters, sizes.Total(best.layers, best.width), spec.hidden, best.layers, spec.moe.experts);
  if (spec.moe.experts * best.layers > kMaxLayerExperts)
    return Fail(ErrorCode::kInvalidArgument, "making a model: experts={} times layers={} (limit={})",
                spec.moe.experts, best.layers, kMaxLayerExperts);
  spec.moe.expert_width = best.width;
  spec.layers.assign(static_cast<std::size_t>(best.layers), core::LayerSpec{.moe = true});
  return spec;
}

std::uint64_t CountParameters(const core::ModelSpec& spec) {
  const auto family = FindFamily(spec.family);
  EM_CHECK(family.has_value(), "{}", spec.family);
  std::uint64_t count = 0;
  for (const TensorName& tensor : (*family)->Tensors(spec)) {
    std::uint64_t size = 1;
    for (const std::int64_t n : tensor.shape) size *= static_cast<std::uint64_t>(n);
    count += size;
  }
  return count;
}

}  // namespace elasticmoe::model
