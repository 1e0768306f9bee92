// How a large output is written. A line that is stored past the caches need not be read first, but then whoever reads
// the output next has to fetch it from memory.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace fastbn::cpu {

// Whether an op that touches so many bytes should store its outputs, each of `bytes` or null, past the caches. Not
// where it touches less than pays, nor where the operating system has yet to make their pages, which brings lines into
// the caches.
bool stores_past_caches(std::initializer_list<const void*> outputs, int64_t bytes, int64_t touched_bytes,
                        int64_t least_touched_bytes);

}  // namespace fastbn::cpu
