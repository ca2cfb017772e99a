// Admin routes and metrics of the autoscaler.
#pragma once

#include "runtime/coordinator/autoscaler.h"
#include "server/api_server.h"

namespace elasticmoe::server {

// The autoscaler must outlive the server.
//   GET  /v1/autoscale -> 200 policy, limits, who holds the size, the last decisions with reasons and
//   forecasts POST /v1/autoscale {"hold":bool,"observe":bool} -> 200 the same; hold without an end, until
//   "hold":false
void AddAutoscaleRoutes(ApiServer& server, runtime::Autoscaler& autoscaler);

// Where there is none: GET answers {"policy":"off"}.
void AddNoAutoscaleRoutes(ApiServer& server);

}  // namespace elasticmoe::server
