// Placement: which device serves which expert of which layer, as one immutable value with a number. Pure.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/ids.h"

namespace elasticmoe::core {

// Layers are MoE layers, counted from 0 (dense layers have no experts and are not counted).
class Placement {
 public:
  Placement() = default;
  Placement(Epoch epoch, std::vector<DeviceId> members, int layers, int experts);

  Epoch epoch() const { return epoch_; }
  const std::vector<DeviceId>& members() const { return members_; }  // index = rank
  int layers() const { return layers_; }
  int experts() const { return experts_; }
  int RankOf(DeviceId device) const;  // -1 if it is no member

  // Devices that serve the expert, primary first; never empty in a complete placement.
  std::span<const DeviceId> Owners(int layer, int expert) const;
  void SetOwners(int layer, int expert, std::vector<DeviceId> owners);

  // The owner that rows of `source_rank` are sent to: replicas share the ranks round robin. Which replica
  // computes a row does not change its value.
  DeviceId OwnerFor(int layer, int expert, int source_rank) const;

  int ExpertsOn(DeviceId device, int layer) const;
  int ExpertsOn(DeviceId device) const;
  std::uint64_t Hash() const;
  friend bool operator==(const Placement&, const Placement&) = default;

 private:
  Epoch epoch_;
  std::vector<DeviceId> members_;
  int layers_ = 0;
  int experts_ = 0;
  std::vector<std::vector<DeviceId>> owners_;  // [layer * experts + expert]
};

// Experts dealt out over the members as evenly as the counts allow (the first placement of an instance):
// consecutive experts to one device, each layer's remainder to different devices.
Placement EvenPlacement(Epoch epoch, std::vector<DeviceId> members, int layers, int experts);

}  // namespace elasticmoe::core
