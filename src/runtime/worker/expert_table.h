// Where a device finds the experts that it owns in an epoch. Two ways behind one interface;
// bench_expert_tables measures them side by side:
//
//   PointerTable  addresses into the one mapping of the domain. A resize maps nothing: page tables are shared
//   by all
//                 epochs, and huge pages stay huge whatever an expert's size. The default.
//   RemapTable    the paper's vpage-remap: the owned experts of a layer lie side by side in a contiguous
//   range of
//                 addresses, so that a grouped kernel could take (base, stride) instead of pointers. Pages of
//                 the domain are mapped there with MAP_FIXED. Each epoch of the ring has ranges of its own,
//                 so no step sees a range that is half mapped; what a range held four epochs ago and holds
//                 again is not mapped anew. An expert whose offset and slot differ modulo 2 MiB is mapped in
//                 4 KiB pages.
//
// Not thread-safe; Prepare may run beside steps of other epochs.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "runtime/vmm.h"

namespace elasticmoe::runtime {

enum class ExpertTableKind { kPointer, kRemap };
std::string_view ToString(ExpertTableKind kind);

// An expert of the epoch: where its weights lie in the domain's memory.
struct OwnedExpert {
  int layer = 0;
  int expert = 0;
  std::uint64_t offset = 0;  // bytes; a multiple of 4 KiB
};

struct ExpertTableShape {
  int layers = 0;
  int experts = 0;                 // a layer
  std::uint64_t expert_bytes = 0;  // used of each
  std::uint64_t stride_bytes = 0;  // whole pages of the pool, >= expert_bytes
  int epochs = 0;                  // that are usable at a time
};

class ExpertTable {
 public:
  virtual ~ExpertTable() = default;

  // The weights' addresses, one for each of `owned` (ordered by layer, then expert), with page tables made.
  // They stay until `epochs` later epochs were prepared, or the table ends. kResourceExhausted names the
  // limit; the epochs before are as they were.
  virtual Expected<std::vector<std::byte*>> Prepare(std::uint64_t epoch,
                                                    std::span<const OwnedExpert> owned) = 0;

  virtual std::size_t Mappings() const = 0;  // that it has made, neighbours counted once each
};

// `domain` is the mapping of `domain_fd`; both must outlive the table.
std::unique_ptr<ExpertTable> MakeExpertTable(ExpertTableKind kind, const ExpertTableShape& shape,
                                             const Mapping& domain, int domain_fd);

}  // namespace elasticmoe::runtime
