#include "runtime/coordinator/peer_copies.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <thread>
#include <vector>

namespace elasticmoe::runtime {
namespace {

using Clock = std::chrono::steady_clock;

// A call moves about so much: some milliseconds, beside which its own cost is not seen.
constexpr std::uint64_t kSliceBytes = std::uint64_t{64} << 20;

Json Pair(int layer, int expert) {
  return Json::array({layer, expert});
}

}  // namespace

PeerCopies::PeerCopies(std::string hmm_socket, std::uint64_t bytes_per_second)
    : socket_(std::move(hmm_socket)), bytes_per_second_(bytes_per_second) {}

Expected<Json> PeerCopies::Call(const Json& request) {
  if (!hmm_) {
    EM_ASSIGN_OR_RETURN(hmm_, HmmClient::Connect(socket_));
  }
  auto answer = hmm_->Call(request);
  if (answer) return std::move(answer->body);
  if (answer.error().code == ErrorCode::kUnavailable) hmm_.reset();  // gone, or loading: asked anew next time
  return tl::unexpected<Error>(std::move(answer.error()));
}

Status PeerCopies::Copy(Json request) {
  if (!cpus_.empty()) request["cpus"] = cpus_;
  const Clock::time_point start = Clock::now();
  EM_ASSIGN_OR_RETURN(const Json answer, Call(request));
  const auto bytes = answer.value("bytes", std::uint64_t{0});
  totals_.bytes += bytes;
  totals_.copy_ns += answer.value("ns", std::int64_t{0});
  if (bytes_per_second_ > 0)
    std::this_thread::sleep_until(
        start + std::chrono::nanoseconds(static_cast<std::int64_t>(1e9 * static_cast<double>(bytes) /
                                                                   static_cast<double>(bytes_per_second_))));
  totals_.elapsed_ns += std::chrono::nanoseconds(Clock::now() - start).count();
  return {};
}

Status PeerCopies::OpenDomain(DomainId domain) {
  auto opened = Call({{"op", "open_domain"}, {"domain", domain.value}});
  if (!opened && opened.error().code == ErrorCode::kAlreadyExists)
    opened = Call({{"op", "shared_bytes"}});  // by a try before, that may have ended half way
  if (!opened) return tl::unexpected<Error>(std::move(opened.error()));
  const auto total = opened->value("shared_bytes", std::uint64_t{0});
  for (std::uint64_t offset = 0; offset < total; offset += kSliceBytes)
    EM_RETURN_IF_ERROR(Copy({{"op", "copy_shared"},
                             {"to", domain.value},
                             {"offset", offset},
                             {"bytes", std::min(kSliceBytes, total - offset)}}));
  return {};
}

Status PeerCopies::CopyExperts(std::span<const core::ExpertMove> moves) {
  // Chains (a source that got its copy in the same stage) keep their order within a pair of domains only; so
  // what depends on another move goes in a later pass.
  std::vector<const core::ExpertMove*> left;
  for (const core::ExpertMove& move : moves)
    if (move.kind == core::MoveKind::kCopy) left.push_back(&move);
  while (!left.empty()) {
    std::map<std::pair<DeviceId, DeviceId>, std::vector<const core::ExpertMove*>> by_pair;
    std::vector<const core::ExpertMove*> later;
    for (const core::ExpertMove* move : left) {
      const bool chained = std::any_of(left.begin(), left.end(), [&](const core::ExpertMove* other) {
        return other->layer == move->layer && other->expert == move->expert && other->to == move->from;
      });
      if (chained)
        later.push_back(move);
      else
        by_pair[{move->from, move->to}].push_back(move);
    }
    for (bool any = true; any;) {
      any = false;
      for (auto& [pair, list] : by_pair) {
        if (list.empty()) continue;
        any = true;
        Json experts = Json::array();
        std::uint64_t bytes = 0;
        while (!list.empty() && (bytes == 0 || bytes + list.back()->bytes <= kSliceBytes)) {
          experts.push_back(Pair(list.back()->layer, list.back()->expert));
          bytes += list.back()->bytes;
          list.pop_back();
        }
        EM_RETURN_IF_ERROR(Copy({{"op", "copy_experts"},
                                 {"from", pair.first.value},
                                 {"to", pair.second.value},
                                 {"experts", experts}}));
      }
    }
    left = std::move(later);
  }
  return {};
}

Status PeerCopies::DropExperts(std::span<const core::ExpertDrop> drops) {
  std::map<DeviceId, Json> by_device;
  for (const core::ExpertDrop& drop : drops)
    by_device.try_emplace(drop.device, Json::array()).first->second.push_back(Pair(drop.layer, drop.expert));
  for (const auto& [device, experts] : by_device) {
    auto dropped = Call({{"op", "drop_experts"}, {"domain", device.value}, {"experts", experts}});
    if (!dropped && dropped.error().code != ErrorCode::kNotFound)  // the domain is gone, and they with it
      return tl::unexpected<Error>(std::move(dropped.error()));
  }
  return {};
}

Status PeerCopies::CloseDomain(DomainId domain) {
  auto closed = Call({{"op", "close_domain"}, {"domain", domain.value}});
  if (!closed && closed.error().code != ErrorCode::kNotFound)
    return tl::unexpected<Error>(std::move(closed.error()));
  return {};
}

Status PeerCopies::Restore(const MemoryMap& map, const core::Placement& placement) {
  if (!map.domain_per_device) return {};
  for (const DeviceId member : placement.members())
    if (map.Find(map.DomainOf(member)) == nullptr) EM_RETURN_IF_ERROR(OpenDomain(map.DomainOf(member)));
  std::vector<core::ExpertMove> moves;
  std::vector<core::ExpertDrop> drops;
  for (int layer = 0; layer < placement.layers(); ++layer)
    for (int expert = 0; expert < placement.experts(); ++expert) {
      const std::size_t index = static_cast<std::size_t>(layer) * placement.experts() + expert;
      const auto holds = [&](const DomainMap* domain) {
        return domain != nullptr && domain->expert_offsets[index] >= 0;
      };
      const auto source = std::find_if(map.domains.begin(), map.domains.end(),
                                       [&](const DomainMap& domain) { return holds(&domain); });
      if (source == map.domains.end())
        return Fail(ErrorCode::kDataLoss, "restoring the memory: layer={} expert={} is in no domain", layer,
                    expert);
      for (const DeviceId owner : placement.Owners(layer, expert))
        if (!holds(map.Find(map.DomainOf(owner))))
          moves.push_back({layer, expert, DeviceId(source->domain.value), owner, core::MoveKind::kCopy, 1});
      for (const DeviceId member : placement.members())
        if (holds(map.Find(map.DomainOf(member))) && !placement.Owns(member, layer, expert))
          drops.push_back({layer, expert, member});
    }
  EM_RETURN_IF_ERROR(CopyExperts(moves));
  EM_RETURN_IF_ERROR(DropExperts(drops));
  for (const DomainMap& domain : map.domains)
    if (placement.RankOf(DeviceId(domain.domain.value)) < 0) EM_RETURN_IF_ERROR(CloseDomain(domain.domain));
  return {};
}

}  // namespace elasticmoe::runtime
