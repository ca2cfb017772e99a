// Traces of requests as CSV: TIMESTAMP,ContextTokens,GeneratedTokens with a header, as the Azure LLM
// inference traces are. TIMESTAMP is `YYYY-MM-DD hh:mm:ss[.fraction]` (blank or 'T' between, a zone of Z or
// +00:00 is ignored) or seconds as a number. Pure.
#pragma once

#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/ids.h"

namespace elasticmoe::cli {

struct TraceRow {
  TimeNs at_ns = 0;  // after the first request of the trace
  int context_tokens = 0;
  int generated_tokens = 0;
};

// Rows in the order of their time (equal times keep their order). Columns are found by the header's names,
// whatever their order; other columns are ignored. kInvalidArgument names the line.
Expected<std::vector<TraceRow>> ParseTraceCsv(std::string_view text);

}  // namespace elasticmoe::cli
