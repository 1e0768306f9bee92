#include "cpu/output.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastbn::cpu {
namespace {

// Minimum output for which large pages are requested: a smaller one spans at most one aligned large page, and
// allocators keep its memory between calls.
constexpr int64_t large_page = int64_t(2) << 20, min_bytes_for_large_pages = 2 * large_page;

// Returns whether the pages of `output` exist. It checks the middle and the last page: if the allocator extended a
// block or mapped a new one, the last pages are new.
bool has_pages([[maybe_unused]] const void* output, [[maybe_unused]] int64_t bytes) {
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

// Requests large pages for the aligned part of `output`. If the system refuses, pages have the usual size.
void ask_for_large_pages([[maybe_unused]] void* output, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t size = uintptr_t(large_page);
  const uintptr_t begin = (uintptr_t(output) + size - 1) / size * size;
  const uintptr_t end = (uintptr_t(output) + uintptr_t(bytes)) / size * size;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

bool prepare_outputs(std::initializer_list<void*> outputs, int64_t bytes, int64_t touched_bytes,
                     int64_t min_touched_bytes) {
  bool non_temporal = touched_bytes >= min_touched_bytes;
  if (!non_temporal && bytes < min_bytes_for_large_pages) return false;
  for (void* output : outputs) {
    if (!output || has_pages(output, bytes)) continue;
    ask_for_large_pages(output, bytes);
    non_temporal = false;
  }
  return non_temporal;
}

}  // namespace fastbn::cpu
