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

  // Clears the messages that this block will send. Call it in all threads, and sync the grid before the first exchange.
  FASTBN_DEVICE void clear() const {
    const int count = message_depth(plan_.stream) * plan_.channels_per_tile;
    for (int i = device::thread_index(); i < count; i += device::block_threads()) {
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
      for (int channel = lane; channel < channels; channel += device::kWarp) {
        totals[channel] = receive(total(slot, channel), flag);
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

  // Waits for a pair of sums.
  static FASTBN_DEVICE Sums receive(const device::Message16* from, uint32_t flag) {
    for (;;) {
      const device::Message16 first = device::load_message(from), second = device::load_message(from + 1);
      if (first.word[1] == flag && first.word[3] == flag && second.word[1] == flag && second.word[3] == flag) {
        return {number_of(first), number_of(second)};
      }
      device::pause();
    }
  }

  // Returns the sum of a channel's parts, in all lanes of a team.
  FASTBN_DEVICE Sums gather(int slot, int channel, int lane, int team, uint32_t flag) const {
    Sums sums;
    for (int split = lane; split < plan_.splits; split += team) sums.add(receive(part(slot, channel, split), flag));
    for (int delta = team / 2; delta > 0; delta /= 2) sums.add(device::shuffle_xor(sums, delta));
    return sums;
  }

  const Plan& plan_;
  device::Message16* messages_;
  int split_;
};

}  // namespace fastbn::cuda
