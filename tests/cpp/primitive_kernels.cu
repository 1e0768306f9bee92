// Small kernels for each device primitive, with their launchers. Those named broken_* are wrong on purpose, for the
// emulator to find. nvcc compiles them too, to check that both headers offer the same primitives.
#include <cstdint>

#include "cuda/device/device.cuh"
#include "cuda/device/runtime.h"
#include "ring_kernel.cuh"

namespace fastbn::test {

using namespace fastbn::device;

struct Pair {
  double sum;
  int64_t count;
};

template <class T>
FASTBN_DEVICE T warp_sum(T value) {
  FASTBN_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// Sums each block's part of `in` into out[block], by a tree in shared memory.
template <bool kBarrier>
FASTBN_GLOBAL void block_sum_kernel(const float* in, float* out) {
  float* partial = shared_memory<float>();
  const int t = thread_index();
  partial[t] = in[block_x() * block_threads() + t];
  for (int half = block_threads() / 2; half > 0; half /= 2) {
    if (kBarrier || half != 16) sync_block();
    if (t < half) partial[t] += partial[t + half];
  }
  sync_block();
  if (t == 0) out[block_x()] = partial[0];
}

// Sums across the warps of a block with one barrier and two rounds of shuffles, and counts with a ballot.
FASTBN_GLOBAL void FASTBN_LAUNCH_BOUNDS(256) warp_sum_kernel(const float* in, float* sums, int64_t* counts) {
  Pair* partial = shared_memory<Pair>();
  const int t = thread_index();
  const float value = in[block_x() * block_threads() + t];
  const uint32_t positive = ballot(value > 0);
  Pair pair{warp_sum(static_cast<double>(value)), 0};
  for (uint32_t bits = positive; bits != 0; bits &= bits - 1) ++pair.count;
  if (t % kWarp == 0) partial[t / kWarp] = pair;
  sync_block();
  if (t >= kWarp) return;
  Pair total = t < block_threads() / kWarp ? partial[t] : Pair{0, 0};
  for (int mask = 16; mask > 0; mask /= 2) {
    const Pair other = shuffle_xor(total, mask);
    total.sum += other.sum;
    total.count += other.count;
  }
  if (t == 0) {
    sums[block_x()] = static_cast<float>(total.sum);
    counts[block_x()] = total.count;
  }
}

// Subtracts the sum of all elements from each, in one cooperative launch. `partial` has one element per block.
FASTBN_GLOBAL void grid_sum_kernel(const float* in, float* partial, float* out) {
  const int t = thread_index();
  const int64_t i = block_x() * block_threads() + t;
  const float sum = warp_sum(in[i]);
  if (t == 0) partial[block_x()] = sum;
  sync_grid();
  float total = 0;
  for (int64_t block = 0; block < grid_x(); ++block) total += partial[block];
  out[i] = in[i] - total;
}

// Reverses each block's part through shared memory, 16 bytes per thread. The barrier follows the part.
template <bool kWait>
FASTBN_GLOBAL void copy_kernel(const float* in, float* out) {
  float* tile = shared_memory<float>();
  const int t = thread_index();
  const int threads = block_threads();
  const int64_t base = block_x() * threads * 4;
  Mbarrier* barrier = reinterpret_cast<Mbarrier*>(tile + 4 * threads);
  if (t == 0) init_mbarrier(barrier, threads);
  sync_block();
  copy_async16(tile + 4 * t, in + base + 4 * t);
  if (kWait) {
    arrive_after_copies(barrier);
    wait(barrier, 0);
  }
  sync_block();
  const Vector16<float> from = load16(tile + 4 * (threads - 1 - t));
  const Vector16<float> global = load16(in + base + 4 * (threads - 1 - t));
  Vector16<float> reversed;
  FASTBN_UNROLL
  for (int i = 0; i < Vector16<float>::size; ++i)
    reversed.element[i] = (from.element[3 - i] + global.element[3 - i]) / 2;
  store16(out + base + 4 * t, reversed);
}

// Sends `count` messages through one place, from block 0 to block 1, which counts into seen[0] those that it found
// torn. A half must never go back, and the sender must see its own: seen[1] counts what is wrong.
FASTBN_GLOBAL void message_order_kernel(uint32_t count, Message16* message, uint32_t* seen) {
  if (thread_index() != 0) return;
  if (block_x() == 0) {
    for (uint32_t i = 1; i <= count; ++i) {
      store_message(message, {{i, i, i, i}});
      const Message16 own = load_message(message);
      if (own.word[0] != i || own.word[3] != i) ++seen[1];
      for (uint32_t idle = 0; idle < count; ++idle) pause();
    }
    return;
  }
  for (Message16 last = {{0, 0, 0, 0}}; last.word[0] != count || last.word[2] != count;) {
    const Message16 message_now = load_message(message);
    if (message_now.word[0] != message_now.word[2]) ++seen[0];
    for (int i = 0; i < 4; i += 2) {
      if (message_now.word[i] != message_now.word[i + 1] || message_now.word[i] < last.word[i]) ++seen[1];
    }
    last = message_now;
    pause();
  }
}

// Copies into shared memory that a plain arrival must not wait for: out[0] becomes 1 if they were not there yet.
FASTBN_GLOBAL void late_copies_kernel(const float* in, float* out) {
  Mbarrier* barriers = shared_memory<Mbarrier>();
  float* tile = shared_memory<float>() + 4;
  if (thread_index() == 0) {
    init_mbarrier(barriers, 1);
    init_mbarrier(barriers + 1, 1);
  }
  sync_block();
  if (thread_index() == 0) {
    copy_async16(tile, in);
    arrive_after_copies(barriers + 1);
    arrive(barriers);
    wait(barriers + 1, 0);
    out[1] = tile[0];
  } else if (thread_index() == kWarp) {
    wait(barriers, 0);
    if (tile[0] != in[0]) out[0] = 1;
  }
}

// Logs which warp of the grid takes each step: log[..] is its number. Only the emulator runs one thread at a time.
FASTBN_GLOBAL void log_kernel(int steps, uint32_t* count, int* log) {
  const int64_t warp = (block_x() * block_threads() + thread_index()) / kWarp;
  for (int i = 0; i < steps; ++i) {
    sync_warp();
    if (thread_index() % kWarp == 0) log[(*count)++] = static_cast<int>(warp);
  }
}

template <bool kWaits>
FASTBN_GLOBAL void overlapping_kernel(const float* in, float* out) {
  allow_next_launch();
  if (kWaits || block_x() == 0) wait_for_previous_launch();
  const int64_t i = block_x() * block_threads() + thread_index();
  out[i] = in[i];
}

FASTBN_GLOBAL void broken_poll_kernel(Message16* message) {
  if (thread_index() == 0) return;
  while (load_message(message).word[1] != 1) pause();
}

enum class Misuse { no_arrivals, many_arrivals, parity, unaligned, outside, unseen_phase, message };

FASTBN_GLOBAL void broken_mbarrier_kernel(Misuse misuse, Message16* message) {
  Mbarrier* barrier = shared_memory<Mbarrier>();
  unsigned char* bytes = shared_memory<unsigned char>();
  switch (misuse) {
    case Misuse::no_arrivals: init_mbarrier(barrier, 0); return;
    case Misuse::many_arrivals: init_mbarrier(barrier, kMaxArrivals + 1); return;
    case Misuse::parity:
      init_mbarrier(barrier, 1);
      wait(barrier, 2);
      return;
    case Misuse::unaligned: init_mbarrier(reinterpret_cast<Mbarrier*>(bytes + 4), 1); return;
    case Misuse::outside: init_mbarrier(barrier + 1, 1); return;
    case Misuse::unseen_phase:
      init_mbarrier(barrier, 1);
      arrive(barrier);
      arrive(barrier);
      return;
    case Misuse::message: store_message(reinterpret_cast<Message16*>(&message->word[1]), {{0, 0, 0, 0}}); return;
  }
}

FASTBN_GLOBAL void broken_arrival_kernel(const float* in) {
  Mbarrier* barrier = shared_memory<Mbarrier>();
  init_mbarrier(barrier, 1);
  copy_async16(shared_memory<float>() + 4, in);
  arrive_after_copies(barrier);
}

FASTBN_GLOBAL void broken_sync_warp_kernel() {
  if (thread_index() < 16) {
    sync_warp();
  } else {
    ballot(true);
  }
}

FASTBN_GLOBAL void broken_write_kernel(float* out) {
  float* partial = shared_memory<float>();
  if (thread_index() != 5) partial[thread_index()] = 1;
  sync_block();
  out[thread_index()] = partial[thread_index()];
}

FASTBN_GLOBAL void broken_barrier_kernel() {
  if (thread_index() == 7) return;
  sync_block();
}

FASTBN_GLOBAL void broken_shuffle_kernel(float* out) {
  float value = 1;
  if (thread_index() < 16) {
    value += shuffle_xor(value, 1);
  } else {
    value += shuffle_xor(value, 2);
  }
  out[thread_index()] = value;
}

FASTBN_GLOBAL void broken_warp_kernel(float* out) {
  if (thread_index() % kWarp >= 16) return;
  out[thread_index()] = shuffle_xor(1.0f, 1);
}

FASTBN_GLOBAL void broken_overrun_kernel() { shared_memory<float>()[block_threads()] = 0; }

inline cudaError_t block_sum(bool barrier, int64_t blocks, int threads, const float* in, float* out, cudaStream_t s) {
  const Launch shape{.grid_x = blocks, .threads = threads, .shared_bytes = threads * int64_t(sizeof(float))};
  return launch(barrier ? block_sum_kernel<true> : block_sum_kernel<false>, shape, s, in, out);
}

inline cudaError_t warp_sums(int64_t blocks, const float* in, float* sums, int64_t* counts, cudaStream_t s) {
  return launch(warp_sum_kernel, {.grid_x = blocks, .shared_bytes = 8 * sizeof(Pair)}, s, in, sums, counts);
}

inline cudaError_t grid_sum(int64_t blocks, const float* in, float* partial, float* out, cudaStream_t s) {
  return launch(grid_sum_kernel, {.grid_x = blocks, .threads = 32, .cooperative = true}, s, in, partial, out);
}

inline cudaError_t reverse(bool wait, int64_t blocks, int threads, const float* in, float* out, cudaStream_t s) {
  const Launch shape{.grid_x = blocks, .threads = threads, .shared_bytes = threads * int64_t{16} + 8};
  return launch(wait ? copy_kernel<true> : copy_kernel<false>, shape, s, in, out);
}

}  // namespace fastbn::test
