#include "model/gguf/export.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <map>
#include <optional>
#include <system_error>
#include <vector>

#include "base/file.h"
#include "model/checkpoint.h"
#include "model/config_reader.h"
#include "model/gguf/gguf.h"
#include "model/gguf/model.h"
#include "model/gguf/names.h"
#include "model/gguf/tokenizer.h"
#include "model/gguf/writer.h"
#include "model/tokenizer/tokenizer_config.h"

namespace elasticmoe::model {
namespace {

namespace fs = std::filesystem;

constexpr std::uint64_t kSliceValues = 1 << 20;

// general.file_type
std::uint32_t FileType(Encoding encoding) {
  switch (encoding) {
    case Encoding::kF32:
      return 0;
    case Encoding::kF16:
      return 1;
    case Encoding::kQ4_0:
      return 2;
    case Encoding::kQ8_0:
      return 7;
    default:
      return 32;  // bf16
  }
}

bool IsMatrix(TensorRole role, const std::vector<std::int64_t>& shape) {
  return shape.size() == 2 && role != TensorRole::kRouter && role != TensorRole::kSharedMix &&
         role != TensorRole::kRouterCorrection;
}

// The tensors of one entry of the file: one, or an expert's matrix of each expert in their order.
struct Parts {
  TensorRole role;
  std::vector<const TensorSource*> sources;
};

class Exporter {
 public:
  Exporter(const ExportGgufOptions& options, Checkpoint checkpoint, const GgufArchitecture& architecture)
      : options_(options), checkpoint_(std::move(checkpoint)), architecture_(architecture) {}

  Expected<ExportedGguf> Run() {
    AddMetadata();
    EM_RETURN_IF_ERROR(AddTokenizer());
    EM_RETURN_IF_ERROR(AddTensors());
    EM_RETURN_IF_ERROR(CheckReadsBack());
    EM_RETURN_IF_ERROR(CheckSpace());
    for (const fs::path& path : checkpoint_.files) {
      streams_.emplace_back(path, std::ios::binary);
      if (!streams_.back())
        return Fail(ErrorCode::kUnavailable, "opening {}: check its permissions", path.string());
    }
    EM_RETURN_IF_ERROR(writer_.Write(options_.out, [&](std::size_t i, const GgufWriter::Append& append) {
      return Fill(writer_.Tensors()[i], parts_[i], append);
    }));
    return ExportedGguf{writer_.Header().size() + writer_.DataBytes(), writer_.Tensors().size()};
  }

