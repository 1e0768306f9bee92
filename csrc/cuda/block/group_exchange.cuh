// The exchange of sums among the blocks of a group: messages of 16 bytes in global memory that carry two words of data
// and a flag beside each, so that there is no fence, no atomic and no second load. The flag is the number of the
// exchange; the messages are cleared before the first one, since memory of an earlier launch may hold any flag.
#pragma once

#include "cuda/block/reduce.cuh"
#include "cuda/device/device.cuh"
#include "math/sums.h"
#include "plan/stream.h"

namespace fastbn::cuda {

class GroupExchange {
 public:
  // Keeps a reference to the plan, which is a parameter of the kernel.
  FASTBN_DEVICE GroupExchange(const Plan& plan, device::Message16* messages, int group, int split)
      : plan_(plan), split_(split) {
    messages_ = messages + int64_t(group) * message_depth(plan.stream) * plan.channels_per_tile * (plan.splits + 1) * 2;
  }

  // Clears the messages that this block will send. `threads` threads share the work, and the grid must meet before the
  // first exchange.
  FASTBN_DEVICE void clear(int thread, int threads) const {
    const int count = message_depth(plan_.stream) * plan_.channels_per_tile;
    for (int i = thread; i < count; i += threads) {
      const int slot = i / plan_.channels_per_tile, channel = i % plan_.channels_per_tile;
      clear(part(slot, channel, split_));
      if (channel % plan_.splits == split_) clear(total(slot, channel));
    }
  }

  // Replaces the sums of the first `channels` channels of a tile by those over all blocks of the group, bit by bit the
  // same in all of them. `flag` is the number of the exchange, from 1 on, and `slot` that modulo message_depth. Call it
  // in all lanes of a warp; `totals` is in shared memory.
  FASTBN_DEVICE void all_reduce(uint32_t flag, int slot, Sums* totals, int channels, int lane) const {
    for (int channel = lane; channel < channels; channel += device::kWarp) {
      post(part(slot, channel, split_), totals[channel], flag);
    }
    if (channels == 1) {
      const Sums sums = gather(slot, 0, lane, device::kWarp, flag);
      device::sync_warp();  // all lanes have read totals[0]
      if (lane == 0) totals[0] = sums;
    } else {
      // Each channel has an owner that adds up its parts: if every block read every part, they would read more messages
      // than elements.
      int team = device::kWarp, log2_team = 5;
      while (team / 2 >= plan_.splits) team /= 2, --log2_team;
      const int index = lane >> log2_team, lane_of_team = lane & (team - 1);
      const int stride = plan_.splits << (5 - log2_team);  // channels that the warp gathers at a time
      for (int first = split_; first < channels; first += stride) {
        const int channel = first + index * plan_.splits;
        const bool exists = channel < channels;
        const Sums sums = gather(slot, exists ? channel : first, lane_of_team, team, flag);
        if (exists && lane_of_team == 0) post(total(slot, channel), sums, flag);
      }
      FASTBN_KEEP_LOOP
      for (int channel = lane; channel < channels; channel += receive_batch * device::kWarp) {
        Sums sums[receive_batch];
        const int left = (channels - channel + device::kWarp - 1) / device::kWarp;
        const int count = left < receive_batch ? left : receive_batch;
        receive(count, flag, [&](int i) { return total(slot, channel + i * device::kWarp); }, sums);
        FASTBN_UNROLL
        for (int i = 0; i < receive_batch; ++i) {
          if (i < count) totals[channel + i * device::kWarp] = sums[i];
        }
      }
    }
    device::sync_warp();
  }

 private:
  FASTBN_DEVICE device::Message16* part(int slot, int channel, int split) const {
    return messages_ + (int64_t(slot * plan_.channels_per_tile + channel) * (plan_.splits + 1) + split) * 2;
  }
  FASTBN_DEVICE device::Message16* total(int slot, int channel) const { return part(slot, channel, plan_.splits); }

  static FASTBN_DEVICE void clear(device::Message16* message) {
    device::store_message(message, {});
    device::store_message(message + 1, {});
  }

  static FASTBN_DEVICE device::Message16 message_of(double number, uint32_t flag) {
    const uint64_t bits = bit_cast<uint64_t>(number);
    return {{uint32_t(bits), flag, uint32_t(bits >> 32), flag}};
  }
  static FASTBN_DEVICE double number_of(const device::Message16& message) {
    return bit_cast<double>(uint64_t(message.word[2]) << 32 | message.word[0]);
  }

  static FASTBN_DEVICE void post(device::Message16* to, const Sums& sums, uint32_t flag) {
    device::store_message(to, message_of(sums.first, flag));
    device::store_message(to + 1, message_of(sums.second, flag));
  }

  // Waits for `count` pairs of sums, at most `batch`, whose messages are at(i), with all loads under way at a time.
  template <int batch, class At>
  static FASTBN_DEVICE void receive(int count, uint32_t flag, At at, Sums (&sums)[batch]) {
    for (;;) {
      bool complete = true;
      FASTBN_UNROLL
      for (int i = 0; i < batch; ++i) {
        if (i >= count) continue;
        const device::Message16 first = device::load_message(at(i)), second = device::load_message(at(i) + 1);
        complete &= first.word[1] == flag && first.word[3] == flag && second.word[1] == flag && second.word[3] == flag;
        sums[i] = {number_of(first), number_of(second)};
      }
      if (complete) return;
      device::pause();
    }
  }

  // Returns the sum of a channel's parts, in all lanes of a team.
  FASTBN_DEVICE Sums gather(int slot, int channel, int lane, int team, uint32_t flag) const {
    Sums total;
    FASTBN_KEEP_LOOP
    for (int split = lane; split < plan_.splits; split += receive_batch * team) {
      Sums parts[receive_batch];
      const int left = (plan_.splits - split + team - 1) / team, count = left < receive_batch ? left : receive_batch;
      receive(count, flag, [&](int i) { return part(slot, channel, split + i * team); }, parts);
      FASTBN_UNROLL
      for (int i = 0; i < receive_batch; ++i) {
        if (i < count) total.add(parts[i]);
      }
    }
    for (int delta = team / 2; delta > 0; delta /= 2) total.add(device::shuffle_xor(total, delta));
    return total;
  }

  static constexpr int receive_batch = 2;

  const Plan& plan_;
  device::Message16* messages_;
  int split_;
};

}  // namespace fastbn::cuda
