// Admin routes of a resize: our own (/v1/scale, /v1/cluster) and vLLM's (/scale_elastic_ep,
// /is_scaling_elastic_ep). Unlike vLLM's server, ours serves on while it scales.
#pragma once

#include "runtime/coordinator/resize_controller.h"
#include "server/api_server.h"

namespace elasticmoe::server {

// Both must outlive the server.
//   POST   /v1/scale {"devices":N,"remove":[d..],"strategy":"elastic","operation_id":"..","deadline_s":t}  ->
//   202 operation GET    /v1/scale/{id} -> 200 operation DELETE /v1/scale/{id} -> 200 operation GET
//   /v1/cluster                                                                                     -> 200
//   devices and their phases
void AddScaleRoutes(ApiServer& server, runtime::ElasticEngine& engine, runtime::ResizeController& controller);

}  // namespace elasticmoe::server
