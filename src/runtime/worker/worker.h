// A worker process: one device's shell. It is told over a control channel what to attach to, and runs the
// steps that the exchange announces. It owns nothing that would be missed.
//
//   standby ──attach──► attached ──prepare──► runs steps ◄─► sleeps on the step word
//
// Control messages (coordinator → worker, each answered in order):
//   {"op":"attach","device":d,"cpus":[...]}  + MemoryMap and its domain's descriptor   -> {"ns":...}
//   {"op":"prepare","epoch":e}               + MemoryMap                               -> {"ns":...}
//   {"op":"set_kv","kv_chunks":[...]}                                                  -> {}
//   {"op":"ping"}                                                                      -> {"pid":...}
// The channel's end is the worker's end.
#pragma once

#include <string>

#include "core/weight_format.h"
#include "runtime/worker/expert_table.h"

namespace elasticmoe::runtime {

struct WorkerOptions {
  std::string kernels;  // name of the table, the same in all workers of an instance
  core::WeightFormat weights = core::WeightFormat::kBf16;
  ExpertTableKind expert_table = ExpertTableKind::kPointer;
  int control_fd = -1;
  int exchange_fd = -1;
};

// The first message on the control channel is the model's config.json: a worker needs no file, so it starts
// also where the checkpoint has been deleted. Runs until the control channel ends; returns the process's exit
// code.
int RunWorker(const WorkerOptions& options);

}  // namespace elasticmoe::runtime