 private:
  void AddMetadata() {
    const core::ModelSpec& spec = checkpoint_.spec;
    const std::string arch(architecture_.name);
    const auto count = [&](const char* key, int value) {
      writer_.Add(arch + "." + key, static_cast<std::uint32_t>(value));
    };
    writer_.Add("general.architecture", arch);
    writer_.Add("general.name", fs::weakly_canonical(options_.directory).filename().string());
    writer_.Add("general.file_type", FileType(options_.encoding));
    writer_.Add("general.quantization_version", std::uint32_t{2});
    const GenerationDefaults& generation = checkpoint_.generation;
    const auto sampling = [&](const char* key, std::optional<float> value) {
      if (value) writer_.Add(std::string("general.sampling.") + key, *value);
    };
    sampling("temp", generation.temperature);
    sampling("top_p", generation.top_p);
    sampling("min_p", generation.min_p);
    sampling("penalty_repeat", generation.repetition_penalty);
    if (generation.top_k)
      writer_.Add("general.sampling.top_k", static_cast<std::uint32_t>(*generation.top_k));
    count("block_count", spec.LayerCount());
    count("context_length", spec.max_positions);
    count("embedding_length", spec.hidden);
    count("attention.head_count", spec.attention.heads);
    count("attention.head_count_kv", spec.attention.Latent() ? 1 : spec.attention.kv_heads);
    // Of latent attention these two are of what is cached.
    const bool latent = spec.attention.Latent();
    count("attention.key_length", latent ? spec.attention.LatentDim() : spec.attention.head_dim);
    count("attention.value_length", latent ? spec.attention.kv_lora_rank : spec.attention.head_dim);
    if (latent) {
      count("attention.key_length_mla", spec.attention.head_dim);
      count("attention.value_length_mla", spec.attention.value_dim);
      count("attention.kv_lora_rank", spec.attention.kv_lora_rank);
      if (spec.attention.q_lora_rank > 0) count("attention.q_lora_rank", spec.attention.q_lora_rank);
    }
    for (const core::LayerSpec& layer : spec.layers) {
      if (layer.window == 0) continue;
      count("attention.sliding_window", layer.window);
      break;
    }
    AddRope(arch);
    writer_.Add(arch + ".attention.layer_norm_rms_epsilon", spec.rms_eps);
    count("vocab_size", spec.vocab);
    int dense_width = architecture_.width_is_experts ? spec.moe.expert_width : 0;
    for (const core::LayerSpec& layer : spec.layers) dense_width = std::max(dense_width, layer.dense_width);
    // Engines ask for it though a model of experts alone has none.
    count("feed_forward_length", dense_width > 0 ? dense_width : spec.moe.expert_width);
    if (spec.moe.experts == 0) return;
    count("expert_count", spec.moe.experts);
    count("expert_used_count", spec.moe.top_k);
    if (!architecture_.width_is_experts) count("expert_feed_forward_length", spec.moe.expert_width);
    const Json config = (*FindFamily(spec.family))->Config(spec);
    const auto number = [&](std::string_view key) {
      return key.empty() ? 0 : config.value(std::string(key), Json(0)).get<int>();
    };
    const int shared = number(architecture_.shared_key);
    if (spec.moe.shared_width > 0)  // of Ling's one
      count("expert_shared_feed_forward_length",
            architecture_.fused_qkv ? spec.moe.shared_width / shared : spec.moe.shared_width);
    writer_.Add(arch + ".expert_weights_norm", spec.moe.renormalize);
    count("expert_gating_func", static_cast<int>(architecture_.gating));
    if (architecture_.shared_key.empty()) return;
    count("expert_shared_count", shared);
    if (config.contains("moe_layer_interval"))
      count("interleave_moe_layer_step", number("moe_layer_interval"));
    count("leading_dense_block_count", number(architecture_.dense_key));
    writer_.Add(arch + ".expert_weights_scale", spec.moe.scaling);
    if (!config.contains("n_group")) return;
    count("expert_group_count", spec.moe.groups);
    count("expert_group_used_count", spec.moe.chosen_groups);
  }

  void AddRope(const std::string& arch) {
    const core::AttentionSpec& attention = checkpoint_.spec.attention;
    const core::RopeSpec& rope = attention.rope;
    writer_.Add(arch + ".rope.dimension_count", static_cast<std::uint32_t>(attention.RopeDim()));
    writer_.Add(arch + ".rope.freq_base", static_cast<float>(attention.rope_theta));
    using Scaling = core::RopeSpec::Scaling;
    if (rope.scaling != Scaling::kLinear && rope.scaling != Scaling::kYarn) return;
    const bool yarn = rope.scaling == Scaling::kYarn;
    writer_.Add(arch + ".rope.scaling.type", std::string(yarn ? "yarn" : "linear"));
    writer_.Add(arch + ".rope.scaling.factor", static_cast<float>(rope.factor));
    if (!yarn) return;
    writer_.Add(arch + ".rope.scaling.original_context_length",
                static_cast<std::uint32_t>(rope.original_positions));
    writer_.Add(arch + ".rope.scaling.yarn_beta_fast", static_cast<float>(rope.beta_fast));
    writer_.Add(arch + ".rope.scaling.yarn_beta_slow", static_cast<float>(rope.beta_slow));
    if (rope.mscale_all_dim != 0)
      writer_.Add(arch + ".rope.scaling.yarn_log_multiplier", static_cast<float>(rope.mscale_all_dim * 0.1));
  }

