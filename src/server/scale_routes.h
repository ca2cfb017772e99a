// Admin routes of a resize: our own (/v1/scale, /v1/cluster) and vLLM's (/scale_elastic_ep,
// /is_scaling_elastic_ep). Unlike vLLM's server, ours serves on while it scales.
#pragma once

#include "runtime/coordinator/replica_set.h"
#include "server/api_server.h"

namespace elasticmoe::server {

// The set must outlive the server.
//   POST   /v1/scale {"devices":N,"remove":[d..],"strategy":"elastic","operation_id":"..","deadline_s":t} ->
//   202
//                    an operation
//   GET    /v1/scale/{id} -> 200 the operation; DELETE /v1/scale/{id} -> 200 the operation, being taken back
//   POST   /v1/rebalance  -> 202 an operation: hot experts change places, the devices stay
//   GET    /v1/cluster    -> 200 devices, their phases, where experts are, memory
void AddScaleRoutes(ApiServer& server, runtime::ReplicaSet& replicas);

}  // namespace elasticmoe::server
