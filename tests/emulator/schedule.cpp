// The schedule: which fibre runs next, and when what is pending happens. The seed determines it all.
#include <bit>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <memory>
#include <vector>

#include "machine.h"

namespace fastbn::emulator {
namespace {

using device::kWarp;

// Chooses a warp of a queue that is not empty. `fair`: starved warps too have their share.
Warp* choose_warp(const Queue& queue, bool fair) {
  const size_t favoured = queue.favoured.size();
  const size_t next = random_below(queue.size());
  if (next < favoured) return queue.favoured[next];
  if (favoured == 0 || fair || one_in(64)) return queue.starved[next - favoured];
  return queue.favoured[next % favoured];
}

// Takes a lane of the warp out of the queue.
Fibre* take_lane(Queue& queue, const Warp& warp) {
  const int from = static_cast<int>(random_below(kWarp));
  const int lane = (std::countr_zero(std::rotr((warp.*queue.lanes).mask, from)) + from) % kWarp;
  Fibre* fibre = warp.block->fibres[warp.first + lane];
  queue.erase(*fibre);
  return fibre;
}

void happen_at_random() {
  const size_t next = random_below(machine.pending.size());
  const Event event = machine.pending[next];
  machine.pending[next] = machine.pending.back();
  machine.pending.pop_back();
  happen(event);
}

}  // namespace

// splitmix64
uint64_t random_below(uint64_t bound) {
  uint64_t z = (machine.random += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return ((z ^ (z >> 31)) >> 32) * bound >> 32;
}

void choose_starved(std::vector<std::unique_ptr<Block>>& blocks) {
  const int warps = static_cast<int>(blocks.front()->warps.size());
  const Block* block = one_in(2) ? blocks[random_below(blocks.size())].get() : nullptr;
  int first = 0, last = 0;
  if (one_in(2)) {  // warps
    const int warp = static_cast<int>(random_below(warps));
    const uint64_t shape = random_below(3);
    first = shape == 1 ? 0 : warp;
    last = shape == 2 ? warps : warp + 1;
  } else if (block != nullptr) {
    last = warps;
  }
  for (auto& each : blocks) {
    const bool is_chosen = block == nullptr || each.get() == block;
    for (int warp = 0; warp < warps; ++warp) each->warps[warp].starved = is_chosen && first <= warp && warp < last;
  }
}

void run_fibres() {
  // How late copies and messages are: one step in so many makes one happen while fibres are ready, or (0) none does.
  // And how long a warp goes on, which keeps its stacks in the cache: its lanes run in random order all the same.
  constexpr uint64_t kStepsPerEvent[] = {2, 8, 64, 0}, kStepsPerWarp[] = {1, 16, 64};
  const uint64_t steps_per_event = kStepsPerEvent[random_below(std::size(kStepsPerEvent))];
  const uint64_t steps_per_warp = kStepsPerWarp[random_below(std::size(kStepsPerWarp))];
  Queue &ready = machine.ready, &polling = machine.polling;
  const Warp* warp = nullptr;
  uint64_t idle_polls = 0;  // since anything else happened
  while (!machine.failed) {
    const bool favoured = !ready.favoured.empty();
    if (!machine.pending.empty()) {
      idle_polls = 0;
      if ((ready.empty() && polling.empty()) ||
          (favoured ? steps_per_event != 0 && one_in(steps_per_event) : one_in(4))) {
        happen_at_random();
        continue;
      }
    }
    if (!polling.empty() && (ready.empty() || (favoured ? one_in(16) : one_in(2)))) {
      // By the end, every lane that polls has done so many times.
      const uint64_t lanes = polling.size() * kWarp;
      idle_polls = ready.empty() ? idle_polls + 1 : 0;
      if (idle_polls > 64 * lanes) return;
      machine.current = take_lane(polling, *choose_warp(polling, idle_polls > 16 * lanes));
    } else if (!ready.empty()) {
      idle_polls = 0;
      const bool goes_on = warp != nullptr && warp->ready.mask != 0 && !(warp->starved && favoured);
      if (!goes_on || one_in(steps_per_warp)) warp = choose_warp(ready, false);
      machine.current = take_lane(ready, *warp);
    } else {
      return;
    }
    switch_context(machine.host, machine.current->context);
    if (machine.observe) machine.observe();
  }
}

}  // namespace fastbn::emulator
