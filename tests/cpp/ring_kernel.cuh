// The streaming kernels in small: a producer warp, consumer warps and a finisher warp around a ring of chunks in shared
// memory. It subtracts from every number the sum of its tile, which a group of blocks shares, and sums `ahead` tiles
// more before it writes one. Each Fault plants one, for the emulator to find.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/device/device.cuh"

namespace fastbn::test {

using namespace fastbn::device;

enum class Fault {
  none,
  missing_arrival,        // a consumer warp does not give back one slot
  extra_arrival,          // a consumer warp gives back every slot twice
  early_arrival,          // a lane gives back its warp's slot before the others have read it
  early_signal,           // the finisher arrives before it has stored the total
  wrong_phase,            // the consumers wait for the phase before
  early_refill,           // the producer does not wait for empty slots
  copies_not_awaited,     // the producer arrives when it has begun its copies
  barrier_uninitialized,  // one barrier is left out
  barriers_unsynced,      // nobody waits until the barriers are initialized
  no_flag,                // messages are read whether or not they have come
  one_flag,               // messages are taken for whole when their first half has come
};

// A tile has `chunks` chunks per block, and blocks form groups of `group`. The last chunk of `ahead` + 1 tiles must fit
// into the ring with all before it: (ahead + 1) * chunks <= slots.
struct RingShape {
  int group, tiles, chunks, ahead, slots;
};

struct TileSums {
  float positive, negative;
};

inline int64_t ring_shared_bytes(const RingShape& shape, int threads) {
  const int64_t consumers = threads - 2 * kWarp, tiles = shape.ahead + 1;
  return shape.slots * (consumers * int64_t{sizeof(Vector16<float>)} + 2 * int64_t{sizeof(Mbarrier)}) +
         tiles *
             (2 * int64_t{sizeof(Mbarrier)} + consumers / kWarp * int64_t{sizeof(TileSums)} + int64_t{sizeof(float)});
}

template <Fault kFault>
struct Ring {
  RingShape shape;
  int consumers;
  float* slots;                 // [slot, consumer, 4]
  Mbarrier *full, *empty;       // [slot]
  Mbarrier *summed, *finished;  // [tile % (ahead + 1)], as are the next two
  TileSums* sums;               // [.., warp]
  float* totals;

  FASTBN_DEVICE explicit Ring(const RingShape& given) : shape(given), consumers(block_threads() - 2 * kWarp) {
    slots = shared_memory<float>();
    full = reinterpret_cast<Mbarrier*>(slots + shape.slots * 4 * consumers);
    empty = full + shape.slots;
    summed = empty + shape.slots;
    finished = summed + tiles_at_once();
    sums = reinterpret_cast<TileSums*>(finished + tiles_at_once());
    totals = reinterpret_cast<float*>(sums + tiles_at_once() * consumers / kWarp);
  }

  FASTBN_DEVICE int tiles_at_once() const { return shape.ahead + 1; }
  FASTBN_DEVICE int lane() const { return thread_index() % kWarp; }

  FASTBN_DEVICE float* slot(int chunk, int vector) const {
    return slots + (chunk % shape.slots * consumers + vector) * 4;
  }

  // Returns the offset in memory of a vector of the block's chunk, counted over all tiles: [tile, block, chunk, ..].
  FASTBN_DEVICE int64_t offset(int chunk, int vector) const {
    const int64_t tile = chunk / shape.chunks;
    return (((tile * grid_x() + block_x()) * shape.chunks + chunk % shape.chunks) * consumers + vector) * 4;
  }

  FASTBN_DEVICE void init() const {
    for (int i = 0; i < shape.slots; ++i) {
      init_mbarrier(full + i, kWarp);
      init_mbarrier(empty + i, consumers / kWarp);
    }
    for (int i = 0; i < tiles_at_once(); ++i) {
      init_mbarrier(summed + i, consumers / kWarp);
      if (kFault != Fault::barrier_uninitialized || i > 0) init_mbarrier(finished + i, 1);
    }
  }

  FASTBN_DEVICE void produce(const float* in) const {
    for (int chunk = 0; chunk < shape.tiles * shape.chunks; ++chunk) {
      const int i = chunk % shape.slots;
      if (kFault != Fault::early_refill) wait(empty + i, chunk / shape.slots % 2 ^ 1);
      for (int v = lane(); v < consumers; v += kWarp) copy_async16(slot(chunk, v), in + offset(chunk, v));
      if (kFault == Fault::copies_not_awaited) {
        arrive(full + i);
      } else {
        arrive_after_copies(full + i);
      }
    }
  }

  FASTBN_DEVICE void sum(int tile, int consumer) const {
    float positive = 0, negative = 0;
    for (int chunk = tile * shape.chunks; chunk < (tile + 1) * shape.chunks; ++chunk) {
      const int parity = chunk / shape.slots % 2;
      wait(full + chunk % shape.slots, kFault == Fault::wrong_phase ? parity ^ 1 : parity);
      const Vector16<float> value = load16(slot(chunk, consumer));
      for (float x : value.element) (x < 0 ? negative : positive) += x;
    }
    for (int mask = 16; mask > 0; mask /= 2) {
      positive += shuffle_xor(positive, mask);
      negative += shuffle_xor(negative, mask);
    }
    const int i = tile % tiles_at_once();
    if (lane() == 0) {
      sums[i * (consumers / kWarp) + consumer / kWarp] = {positive, negative};
      arrive(summed + i);
    }
  }