  Status AddTokenizer() {
    std::error_code code;
    if (!fs::exists(options_.directory / "tokenizer.json", code)) {
      writer_.Add("tokenizer.ggml.model", std::string("none"));
      return {};
    }
    EM_ASSIGN_OR_RETURN(const std::string text, ReadFile(options_.directory / "tokenizer.json"));
    EM_ASSIGN_OR_RETURN(TokenizerJson json, ReadTokenizerJson(text));
    EM_ASSIGN_OR_RETURN(const PlainJson config, ReadTokenizerConfigFiles(options_.directory));
    if (auto status = WriteGgufTokenizer(std::move(json), config, checkpoint_.spec.vocab, writer_); !status)
      return Within(options_.directory.string(), std::move(status.error()));
    const auto& eos = checkpoint_.spec.eos_ids;
    if (eos.size() > 1) writer_.Add("tokenizer.ggml.eot_token_id", static_cast<std::uint32_t>(eos[1]));
    return {};
  }

  Status AddTensors() {
    // Experts of a layer and role are one entry, in their order.
    std::map<std::pair<TensorRole, int>, std::vector<const TensorSource*>> stacks;
    for (const TensorSource& source : checkpoint_.tensors)
      stacks[{source.tensor.role, source.tensor.layer}].push_back(&source);
    if (architecture_.fused_qkv) {
      const auto fuse = [&](TensorRole q, TensorRole k, TensorRole v) {
        for (int layer = 0; layer < checkpoint_.spec.LayerCount(); ++layer)
          for (const TensorRole role : {k, v})
            if (auto part = stacks.extract(std::pair(role, layer)); !part.empty())
              stacks[{q, layer}].push_back(part.mapped()[0]);
      };
      fuse(TensorRole::kQ, TensorRole::kK, TensorRole::kV);
      fuse(TensorRole::kQBias, TensorRole::kKBias, TensorRole::kVBias);
    }
    for (auto& [key, parts] : stacks) {
      if (key.first == TensorRole::kKvUp) {
        AddLatents(parts);
        continue;
      }
      std::ranges::stable_sort(parts, {}, [](const TensorSource* source) { return source->tensor.expert; });
      const TensorName& first = parts[0]->tensor;
      const bool fused = !OfExpert(first.role) && parts.size() > 1;
      const std::string name = fused ? GgufFusedName(first.role, first.layer)
                                     : GgufTensorName(architecture_, first.role, first.layer);
      if (name.empty()) return Fail(ErrorCode::kUnimplemented, "tensor {} has no name in GGUF", first.name);
      std::vector<std::int64_t> shape = first.shape;
      if (first.role == TensorRole::kRouterCorrection) shape = {shape.back()};  // ERNIE has one row of it
      Encoding encoding = IsMatrix(first.role, shape) ? options_.encoding : Encoding::kF32;
      if (shape.back() % BlockValues(encoding) != 0) encoding = Encoding::kF16;
      for (std::size_t i = 1; fused && i < parts.size(); ++i) shape[0] += parts[i]->tensor.shape[0];
      if (OfExpert(first.role)) shape.insert(shape.begin(), static_cast<std::int64_t>(parts.size()));
      writer_.AddTensor(name, std::move(shape), encoding);
      parts_.push_back({key.first, std::move(parts)});
    }
    return {};
  }

  // kKvUp as kKeyUp and kValueUp.
  void AddLatents(const std::vector<const TensorSource*>& source) {
    const core::AttentionSpec& a = checkpoint_.spec.attention;
    const auto add = [&](TensorRole role, std::vector<std::int64_t> shape) {
      const Encoding encoding =
          shape.back() % BlockValues(options_.encoding) == 0 ? options_.encoding : Encoding::kF16;
      writer_.AddTensor(GgufTensorName(architecture_, role, source[0]->tensor.layer), std::move(shape),
                        encoding);
      parts_.push_back({role, source});
    };
    add(TensorRole::kKeyUp, {a.heads, a.kv_lora_rank, a.PlainDim()});
    add(TensorRole::kValueUp, {a.heads, a.value_dim, a.kv_lora_rank});
  }

