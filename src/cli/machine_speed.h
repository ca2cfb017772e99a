// How fast this machine's memory is, measured now. Effects: memory, the clock.
#pragma once

#include <cstddef>

#include "base/error.h"

namespace elasticmoe::cli {

// Bytes a second of a copy of weights into fresh memory: backed and copied in pieces as the HMM does it, by
// one thread. Best of a few.
Expected<double> CopyBandwidth();
// Bytes a second of plain copies of `bytes` between two memory objects that are backed already, by that many
// threads at once. Best of a few. kResourceExhausted: the machine has not twice as much to give.
Expected<double> ParallelCopyBandwidth(std::size_t bytes, int threads);

}  // namespace elasticmoe::cli
