// Whether an op touches enough for stores past the caches to pay, and whether its outputs' pages exist.
#include "cpu/output.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastbn::cpu {
namespace {

// By two pages: where an allocator grew or took new memory, the last ones are new.
bool has_pages(const void* output, int64_t bytes) {
#if defined(__linux__)
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = uintptr_t(output), end = begin + uintptr_t(bytes);
  for (const uintptr_t address : {begin + (end - begin) / 2, end - 1}) {
    unsigned char resident = 0;
    if (mincore(reinterpret_cast<void*>(address / page * page), page, &resident) != 0 || !(resident & 1)) return false;
  }
#endif
  return true;
}

}  // namespace

bool stores_past_caches(std::initializer_list<const void*> outputs, int64_t bytes, int64_t touched_bytes,
                        int64_t least_touched_bytes) {
  if (touched_bytes < least_touched_bytes) return false;
  for (const void* output : outputs)
    if (output && !has_pages(output, bytes)) return false;
  return true;
}

}  // namespace fastbn::cpu
