// Strong ids: integers that cannot be mixed up. Pure.
#pragma once

#include <fmt/format.h>

#include <compare>
#include <cstdint>

namespace elasticmoe {

template <class Tag, class Rep = std::int32_t>
struct StrongId {
  Rep value{};
  constexpr StrongId() = default;
  constexpr explicit StrongId(Rep v) : value(v) {}
  friend constexpr auto operator<=>(StrongId, StrongId) = default;
};

using DeviceId = StrongId<struct DeviceTag>;  // stable name of a device; its rank may change with the epoch
using DomainId = StrongId<struct DomainTag>;  // memory domain
using BlockId = StrongId<struct BlockTag>;    // KV block within its domain
using RequestId = StrongId<struct RequestTag, std::uint64_t>;
using Epoch = StrongId<struct EpochTag, std::uint64_t>;
using StepId = StrongId<struct StepTag, std::uint64_t>;

using TokenId = std::int32_t;  // the field's plain integer: arrays of it cross every border
using TimeNs = std::int64_t;   // nanoseconds of the driving clock; only differences mean anything

}  // namespace elasticmoe

template <class Tag, class Rep>
struct fmt::formatter<elasticmoe::StrongId<Tag, Rep>> : fmt::formatter<Rep> {
  template <class Context>
  auto format(elasticmoe::StrongId<Tag, Rep> id, Context& context) const {
    return fmt::formatter<Rep>::format(id.value, context);
  }
};