  FASTBN_DEVICE void write(int tile, int consumer, float* out) const {
    const int i = tile % tiles_at_once();
    wait(finished + i, tile / tiles_at_once() % 2);
    const float total = totals[i];
    for (int chunk = tile * shape.chunks; chunk < (tile + 1) * shape.chunks; ++chunk) {
      if (kFault == Fault::early_arrival && lane() == 0) arrive(empty + chunk % shape.slots);
      Vector16<float> value = load16(slot(chunk, consumer));
      for (float& x : value.element) x -= total;
      store16(out + offset(chunk, consumer), value);
      if (kFault == Fault::early_arrival) continue;
      sync_warp();
      if (kFault == Fault::missing_arrival && chunk == 1 && consumer < kWarp) continue;
      if (lane() == 0) arrive(empty + chunk % shape.slots);
      if (kFault == Fault::extra_arrival && lane() == 0) arrive(empty + chunk % shape.slots);
    }
  }

  FASTBN_DEVICE void consume(int consumer, float* out) const {
    for (int tile = 0; tile < shape.tiles + shape.ahead; ++tile) {
      if (tile < shape.tiles) sum(tile, consumer);
      if (tile >= shape.ahead) write(tile - shape.ahead, consumer, out);
    }
  }

  // Exchanges the sums of each tile with the other blocks of the group. A block sends the message of tile k + 2 after
  // it has those of k + 1, by when everyone has read that of k, so each block needs two: [2, block].
  FASTBN_DEVICE void finish(Message16* messages) const {
    const int64_t first = block_x() / shape.group * shape.group;
    for (int tile = 0; tile < shape.tiles; ++tile) {
      const int i = tile % tiles_at_once();
      wait(summed + i, tile / tiles_at_once() % 2);
      Message16* all = messages + tile % 2 * grid_x();
      const uint32_t flag = static_cast<uint32_t>(tile) + 1;
      if (lane() == 0) {
        TileSums own{0, 0};
        for (int warp = 0; warp < consumers / kWarp; ++warp) {
          own.positive += sums[i * (consumers / kWarp) + warp].positive;
          own.negative += sums[i * (consumers / kWarp) + warp].negative;
        }
        Message16 message{{0, flag, 0, flag}};
        memcpy(&message.word[0], &own.positive, sizeof(float));
        memcpy(&message.word[2], &own.negative, sizeof(float));
        store_message(all + block_x(), message);
      }
      TileSums others{0, 0};
      if (lane() < shape.group) {
        for (;;) {
          const Message16 message = load_message(all + first + lane());
          memcpy(&others.positive, &message.word[0], sizeof(float));
          memcpy(&others.negative, &message.word[2], sizeof(float));
          if (kFault == Fault::no_flag) break;
          if (message.word[1] == flag && (kFault == Fault::one_flag || message.word[3] == flag)) break;
          pause();
        }
      }
      float total = others.positive + others.negative;
      for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
      if (lane() == 0) {
        if (kFault == Fault::early_signal) arrive(finished + i);
        totals[i] = total;
        if (kFault != Fault::early_signal) arrive(finished + i);
      }
    }
  }
};

// `messages` is [2, block], of zeros.
template <Fault kFault>
FASTBN_GLOBAL void FASTBN_LAUNCH_BOUNDS(640)
    ring_kernel(RingShape shape, const float* in, Message16* messages, float* out) {
  const Ring<kFault> ring(shape);
  const int t = thread_index();
  if (t == 0) ring.init();
  if (kFault != Fault::barriers_unsynced) sync_block();
  if (t < kWarp) {
    ring.produce(in);
  } else if (t < kWarp + ring.consumers) {
    ring.consume(t - kWarp, out);
  } else {
    ring.finish(messages);
  }
}

template <Fault... kFaults>
struct Faults {};

using AllFaults = Faults<Fault::none, Fault::missing_arrival, Fault::extra_arrival, Fault::early_arrival,
                         Fault::early_signal, Fault::wrong_phase, Fault::early_refill, Fault::copies_not_awaited,
                         Fault::barrier_uninitialized, Fault::barriers_unsynced, Fault::no_flag, Fault::one_flag>;

template <Fault... kFaults>
cudaError_t run_ring(Faults<kFaults...>, Fault fault, const RingShape& shape, int64_t groups, int threads,
                     const float* in, Message16* messages, float* out, cudaStream_t s) {
  constexpr decltype(&ring_kernel<Fault::none>) kernels[] = {ring_kernel<kFaults>...};
  const Launch launched{.grid_x = groups * shape.group,
                        .threads = threads,
                        .shared_bytes = ring_shared_bytes(shape, threads),
                        .cooperative = true};
  return launch(kernels[static_cast<int>(fault)], launched, s, shape, in, messages, out);
}

inline cudaError_t run_ring(Fault fault, const RingShape& shape, int64_t groups, int threads, const float* in,
                            Message16* messages, float* out, cudaStream_t s) {
  return run_ring(AllFaults{}, fault, shape, groups, threads, in, messages, out, s);
}

}  // namespace fastbn::test
