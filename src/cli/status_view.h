// A server's state on one screen, from its own pages; what a page does not say is left out. Pure.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "base/ids.h"
#include "base/json.h"
#include "cli/client.h"
#include "cli/prometheus_text.h"

namespace elasticmoe::cli {

struct ServerState {
  std::string url;
  TimeNs at_ns = 0;    // when it was read
  std::string health;  // "ok", or what is wrong
  std::string version;
  std::vector<ModelInfo> models;
  std::vector<MetricSample> metrics;
  Json cluster;    // of GET /v1/cluster, null where the server has none
  Json autoscale;  // of GET /v1/autoscale, likewise
};

// `before`: an earlier state of the same server, for rates; lines end in '\n'.
std::string RenderStatus(const ServerState& state, const std::optional<ServerState>& before);

// {"url", "health", "version", "models", "metrics": {name: sum}, "cluster", "autoscale"}
Json StatusJson(const ServerState& state);

// 1536 -> "1.5 KiB".
std::string HumanBytes(double bytes);

}  // namespace elasticmoe::cli
