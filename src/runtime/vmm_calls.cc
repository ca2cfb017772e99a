#include "runtime/vmm_calls.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>

#include "base/check.h"

namespace elasticmoe::runtime {
namespace {

thread_local VmmFault* active_fault = nullptr;

bool Fails() {
  return active_fault != nullptr && active_fault->Take();
}

}  // namespace

VmmFault::VmmFault(int nth, int error) : nth_(nth), error_(error) {
  EM_CHECK(active_fault == nullptr);
  active_fault = this;
}

VmmFault::~VmmFault() {
  active_fault = nullptr;
}

bool VmmFault::Take() {
  if (calls_++ != nth_) return false;
  errno = error_;
  return true;
}

int CallMemfdCreate(const char* name, unsigned flags) {
  return Fails() ? -1 : ::memfd_create(name, flags);
}

int CallFtruncate(int fd, off_t bytes) {
  return Fails() ? -1 : ::ftruncate(fd, bytes);
}

int CallFallocate(int fd, int mode, off_t offset, off_t bytes) {
  return Fails() ? -1 : ::fallocate(fd, mode, offset, bytes);
}

int CallMadvise(void* address, std::size_t bytes, int advice) {
  return Fails() ? -1 : ::madvise(address, bytes, advice);
}

void* CallMmap(void* address, std::size_t bytes, int protection, int flags, int fd, off_t offset) {
  return Fails() ? MAP_FAILED : ::mmap(address, bytes, protection, flags, fd, offset);
}

}  // namespace elasticmoe::runtime
