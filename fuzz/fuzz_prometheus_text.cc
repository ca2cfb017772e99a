// A metrics page as bytes from anybody.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "cli/prometheus_text.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace elasticmoe::cli;
  if (const auto samples = ParsePrometheusText({reinterpret_cast<const char*>(data), size}))
    (void)SumOf(*samples, "a");
  return 0;
}
