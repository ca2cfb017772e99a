#include "model/fused_tensors.h"

#include <string_view>
#include <utility>

#include "model/config_reader.h"
#include "model/families/decoder.h"

namespace elasticmoe::model {
namespace {

struct Kind {
  std::string_view name;
  bool gate_up, bias;
};
constexpr Kind kKinds[] = {{"experts.gate_up_proj", true, false},
                           {"experts.down_proj", false, false},
                           {"experts.gate_up_proj_bias", true, true},
                           {"experts.down_proj_bias", false, true}};

const Kind* KindOf(std::string_view name) {
  for (const Kind& kind : kKinds)
    if (name.ends_with(kind.name) && name.size() > kind.name.size() &&
        name[name.size() - kind.name.size() - 1] == '.')
      return &kind;
  return nullptr;
}

Status Check(const TensorIndex& index, const StoredTensor& tensor, const Kind& kind) {
  const std::vector<std::int64_t>& shape = tensor.shape;
  const bool valid = shape.size() == (kind.bias ? 2 : 3) && tensor.data.bytes > 0 &&
                     shape[0] <= kMaxExperts && shape.back() <= 2 * kMaxWidth &&
                     (!kind.gate_up || shape.back() % 2 == 0);
  if (valid && (!tensor.known || PlainType(tensor.data.encoding))) return {};
  return Fail(ErrorCode::kInvalidArgument, "reading {}: tensor {}: {} [{}] (expected BF16 [experts, {}{}])",
              index.FileOf(tensor).string(), Shown(tensor.name), tensor.dtype, fmt::join(shape, ", "),
              kind.bias ? "" : "k, ", kind.gate_up ? "2 n" : "n");
}

void Split(const StoredTensor& fused, const Kind& kind, std::vector<StoredTensor>& out) {
  const std::string prefix = fused.name.substr(0, fused.name.rfind('.') + 1);
  const std::int64_t experts = fused.shape[0], outputs = fused.shape.back();
  const std::uint32_t columns = kind.bias ? 0 : static_cast<std::uint32_t>(outputs);
  const std::uint64_t bytes = fused.data.bytes / static_cast<std::uint64_t>(experts);
  for (std::int64_t expert = 0; expert < experts; ++expert) {
    const auto add = [&](std::string_view part, std::uint32_t first, std::uint32_t step) {
      StoredTensor tensor = fused;
      tensor.name = fmt::format("{}{}.{}.{}", prefix, expert, part, kind.bias ? "bias" : "weight");
      tensor.shape = {outputs / step};
      if (!kind.bias) tensor.shape.push_back(fused.shape[1]);
      tensor.data.offset += static_cast<std::uint64_t>(expert) * bytes;
      tensor.data.bytes = bytes / step;
      tensor.data.order = {.first = first, .step = step, .columns = columns};
      out.push_back(std::move(tensor));
    };
    if (kind.gate_up) {
      add("gate_proj", 0, 2);
      add("up_proj", 1, 2);
    } else {
      add("down_proj", 0, 1);
    }
  }
}

}  // namespace

Status SplitFusedExperts(TensorIndex& index) {
  std::vector<StoredTensor> made, kept;
  for (StoredTensor& tensor : index.tensors) {
    const Kind* kind = KindOf(tensor.name);
    if (kind == nullptr) {
      kept.push_back(std::move(tensor));
      continue;
    }
    EM_RETURN_IF_ERROR(Check(index, tensor, *kind));
    Split(tensor, *kind, made);
  }
  index.tensors = std::move(kept);
  return AddTensors(std::move(made), index);
}

Status SplitStackedExperts(const ExpertNames& names, TensorIndex& index) {
  std::vector<StoredTensor> made, kept;
  for (StoredTensor& tensor : index.tensors) {
    const Kind* kind = KindOf(tensor.name);
    if (kind == nullptr || kind->bias) {
      kept.push_back(std::move(tensor));
      continue;
    }
    const std::vector<std::int64_t>& shape = tensor.shape;
    const bool valid = shape.size() == 3 && tensor.data.bytes > 0 && shape[0] <= kMaxExperts &&
                       (!kind->gate_up || shape[1] % 2 == 0);
    if (!valid || (tensor.known && !PlainType(tensor.data.encoding)))
      return Fail(ErrorCode::kInvalidArgument,
                  "reading {}: tensor {}: {} [{}] (expected BF16 [experts, {}, k])",
                  index.FileOf(tensor).string(), Shown(tensor.name), tensor.dtype, fmt::join(shape, ", "),
                  kind->gate_up ? "2 n" : "n");
    const std::string prefix = tensor.name.substr(0, tensor.name.rfind('.') + 1);
    const std::int64_t parts = kind->gate_up ? 2 : 1;
    for (std::int64_t i = 0; i < shape[0] * parts; ++i) {
      const std::string_view part = parts == 1 ? names.down : i % 2 == 0 ? names.gate : names.up;
      StoredTensor one = tensor;
      one.name = fmt::format("{}{}.{}.weight", prefix, i / parts, part);
      one.shape = {shape[1] / parts, shape[2]};
      one.data.bytes /= static_cast<std::uint64_t>(shape[0] * parts);
      one.data.offset += static_cast<std::uint64_t>(i) * one.data.bytes;
      made.push_back(std::move(one));
    }
  }
  index.tensors = std::move(kept);
  return AddTensors(std::move(made), index);
}

void RenameTensors(std::string_view part, std::string_view other, TensorIndex& index) {
  for (StoredTensor& tensor : index.tensors)
    if (const std::size_t at = tensor.name.find(part); at != tensor.name.npos)
      tensor.name.replace(at, part.size(), other);
}

Status SplitFusedRows(std::string_view name, const std::vector<RowPart>& parts, TensorIndex& index) {
  std::int64_t all = 0;
  for (const RowPart& part : parts) all += part.rows;
  std::vector<StoredTensor> made, kept;
  for (StoredTensor& tensor : index.tensors) {
    const std::size_t dot = tensor.name.rfind('.');
    if (dot == tensor.name.npos || !std::string_view(tensor.name).substr(0, dot).ends_with(name)) {
      kept.push_back(std::move(tensor));
      continue;
    }
    if (tensor.shape.empty() || tensor.shape.size() > 2 || tensor.shape[0] != all)
      return Fail(ErrorCode::kInvalidArgument,
                  "reading {}: tensor {}: shape=[{}] (expected {} rows from config.json)",
                  index.FileOf(tensor).string(), Shown(tensor.name), fmt::join(tensor.shape, ", "), all);
    std::uint32_t first = 0;
    for (const RowPart& part : parts) {
      StoredTensor split = tensor;
      split.name = fmt::format("{}.{}{}", tensor.name.substr(0, dot), part.name, tensor.name.substr(dot));
      split.shape[0] = part.rows;
      split.data.bytes = tensor.data.bytes / static_cast<std::uint64_t>(all) * part.rows;
      split.data.order.first = first;  // rather than an offset: scales of blocks count from the first row
      first += static_cast<std::uint32_t>(part.rows);
      made.push_back(std::move(split));
    }
  }
  index.tensors = std::move(kept);
  return AddTensors(std::move(made), index);
}

}  // namespace elasticmoe::model
