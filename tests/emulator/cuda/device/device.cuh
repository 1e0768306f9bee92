// Replaces csrc/cuda/device/device.cuh where g++ compiles kernels. An asynchronous copy is made at a random
// moment before the arrival that follows it, and its target holds poison until then; the halves of a message, too,
// become visible at random moments. Where a GPU would hang or be undefined, the launch returns cudaErrorLaunchFailure.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/device/runtime.h"
#include "cuda/device/types.h"
#include "emulator.h"
#include "math/macros.h"
#include "math/types.h"

#define FASTBN_GLOBAL
#define FASTBN_DEVICE FASTBN_INLINE
#define FASTBN_LAUNCH_BOUNDS(...)

namespace fastbn::device {

using emulator::Location;

int thread_index();
int block_threads();
int64_t block_x();
int64_t grid_x();

void sync_warp(const Location& where = Location::current());
void sync_block(const Location& where = Location::current());
void sync_grid(const Location& where = Location::current());

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulator::shared_memory());
}

namespace detail {

template <class T>
T exchange(emulator::Exchange kind, int argument, const T& value, const Location& where) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % 4 == 0 && sizeof(T) <= 32);
  T result;
  emulator::exchange(kind, argument, &value, &result, sizeof(T), where);
  return result;
}

}  // namespace detail

template <class T>
T shuffle_xor(T value, int lane_mask, const Location& where = Location::current()) {
  return detail::exchange(emulator::Exchange::shuffle_xor, lane_mask, value, where);
}

inline uint32_t ballot(bool predicate, const Location& where = Location::current()) {
  return detail::exchange(emulator::Exchange::ballot, 0, static_cast<uint32_t>(predicate), where);
}

template <class T>
Vector16<T> load16(const T* from, const Location& where = Location::current()) {
  emulator::require_aligned(from, where);
  Vector16<T> value;
  memcpy(&value, from, 16);
  return value;
}

template <class T>
void store16(T* to, const Vector16<T>& value, const Location& where = Location::current()) {
  emulator::require_aligned(to, where);
  memcpy(to, &value, 16);
}

template <class A>
A max_or_nan(A a, A b) {
  return a < b ? b : a;
}

template <class T, bool relu>
uint32_t pack_pair(float lower, float upper) {
  if (relu) lower = max_or_nan(lower, 0.0f), upper = max_or_nan(upper, 0.0f);
  return from_acc<T>(lower).bits | uint32_t(from_acc<T>(upper).bits) << 16;
}

template <class T>
T opaque(T value) {
  return value;
}

template <class T>
T* opaque_global(T* pointer) {
  return pointer;
}

void store_message(Message16* to, const Message16& message, const Location& where = Location::current());
Message16 load_message(const Message16* from, const Location& where = Location::current());
void pause(const Location& where = Location::current());

void init_mbarrier(Mbarrier* barrier, int arrivals, const Location& where = Location::current());
void arrive(Mbarrier* barrier, const Location& where = Location::current());
void arrive_after_copies(Mbarrier* barrier, const Location& where = Location::current());
void wait(Mbarrier* barrier, int parity, const Location& where = Location::current());

inline void wait_for_copies() {}  // they land by themselves before the block ends
void allow_next_launch();
void wait_for_previous_launch();

void copy_async16(void* shared, const void* global, const Location& where = Location::current());

template <class... P>
cudaError_t launch(void (*kernel)(P...), Launch shape, cudaStream_t, std::type_identity_t<P>... params) {
  auto body = [&] { kernel(params...); };
  return emulator::run(shape, [](void* argument) { (*static_cast<decltype(body)*>(argument))(); }, &body);
}

}  // namespace fastbn::device
