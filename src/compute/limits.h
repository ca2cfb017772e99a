// What this machine could do at most, measured: bytes read from memory, and operations of a kernel table's
// dot product. Benchmarks divide by them, in the same run. Effects: time, memory; blocking.
#pragma once

#include <cstddef>

#include "compute/kernels.h"
#include "compute/parallel.h"

namespace elasticmoe::compute {

// Memory to read from: 1 GiB of huge pages (512 MiB where there is not as much free), more than the caches of
// most machines hold; a machine with larger ones is given a limit that is higher than its memory's. Written
// once, which may take longer than reading it ten times.
class ReadProbe {
 public:
  explicit ReadProbe(ThreadPool& threads);
  ~ReadProbe();
  ReadProbe(const ReadProbe&) = delete;
  ReadProbe& operator=(const ReadProbe&) = delete;

  // Bytes a second that all threads together read from it: the best of a few passes, a fifth of a second. 0 =
  // no memory was to be had.
  double BytesPerSecond(ThreadPool& threads) const;

 private:
  void* memory_ = nullptr;
  std::size_t bytes_ = 0;
};

// Operations (a multiplication and an addition are two) a second of all threads together, with
// the instructions that the table's products over weights of that format are made of and operands in
// registers. 0 = a table without such instructions (reference).
double DotPeak(const Kernels& kernels, WeightFormat format, ThreadPool& threads);

}  // namespace elasticmoe::compute
