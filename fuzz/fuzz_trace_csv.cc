// Traces as bytes from anybody: refused, or rows in order of time.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "cli/trace_csv.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto rows = elasticmoe::cli::ParseTraceCsv({reinterpret_cast<const char*>(data), size});
  if (!rows) return 0;
  elasticmoe::TimeNs before = 0;
  for (const auto& row : *rows) {
    if (row.at_ns < before || row.context_tokens < 0 || row.generated_tokens < 0) std::abort();
    before = row.at_ns;
  }
  return 0;
}
