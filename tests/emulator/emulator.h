// Runs kernels on a CPU: every thread is a fibre, and where a thread waits, a seeded generator chooses the one that
// runs next, or a copy or half of a message to arrive. Often it starves some warps. Blocks run one at a time in
// random order, or all at once if the launch is cooperative.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>

#include "cuda/device/runtime.h"
#include "cuda/device/types.h"

namespace fastbn::emulator {

// Restarts the schedule from a seed (0 at first). The same launches after the same seed run in the same order.
void set_seed(uint64_t seed);

// Returns how many launches ran, including those that failed, but not those that were refused.
int64_t launches();

// Returns how many of them overlap the launch before.
int64_t overlapping_launches();

// Calls `observe` whenever a thread of a launch has stopped, at a primitive that waits or at its end. Empty: never.
void set_observer(std::function<void()> observe);

// Returns why the latest launch failed with cudaErrorLaunchFailure, which is also printed to stderr. Valid until the
// next launch.
const char* last_failure();

// The rest serves the device primitives.

using Location = std::source_location;

enum class Exchange { shuffle_xor, ballot, sync };

// Waits for the warp, then receives the `bytes` bytes that another lane sends, or the word of a ballot.
void exchange(Exchange kind, int argument, const void* send, void* receive, size_t bytes, const Location& where);

unsigned char* shared_memory();

[[noreturn]] void fail(const char* what, const Location& where);

// Fails at an address that is not a multiple of 16, as a GPU does when it moves 16 bytes.
inline void require_aligned(const void* address, const Location& where) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) fail("16-byte access at an unaligned address", where);
}

cudaError_t run(const device::Launch& shape, void (*body)(void*), void* argument);

}  // namespace fastbn::emulator

extern "C" void fastbn_emulator_set_seed(uint64_t seed);
