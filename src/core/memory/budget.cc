#include "core/memory/budget.h"

#include <algorithm>

namespace elasticmoe::core {
namespace {

constexpr std::size_t kSmallestPage = 4096;
constexpr std::size_t kLargestPage = std::size_t{2} << 20;
// Chunks this large lose little to rounding and stay few in every table.
constexpr std::size_t kKvChunkBytes = std::size_t{16} << 20;

std::uint32_t PagesFor(std::size_t bytes, std::size_t page) {
  return static_cast<std::uint32_t>((bytes + page - 1) / page);
}

double MiB(std::size_t bytes) {
  return static_cast<double>(bytes) / (1 << 20);
}

}  // namespace

std::size_t ChoosePageBytes(std::size_t expert_bytes) {
  if (expert_bytes == 0) return kLargestPage;  // no expert would waste any
  for (std::size_t page = kLargestPage; page > kSmallestPage; page /= 2) {
    const std::size_t rounded = (expert_bytes + page - 1) / page * page;
    if ((rounded - expert_bytes) * 20 < expert_bytes) return page;
  }
  return kSmallestPage;
}

Expected<MemoryPlan> PlanMemory(const MemoryRequest& request) {
  MemoryPlan plan;
  plan.page_bytes = ChoosePageBytes(request.expert_bytes);
  plan.pages_per_expert = PagesFor(request.expert_bytes, plan.page_bytes);
  plan.shared_pages = PagesFor(request.shared_bytes, plan.page_bytes);
  if (request.kv_memory_bytes < request.kv_block_bytes)
    return Fail(ErrorCode::kInvalidArgument,
                "planning memory: kv-memory={} bytes is below one block of {} bytes; raise --kv-memory",
                request.kv_memory_bytes, request.kv_block_bytes);
  const std::size_t chunk = std::min(kKvChunkBytes, request.kv_memory_bytes);
  plan.blocks_per_chunk =
      static_cast<std::uint32_t>(std::max<std::size_t>(1, chunk / request.kv_block_bytes));
  const std::size_t chunk_bytes = plan.blocks_per_chunk * request.kv_block_bytes;
  plan.kv_chunk_pages = PagesFor(chunk_bytes, plan.page_bytes);
  plan.kv_chunks_per_device = static_cast<std::uint32_t>(request.kv_memory_bytes / chunk_bytes);

  const std::size_t kv = std::size_t{plan.kv_chunks_per_device} * plan.kv_chunk_pages * plan.page_bytes;
  const std::size_t shared = plan.shared_pages * plan.page_bytes;
  const std::size_t expert = plan.pages_per_expert * plan.page_bytes;
  const int devices = std::max(1, request.devices);
  std::size_t largest_share = 0;  // experts of the fullest device
  for (int layer = 0; layer < request.moe_layers; ++layer)
    largest_share += (request.experts + devices - 1) / devices * expert;
  const std::size_t all_experts = std::size_t(request.moe_layers) * request.experts * expert;

  // In one domain the shared weights exist once; they are charged to the devices in equal parts.
  plan.bytes_per_device =
      (request.domain_per_device ? shared : (shared + devices - 1) / devices) + largest_share + kv;
  plan.total_bytes = (request.domain_per_device ? shared * devices : shared) + all_experts + kv * devices;

  if (request.device_memory_bytes != 0 && plan.bytes_per_device > request.device_memory_bytes)
    return Fail(ErrorCode::kResourceExhausted,
                "planning memory: a device needs {:.1f} MiB (non-expert weights {:.1f}, experts {:.1f}, KV "
                "{:.1f}) but "
                "device-memory={:.1f} MiB; use more --devices, raise --device-memory or lower --kv-memory",
                MiB(plan.bytes_per_device), MiB(plan.bytes_per_device - largest_share - kv),
                MiB(largest_share), MiB(kv), MiB(request.device_memory_bytes));
  if (plan.total_bytes > request.available_bytes)
    return Fail(ErrorCode::kResourceExhausted,
                "planning memory: {} device{} need {:.1f} MiB in all (weights {:.1f}, KV {:.1f} each) but "
                "the machine has "
                "{:.1f} MiB available; lower --kv-memory or --devices, or free memory",
                devices, devices == 1 ? "" : "s", MiB(plan.total_bytes), MiB(plan.total_bytes - kv * devices),
                MiB(kv), MiB(request.available_bytes));
  return plan;
}

std::size_t GrowthBytes(const GrowthRequest& request) {
  if (request.joining <= 0) return 0;
  const std::size_t joining = static_cast<std::size_t>(request.joining);
  std::size_t bytes = joining * request.kv_memory_bytes;
  if (request.domain_per_device)
    bytes += joining * (request.shared_bytes +
                        request.all_expert_bytes / static_cast<std::size_t>(std::max(request.devices, 1)));
  return bytes;
}

Status CheckGrowth(const GrowthRequest& request) {
  const std::size_t bytes = GrowthBytes(request);
  if (request.available_bytes == 0 || bytes <= request.available_bytes) return {};
  return Fail(ErrorCode::kResourceExhausted,
              "growing to {} devices needs {:.1f} MiB more (KV {:.1f} each) but the machine has {:.1f} MiB "
              "available; lower --kv-memory or free memory",
              request.devices, MiB(bytes), MiB(request.kv_memory_bytes), MiB(request.available_bytes));
}

}  // namespace elasticmoe::core
