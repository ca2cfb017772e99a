// The HMM: the memory daemon of a host. It owns one pool of pages a memory domain with the model's weights
// and KV caches in it, and outlives every process that computes. It knows tensors, experts and KV chunks, but
// no request and no step.
//
// Protocol (channel.h; one request, one answer, in order on a connection):
//   {"op":"hello","role":"coordinator"|"worker","device":d}   -> {}
//   {"op":"load","placement":{...}}  -> {}  once, first of all: makes the pools, starts to load in the
//   background; refuses what cannot fit
//   {"op":"status"}            ->
//   {"state":"empty"|"loading"|"ready"|"failed","loaded_bytes","total_bytes","fingerprint","pid"}
//   {"op":"record","placement":{...}} -> {}  the placement that serves now; kept for the coordinator that
//   adopts this HMM after a crash of the one before: {"op":"recorded"} -> {"placement":{...}}
//   {"op":"describe"}          -> MemoryMap, with a descriptor a domain in the order of `domains`
//   {"op":"accounts"}          -> pages by use and device, who is attached, and "standby_bytes", held ready
//   {"op":"set_kv","domain","device","chunks"}         -> {"kv_chunks":[...]}  grow or shrink (from the end)
//   {"op":"open_domain","domain"} / {"op":"close_domain","domain"}       -> {"shared_bytes"}
//   {"op":"shared_bytes"}                                                -> {"shared_bytes"}
//   {"op":"copy_shared","to","offset","bytes"}                           -> {"bytes","ns"}
//   {"op":"copy_experts","from","to","experts":[[l,e],...]}              -> {"bytes","ns","offsets":[...]}
//   {"op":"drop_experts","domain","experts":[[l,e],...]}                 -> {"pages"}
//   {"op":"move_experts","device","experts":[[l,e],...]}                 -> {}  another account, no byte
//   moves
//   {"op":"copy_kv","blocks":[[from,block,to,block],...]}                -> {"bytes","ns"}
//   {"op":"shutdown"}          -> {}, then it ends
// An error answer is {"error":{"code","message"}}; nothing has changed then.
//
// Without any coordinator for `linger_seconds` it ends by itself: nothing is left behind.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "base/error.h"
#include "core/weight_format.h"
#include "runtime/vmm.h"

namespace elasticmoe::runtime {

struct HmmOptions {
  std::string socket;  // abstract name it listens on
  std::filesystem::path model;
  int max_devices = 1;  // the pool has addresses for so many
  bool domain_per_device = false;
  core::WeightFormat weights = core::WeightFormat::kBf16;
  int kv_element_bytes = 2;
  std::size_t kv_memory_bytes = 0;      // a device
  std::size_t kv_room_bytes = 0;        // addresses a device's KV may grow into; 0 = as much as it has
  std::size_t device_memory_bytes = 0;  // 0 = no limit but the machine's
  PageKind pages = PageKind::kTransparentHuge;
  bool standby_memory = false;  // with domain_per_device: the memory of one more domain is held ready
  int linger_seconds = 30;
  int load_threads = 0;  // 0 = one for each core that it may use
  std::string log_level = "info";
};

// Equal for two option sets exactly if one's memory can serve the other's coordinator: covers the options
// that shape the memory, and names, sizes and times of the model's files.
std::string HmmFingerprint(const HmmOptions& options);

// Runs until told to end; returns the process's exit code.
int RunHmm(const HmmOptions& options);

}  // namespace elasticmoe::runtime
