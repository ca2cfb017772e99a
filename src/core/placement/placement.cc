#include "core/placement/placement.h"

#include <algorithm>

#include "base/check.h"
#include "base/hash.h"

namespace elasticmoe::core {

Placement::Placement(Epoch epoch, std::vector<DeviceId> members, int layers, int experts)
    : epoch_(epoch),
      members_(std::move(members)),
      layers_(layers),
      experts_(experts),
      owners_(static_cast<std::size_t>(layers) * experts),
      counts_(owners_.size()) {}

int Placement::RankOf(DeviceId device) const {
  const auto at = std::find(members_.begin(), members_.end(), device);
  return at == members_.end() ? -1 : static_cast<int>(at - members_.begin());
}

std::span<const DeviceId> Placement::Owners(int layer, int expert) const {
  const std::size_t index = IndexOf(layer, expert);
  return {owners_.data() + index * width_, counts_[index]};
}

bool Placement::Owns(DeviceId device, int layer, int expert) const {
  const auto owners = Owners(layer, expert);
  return std::find(owners.begin(), owners.end(), device) != owners.end();
}

void Placement::SetOwners(int layer, int expert, std::span<const DeviceId> owners) {
  if (static_cast<int>(owners.size()) > width_) {
    const int width = static_cast<int>(owners.size());
    std::vector<DeviceId> wider(counts_.size() * width);
    for (std::size_t i = 0; i < counts_.size(); ++i)
      std::copy_n(owners_.begin() + static_cast<std::ptrdiff_t>(i * width_), counts_[i],
                  wider.begin() + static_cast<std::ptrdiff_t>(i * width));
    owners_ = std::move(wider);
    width_ = width;
  }
  const std::size_t index = IndexOf(layer, expert);
  std::copy(owners.begin(), owners.end(), owners_.begin() + static_cast<std::ptrdiff_t>(index * width_));
  counts_[index] = static_cast<std::uint16_t>(owners.size());
}

Placement Placement::With(Epoch epoch, std::vector<DeviceId> members) const {
  Placement next = *this;
  next.epoch_ = epoch;
  next.members_ = std::move(members);
  return next;
}

bool operator==(const Placement& a, const Placement& b) {
  if (a.epoch_ != b.epoch_ || a.members_ != b.members_ || a.layers_ != b.layers_ || a.experts_ != b.experts_)
    return false;
  for (int layer = 0; layer < a.layers_; ++layer)
    for (int expert = 0; expert < a.experts_; ++expert)
      if (!std::ranges::equal(a.Owners(layer, expert), b.Owners(layer, expert))) return false;
  return true;
}

DeviceId Placement::OwnerFor(int layer, int expert, int source_rank) const {
  const auto owners = Owners(layer, expert);
  EM_CHECK(!owners.empty(), "layer={} expert={} has no owner", layer, expert);
  return owners[static_cast<std::size_t>(source_rank) % owners.size()];
}

int Placement::ExpertsOn(DeviceId device, int layer) const {
  int count = 0;
  for (int expert = 0; expert < experts_; ++expert) count += Owns(device, layer, expert);
  return count;
}

int Placement::ExpertsOn(DeviceId device) const {
  int count = 0;
  for (int layer = 0; layer < layers_; ++layer) count += ExpertsOn(device, layer);
  return count;
}

std::uint64_t Placement::Hash() const {
  std::uint64_t hash =
      HashCombine(epoch_.value, static_cast<std::uint64_t>(layers_) << 32 | static_cast<unsigned>(experts_));
  for (DeviceId member : members_) hash = HashCombine(hash, static_cast<std::uint64_t>(member.value));
  for (int layer = 0; layer < layers_; ++layer)
    for (int expert = 0; expert < experts_; ++expert) {
      const auto owners = Owners(layer, expert);
      hash = HashCombine(hash, owners.size());
      for (DeviceId owner : owners) hash = HashCombine(hash, static_cast<std::uint64_t>(owner.value));
    }
  return hash;
}

Placement EvenPlacement(Epoch epoch, std::vector<DeviceId> members, int layers, int experts) {
  EM_CHECK(!members.empty());
  const int count = static_cast<int>(members.size());
  Placement placement(epoch, members, layers, experts);
  for (int layer = 0; layer < layers; ++layer) {
    int expert = 0;
    for (int i = 0; i < count; ++i) {
      // Rotating by the layer spreads the larger shares over the devices.
      const int share = experts / count + ((i + layer) % count < experts % count ? 1 : 0);
      for (int j = 0; j < share; ++j) placement.SetOwners(layer, expert++, {members[i]});
    }
  }
  return placement;
}

}  // namespace elasticmoe::core
