// How a large output is written. A line that is stored past the caches need not be read first, but then whoever reads
// the output next has to fetch it from memory. And one that has no memory yet gets it in pages of 2 MiB where the
// system lets a program ask for them: 16x256x56x56 float32, whose output is mapped anew for every call, takes 0.3 to
// 0.5 of the time so (EPYC 7003).
#pragma once

#include <cstdint>
#include <initializer_list>

namespace fastbn::cpu {

// Asks for large pages for those of an op's outputs, each of `bytes` or null, that have yet to get memory. Returns
// whether the op, which touches so many bytes, should store them past the caches: not where it touches less than pays,
// nor where the operating system has yet to clear their pages, which brings lines into the caches.
bool prepare_outputs(std::initializer_list<void*> outputs, int64_t bytes, int64_t touched_bytes,
                     int64_t least_touched_bytes);

}  // namespace fastbn::cpu
