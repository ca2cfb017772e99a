// The system calls under vmm.h, and a way to let one of them fail: what happens when memory, mappings or
// descriptors run out is tested call by call, not believed. Thread-safe: a fault is its thread's own.
#pragma once

#include <sys/types.h>

#include <cstddef>

namespace elasticmoe::runtime {

// As the system's, errno included.
int CallMemfdCreate(const char* name, unsigned flags);
int CallFtruncate(int fd, off_t bytes);
int CallFallocate(int fd, int mode, off_t offset, off_t bytes);
int CallMadvise(void* address, std::size_t bytes, int advice);
void* CallMmap(void* address, std::size_t bytes, int protection, int flags, int fd, off_t offset);

// While it lives, the call number `nth` (from 0) that this thread makes through the functions above fails
// with `error` and does nothing; all others are made. One at a time on a thread.
class VmmFault {
 public:
  VmmFault(int nth, int error);
  ~VmmFault();
  VmmFault(const VmmFault&) = delete;
  VmmFault& operator=(const VmmFault&) = delete;

  bool hit() const { return calls_ > nth_; }  // the call came, and failed

  // Counts a call. True if it is the one; errno is set then.
  bool Take();

 private:
  int nth_;
  int error_;
  int calls_ = 0;
};

}  // namespace elasticmoe::runtime
