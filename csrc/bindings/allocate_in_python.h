// The one call from the library into Python, which it does not link.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace fastbn {

// Repeats in Python an allocation that has failed, where torch raises its own exception. Returns the text of that, or
// an empty string if the allocation now succeeds. Null until the module of Python sets it (csrc/python/allocate.h).
using AllocateInPython = std::string (*)(const int64_t* sizes, int64_t dim, const char* dtype,
                                         const std::string& device);
extern std::atomic<AllocateInPython> allocate_in_python;

}  // namespace fastbn
