// Placement: which device serves which expert of which layer, as one immutable value with a number. Pure.
#pragma once

#include <cstdint>
#include <initializer_list>
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
  bool Owns(DeviceId device, int layer, int expert) const;
  void SetOwners(int layer, int expert, std::span<const DeviceId> owners);
  void SetOwners(int layer, int expert, std::initializer_list<DeviceId> owners) {
    SetOwners(layer, expert, std::span(owners.begin(), owners.size()));
  }

  // The same experts under another number and other members (a stage is made of the one before it).
  // REQUIRES: every owner is among `members`, or is replaced before the placement is used.
  Placement With(Epoch epoch, std::vector<DeviceId> members) const;

  // The owner that rows of `source_rank` are sent to: replicas share the ranks round robin. Which replica
  // computes a row does not change its value.
  DeviceId OwnerFor(int layer, int expert, int source_rank) const;

  int ExpertsOn(DeviceId device, int layer) const;
  int ExpertsOn(DeviceId device) const;
  std::uint64_t Hash() const;
  friend bool operator==(const Placement& a, const Placement& b);

 private:
  std::size_t IndexOf(int layer, int expert) const {
    return static_cast<std::size_t>(layer) * experts_ + expert;
  }

  Epoch epoch_;
  std::vector<DeviceId> members_;
  int layers_ = 0;
  int experts_ = 0;
  // Flat, since a plan of 256 x 61 experts holds one of these a stage: owner i of an expert is at
  // [index * width + i], i < counts[index].
  int width_ = 1;
  std::vector<DeviceId> owners_;
  std::vector<std::uint16_t> counts_;
};

// Experts dealt out over the members as evenly as the counts allow (the first placement of an instance):
// consecutive experts to one device, each layer's remainder to different devices.
Placement EvenPlacement(Epoch epoch, std::vector<DeviceId> members, int layers, int experts);

}  // namespace elasticmoe::core
