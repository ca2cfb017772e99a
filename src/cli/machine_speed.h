// How fast this machine's memory is, measured now. Effects: memory, the clock.
#pragma once

#include "base/error.h"

namespace elasticmoe::cli {

// Bytes a second of a copy of weights into fresh memory: backed and copied in pieces as the HMM does it, by
// one thread. Best of a few.
Expected<double> CopyBandwidth();
// Bytes a second that one thread reads. Best of a few.
Expected<double> ReadBandwidth();

}  // namespace elasticmoe::cli
