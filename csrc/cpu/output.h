// How a large output is written. Non-temporal stores skip the read-for-ownership but leave the output out of cache for
// its reader. An output whose pages do not exist yet gets 2 MiB pages where the system supports them: 16x256x56x56
// float32, whose output is mapped for every call, then takes 0.3 to 0.5 of the time (EPYC 7003).
#pragma once

#include <cstdint>
#include <initializer_list>

namespace fastbn::cpu {

// Requests large pages for those of `outputs` that are not backed by memory yet; each has `bytes` bytes or is null.
// Returns whether the op should use non-temporal stores: if it touches at least `min_touched_bytes` of memory, and if
// the pages of all outputs exist. The operating system clears a new page, which brings its lines into the caches
// anyway.
bool prepare_outputs(std::initializer_list<void*> outputs, int64_t bytes, int64_t touched_bytes,
                     int64_t min_touched_bytes);

}  // namespace fastbn::cpu