  Status FillLatents(const GgufWriter::Tensor& tensor, const Parts& parts, RowReader& reader,
                     const GgufWriter::Append& append) {
    const core::AttentionSpec& a = checkpoint_.spec.attention;
    const bool keys = parts.role == TensorRole::kKeyUp;
    const int rows = keys ? a.PlainDim() : a.value_dim;
    const std::size_t k = a.kv_lora_rank;
    for (int head = 0; head < a.heads; ++head) {
      const int begin = head * (a.PlainDim() + a.value_dim) + (keys ? 0 : a.PlainDim());
      EM_ASSIGN_OR_RETURN(const PlainRows plain, reader.Read(*parts.sources[0], k, begin, rows));
      std::vector<float> values(rows * k), turned(rows * k);
      Decode(EncodingOf(plain.type), plain.data, values.size(), values.data());
      for (int row = 0; row < rows; ++row)
        for (std::size_t i = 0; i < k; ++i) turned[keys ? i * rows + row : row * k + i] = values[row * k + i];
      Put(tensor, turned, append);
    }
    return {};
  }

  void Put(const GgufWriter::Tensor& tensor, const std::vector<float>& values,
           const GgufWriter::Append& append) {
    std::string bytes;
    Encode(tensor.encoding, values.data(), values.size(), bytes);
    append(bytes);
    done_bytes_ += bytes.size();
    if (options_.progress) options_.progress(done_bytes_, writer_.DataBytes());
  }

  // Refuses a model of which the metadata cannot say everything: what they say is read back and compared.
  Status CheckReadsBack() {
    const std::string header = writer_.Header();
    EM_ASSIGN_OR_RETURN(const Gguf gguf, ParseGguf(header, header.size() + writer_.DataBytes()));
    EM_ASSIGN_OR_RETURN(const Json read, GgufConfig(gguf));
    EM_ASSIGN_OR_RETURN(const Family* family, FamilyOf(read));
    EM_ASSIGN_OR_RETURN(const core::ModelSpec spec, family->Spec(read));
    const Json want = (*FindFamily(checkpoint_.spec.family))->Config(checkpoint_.spec);
    const Json got = family->Config(spec);
    std::vector<std::string> lost;
    for (const auto& [key, value] : want.items())
      if (key != "eos_token_id" && (!got.contains(key) || !Alike(value, got[key])))
        lost.push_back(fmt::format("{}={}", key, Shown(value)));
    if (lost.empty()) return {};
    return Fail(ErrorCode::kUnimplemented, "{}: a model with {} cannot be written as GGUF",
                options_.directory.string(), fmt::join(lost, ", "));
  }

  // Numbers become float32 in the file.
  static bool Alike(const Json& a, const Json& b) {
    if (a.is_number() && b.is_number())
      return std::abs(a.get<double>() - b.get<double>()) <= 1e-6 * std::abs(a.get<double>());
    if (!a.is_structured() || a.size() != b.size() || a.type() != b.type()) return a == b;
    if (a.is_array()) return std::equal(a.begin(), a.end(), b.begin(), Alike);
    return std::ranges::all_of(a.items(), [&](const auto& entry) {
      return b.contains(entry.key()) && Alike(entry.value(), b[entry.key()]);
    });
  }

  Status CheckSpace() {
    std::error_code code;
    const fs::path parent = options_.out.has_parent_path() ? options_.out.parent_path() : fs::path(".");
    const fs::space_info space = fs::space(parent, code);
    if (code) return Fail(ErrorCode::kUnavailable, "writing {}: {}", options_.out.string(), code.message());
    if (space.available < writer_.DataBytes())
      return Fail(ErrorCode::kResourceExhausted, "writing {}: {} bytes needed (free={})",
                  options_.out.string(), writer_.DataBytes(), space.available);
    return {};
  }

