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
// as config says. Refuses with kUnimplemented what no family here has: a RoPE scaling other than linear,
// dynamic, yarn and llama3, an activation that is not silu. Windows, partial RoPE: see below.
Status ReadDecoder(const ConfigReader& config, core::ModelSpec& spec);

// The parts of ReadDecoder for families whose attention is their own: everything but attention, and RoPE's
// theta and scaling ("rope_scaling" or "rope_parameters", which corrects attention.scale in MLA). ReadRope
// REQUIRES: max_positions and attention but for rope are filled.
Status ReadModel(const ConfigReader& config, core::ModelSpec& spec);
Status ReadRope(const ConfigReader& config, core::ModelSpec& spec);

// The rotated part of a head: partial_rotary_factor, beside the other keys or, in newer configs, inside of
// rope_parameters. REQUIRES: head_dim is filled.
Status ReadPartialRope(const ConfigReader& config, double fallback, core::ModelSpec& spec);

// For families that rotate whole heads: unsupported where partial_rotary_factor, in either place, is not 1.
Status OnlyWholeRope(const ConfigReader& config);

// Sliding windows: layers from `first_layer` on, or as layer_types says, see sliding_window tokens.
Status ReadWindows(const ConfigReader& config, int first_layer, core::ModelSpec& spec);
// For families that have none: kUnimplemented where layer_types asks for one.
Status OnlyFullAttention(const ConfigReader& config);
void WriteWindows(const core::ModelSpec& spec, Json& config);

// Which layers are MoE: all but those in mlp_only_layers and those passed over by decoder_sparse_step.
Status ReadSparseLayers(const ConfigReader& config, core::ModelSpec& spec);
void WriteSparseLayers(const core::ModelSpec& spec, Json& config);
// intermediate_size for the layers that are dense.
Status ReadDenseWidth(const ConfigReader& config, core::ModelSpec& spec);

// n_group, topk_group. REQUIRES: experts and top_k are filled.
Status ReadGroups(const ConfigReader& config, core::MoeSpec& moe);

// experts and top_k from the key of that name, or from one that newer versions of transformers write instead
// ("num_experts", "num_local_experts"; "num_experts_per_tok", "experts_per_token"). REQUIRES: spec.layers is
// filled.
Status ReadExperts(const ConfigReader& config, const char* experts_key, core::ModelSpec& spec,
                   const char* top_k_key = "num_experts_per_tok");

// The keys that ReadDecoder reads.
Json DecoderConfig(const core::ModelSpec& spec);

// Embedding, final norm, head (where not tied).
void AddGlobalTensors(const core::ModelSpec& spec, std::vector<TensorName>& out);

// Norms and attention of one layer.
void AddAttentionTensors(const core::ModelSpec& spec, int layer, std::vector<TensorName>& out);

// MLP of one layer, dense or MoE, its shared expert called mlp.`shared`.
void AddMlpTensors(const core::ModelSpec& spec, int layer, const char* shared, std::vector<TensorName>& out);

// All of these: the names that most families have.
std::vector<TensorName> DecoderTensors(const core::ModelSpec& spec, const char* shared = "shared_experts");

// "model.layers.N."
std::string LayerPrefix(int layer);

}  // namespace elasticmoe::model
