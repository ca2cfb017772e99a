// What the families share: the keys of config.json and the tensor names that all Llama-like decoders have
// in common, and the limits within which sizes cannot overflow. An adapter adds its own. Pure.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/json.h"
#include "core/spec.h"
#include "model/config_reader.h"
#include "model/family.h"

namespace elasticmoe::model {

// An order of magnitude above the largest published models; every product of them fits 63 bits.
inline constexpr int kMaxHidden = 1 << 16;
inline constexpr int kMaxLayers = 1 << 10;
inline constexpr int kMaxHeads = 1 << 10;
inline constexpr int kMaxHeadDim = 1 << 10;
inline constexpr int kMaxWidth = 1 << 18;
inline constexpr int kMaxVocab = 1 << 22;
inline constexpr int kMaxPositions = 1 << 24;
inline constexpr int kMaxExperts = 1 << 12;
inline constexpr int kMaxLayerExperts = 1 << 16;  // layers * experts: bounds the number of tensors

// Fills vocab, hidden, max_positions, rms_eps, attention, eos_ids and as many layers (dense, no width yet)
// as config says. Refuses with kUnimplemented what no family here has: scaled or partial RoPE, an
// activation that is not silu.
Status ReadDecoder(const ConfigReader& config, core::ModelSpec& spec);

// experts and top_k from the key of that name. REQUIRES: spec.layers is filled.
Status ReadExperts(const ConfigReader& config, const char* experts_key, core::ModelSpec& spec);

// The keys that ReadDecoder reads.
Json DecoderConfig(const core::ModelSpec& spec);

// Embedding, final norm, head (where not tied).
void AddGlobalTensors(const core::ModelSpec& spec, std::vector<TensorName>& out);

// Norms and attention of one layer.
void AddAttentionTensors(const core::ModelSpec& spec, int layer, std::vector<TensorName>& out);

// "model.layers.N."
std::string LayerPrefix(int layer);

}  // namespace elasticmoe::model
