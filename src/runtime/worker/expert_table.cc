#include "runtime/worker/expert_table.h"

#include <optional>

#include "base/check.h"

namespace elasticmoe::runtime {
namespace {

class PointerTable : public ExpertTable {
 public:
  PointerTable(const ExpertTableShape& shape, const Mapping& domain) : shape_(shape), domain_(domain) {}

  Expected<std::vector<std::byte*>> Prepare(std::uint64_t, std::span<const OwnedExpert> owned) override {
    std::vector<std::byte*> addresses;
    for (const OwnedExpert& expert : owned) {
      addresses.push_back(domain_.data() + expert.offset);
      Prefault(addresses.back(), shape_.expert_bytes);
    }
    return addresses;
  }

  std::size_t Mappings() const override { return 0; }

 private:
  ExpertTableShape shape_;
  const Mapping& domain_;
};

class RemapTable : public ExpertTable {
 public:
  RemapTable(const ExpertTableShape& shape, int domain_fd)
      : shape_(shape), fd_(domain_fd), ring_(shape.epochs) {}

  Expected<std::vector<std::byte*>> Prepare(std::uint64_t epoch,
                                            std::span<const OwnedExpert> owned) override {
    Ring& ring = ring_[epoch % ring_.size()];
    if (ring.layers.empty()) {
      // Addresses for every expert of every layer; memory and mappings only where something is owned.
      for (int layer = 0; layer < shape_.layers; ++layer) {
        EM_ASSIGN_OR_RETURN(Mapping range, Reserve(shape_.experts * shape_.stride_bytes));
        ring.layers.push_back({std::move(range), std::vector<std::optional<std::uint64_t>>(shape_.experts)});
      }
    }
    std::vector<int> used(shape_.layers, 0);
    std::vector<std::byte*> addresses;
    for (const OwnedExpert& expert : owned) {
      Layer& layer = ring.layers[expert.layer];
      const int slot = used[expert.layer]++;
      std::byte* address = layer.range.data() + slot * shape_.stride_bytes;
      if (layer.slots[slot] != expert.offset) {
        EM_RETURN_IF_ERROR(MapInto(layer.range, slot * shape_.stride_bytes, fd_, expert.offset,
                                   shape_.stride_bytes,
                                   /*writable=*/false));
        layer.slots[slot] = expert.offset;
        Prefault(address, shape_.expert_bytes);
      }
      addresses.push_back(address);
    }
    // What is not owned any more must not keep pages alive that the pool gives to others.
    for (int layer = 0; layer < shape_.layers; ++layer) {
      Layer& mine = ring.layers[layer];
      for (int slot = used[layer]; slot < shape_.experts; ++slot) {
        if (!mine.slots[slot]) continue;
        EM_RETURN_IF_ERROR(Unmap(mine.range, slot * shape_.stride_bytes, shape_.stride_bytes));
        mine.slots[slot].reset();
      }
    }
    return addresses;
  }

  std::size_t Mappings() const override {
    std::size_t mappings = 0;
    for (const Ring& ring : ring_)
      for (const Layer& layer : ring.layers)
        for (const auto& slot : layer.slots) mappings += slot.has_value();
    return mappings;
  }

 private:
  struct Layer {
    Mapping range;
    std::vector<std::optional<std::uint64_t>> slots;  // offset that is mapped there
  };
  struct Ring {
    std::vector<Layer> layers;
  };

  ExpertTableShape shape_;
  int fd_;
  std::vector<Ring> ring_;
};

}  // namespace

std::string_view ToString(ExpertTableKind kind) {
  return kind == ExpertTableKind::kRemap ? "remap" : "pointer";
}

std::unique_ptr<ExpertTable> MakeExpertTable(ExpertTableKind kind, const ExpertTableShape& shape,
                                             const Mapping& domain, int domain_fd) {
  EM_CHECK(shape.epochs > 0 && shape.stride_bytes >= shape.expert_bytes);
  if (kind == ExpertTableKind::kRemap) return std::make_unique<RemapTable>(shape, domain_fd);
  return std::make_unique<PointerTable>(shape, domain);
}

}  // namespace elasticmoe::runtime