  Status ReadAt(int file, std::uint64_t offset, std::byte* out, std::uint64_t bytes) {
    std::ifstream& stream = streams_[static_cast<std::size_t>(file)];
    stream.seekg(static_cast<std::streamoff>(offset));
    stream.read(reinterpret_cast<char*>(out), static_cast<std::streamsize>(bytes));
    if (!stream)
      return Fail(ErrorCode::kDataLoss, "reading {}: {} bytes at {}; fetch it again",
                  checkpoint_.files[file].string(), bytes, offset);
    return {};
  }

  Status Fill(const GgufWriter::Tensor& tensor, const Parts& parts, const GgufWriter::Append& append) {
    RowReader reader([this](int file, std::uint64_t offset, std::byte* out, std::uint64_t bytes) {
      return ReadAt(file, offset, out, bytes);
    });
    if (parts.role == TensorRole::kKeyUp || parts.role == TensorRole::kValueUp)
      return FillLatents(tensor, parts, reader, append);
    for (const TensorSource* source : parts.sources) {
      // A vector is as many rows of one: every other one of them may be meant.
      const auto& shape = source->tensor.shape;
      const auto k = shape.size() == 1 ? std::uint64_t{1} : static_cast<std::uint64_t>(shape.back());
      std::uint64_t rows = 1;
      for (const std::int64_t size : source->tensor.shape) rows *= static_cast<std::uint64_t>(size);
      rows /= k;
      const bool pairs = architecture_.rotary_pairs &&
                         (source->tensor.role == TensorRole::kQ || source->tensor.role == TensorRole::kK);
      const auto head_dim = static_cast<std::uint64_t>(checkpoint_.spec.attention.head_dim);
      // Whole heads at a time where their rows change places.
      const std::uint64_t unit = pairs ? head_dim : 1;
      const std::uint64_t slice = std::max<std::uint64_t>(kSliceValues / k / unit, 1) * unit;
      for (std::uint64_t row = 0; row < rows; row += slice) {
        const std::uint64_t count = std::min(slice, rows - row);
        EM_ASSIGN_OR_RETURN(const PlainRows plain, reader.Read(*source, k, row, count));
        std::vector<float> values(count * k), ordered;
        Decode(EncodingOf(plain.type), plain.data, values.size(), values.data());
        if (pairs) {
          const RowOrder order{.pairs_head_dim = static_cast<std::uint32_t>(head_dim)};
          ordered.resize(values.size());
          for (std::uint64_t i = 0; i < count; ++i)
            std::copy_n(&values[i * k], k, &ordered[order.StoredRow(i) * k]);
          values.swap(ordered);
        }
        Put(tensor, values, append);
      }
    }
    return {};
  }

  static Encoding EncodingOf(DType type) {
    return type == DType::kBf16 ? Encoding::kBf16 : type == DType::kF16 ? Encoding::kF16 : Encoding::kF32;
  }

  const ExportGgufOptions& options_;
  const Checkpoint checkpoint_;
  const GgufArchitecture& architecture_;
  GgufWriter writer_;
  std::vector<Parts> parts_;  // one an entry of writer_
  std::vector<std::ifstream> streams_;
  std::uint64_t done_bytes_ = 0;
};

}  // namespace

Expected<ExportedGguf> ExportGguf(const ExportGgufOptions& options) {
  if (IsGgufPath(options.directory))
    return Fail(ErrorCode::kInvalidArgument, "{} is a GGUF file already; give a Hugging Face directory",
                options.directory.string());
  EM_ASSIGN_OR_RETURN(Checkpoint checkpoint, Checkpoint::Open(options.directory));
  const GgufArchitecture* architecture = FindGgufArchitectureOf(checkpoint.spec.family);
  if (architecture == nullptr)
    return Fail(ErrorCode::kUnimplemented, "{}: family {} cannot be written as GGUF (supported: {})",
                options.directory.string(), checkpoint.spec.family, GgufArchitectureNames());
  checkpoint.spec.head_norm = false;  // its final norm is read with that in it
  return Exporter(options, std::move(checkpoint), *architecture).Run();
}

}  // namespace elasticmoe::model
