// The primitives whose effect comes later, at a random moment of the schedule: copies, the arrivals that follow them,
// and messages; and mbarriers, which wait for it. What has not happened when a block returns has not been waited for.
#include <cstdint>
#include <cstring>
#include <string>

#include "cuda/device/device.cuh"
#include "machine.h"

namespace fastbn::emulator {
namespace {

using device::Mbarrier;
using device::Message16;

// What an Mbarrier holds. Uninitialized shared memory is all ones, which is not the tag.
struct Phase {
  static constexpr uint64_t kTag = 0x5b5b5;
  uint64_t tag : 20, expected : 20, pending : 20, parity : 1;
  uint64_t awaited : 1;  // whether any thread has seen that the phase before this one completed
};
static_assert(sizeof(Phase) == sizeof(Mbarrier) && device::kMaxArrivals < 1 << 20);

Phase load(const Mbarrier* barrier) {
  Phase phase;
  memcpy(&phase, barrier, sizeof(phase));
  return phase;
}

void store(Mbarrier* barrier, const Phase& phase) { memcpy(barrier, &phase, sizeof(phase)); }

void require_in_shared_memory(const Mbarrier* barrier, const Location& where) {
  if (reinterpret_cast<uintptr_t>(barrier) % sizeof(Mbarrier) != 0) fail("mbarrier at an unaligned address", where);
  const int64_t offset = reinterpret_cast<const unsigned char*>(barrier) - shared_memory();
  if (offset < 0 || offset + int64_t{sizeof(Mbarrier)} > machine.shape.shared_bytes) {
    fail("mbarrier outside of the block's shared memory", where);
  }
}

void require_initialized(const Mbarrier* barrier, const Location& where) {
  require_in_shared_memory(barrier, where);
  if (load(barrier).tag != Phase::kTag) fail("mbarrier that is not initialized", where);
}

// Counts an arrival. Returns null, or what is wrong with it.
const char* count_arrival(Mbarrier* barrier) {
  Phase phase = load(barrier);
  if (phase.tag != Phase::kTag) return "mbarrier overwritten before an arrival";
  if (--phase.pending == 0) {
    // Two phases later the parity is the same again, and nobody could tell.
    if (!phase.awaited) return "too many arrivals: two phases of an mbarrier completed and no thread waited in between";
    phase.pending = phase.expected;
    phase.parity ^= 1;
    phase.awaited = 0;
    const auto waiting = machine.waiting.find(barrier);
    if (waiting != machine.waiting.end()) {
      for (Fibre* fibre : waiting->second) make_ready(fibre);
      waiting->second.clear();
    }
  }
  store(barrier, phase);
  return nullptr;
}

void land(Fibre& fibre) {
  const Copy& copy = fibre.copies.front();
  memcpy(copy.to, copy.from, 16);
  fibre.copies.pop_front();
  ++fibre.landed;
}

bool arrive_after_landing(Fibre& fibre) {
  if (fibre.arrivals.empty()) return false;
  const Arrival arrival = fibre.arrivals.front();
  fibre.arrivals.pop_front();
  while (fibre.landed < arrival.copies) land(fibre);
  if (const char* wrong = count_arrival(arrival.barrier)) record_failure(describe(wrong, fibre, arrival.where));
  return true;
}

bool make_visible(void* half) {
  std::deque<Store>& stores = machine.stores[half];
  if (stores.empty()) return false;
  memcpy(half, &stores.front().value, sizeof(stores.front().value));
  --stores.front().from->stores;
  stores.pop_front();
  return true;
}

// Returns the half as the current thread sees it: its own latest store, visible to others or not.
uint64_t load_half(const void* half) {
  if (machine.current->stores != 0) {
    const std::deque<Store>& stores = machine.stores[half];
    for (auto store = stores.rbegin(); store != stores.rend(); ++store) {
      if (store->from == machine.current) return store->value;
    }
  }
  uint64_t value;
  memcpy(&value, half, sizeof(value));
  return value;
}

// Lets others run after a signal, so that what should have come before it comes too late for them.
void yield_at_random() {
  if (!one_in(4)) return;
  make_ready(machine.current);
  suspend();
}

}  // namespace

void make_stores_visible() {
  for (auto& [half, stores] : machine.stores) {
    while (make_visible(const_cast<void*>(half))) {
    }
  }
}

bool happen(const Event& event) {
  return event.half != nullptr ? make_visible(event.half) : arrive_after_landing(*event.fibre);
}

void check_returned(const Block& block) {
  for (const Fibre* fibre : block.fibres) {
    if (!fibre->copies.empty()) {
      return record_failure(describe("copy that was never waited for", *fibre, fibre->copies.front().where));
    }
    if (!fibre->arrivals.empty()) {
      return record_failure(describe("arrival that was never waited for", *fibre, fibre->arrivals.front().where));
    }
  }
  if (machine.shape.overlaps_previous && !block.waited_for_previous) {
    record_failure("no wait_for_previous_launch in " + describe(block));
  }
}

}  // namespace fastbn::emulator

namespace fastbn::device {

using namespace fastbn::emulator;

void copy_async16(void* shared, const void* global, const Location& where) {
  require_aligned(shared, where);
  require_aligned(global, where);
  // Poison that is not NaN: NaN would make the kernels sum again in float64, by when the copy has arrived.
  memset(shared, 0x4b, 16);
  machine.current->copies.push_back({shared, global, where});
}

void init_mbarrier(Mbarrier* barrier, int arrivals, const Location& where) {
  require_in_shared_memory(barrier, where);
  if (arrivals < 1 || arrivals > kMaxArrivals) fail("mbarrier of an impossible number of arrivals", where);
  const auto expected = static_cast<uint64_t>(arrivals);
  store(barrier, {Phase::kTag, expected, expected, 0, 1});
}

void arrive(Mbarrier* barrier, const Location& where) {
  require_initialized(barrier, where);
  if (const char* wrong = count_arrival(barrier)) fail(wrong, where);
  yield_at_random();
}

void arrive_after_copies(Mbarrier* barrier, const Location& where) {
  require_initialized(barrier, where);
  Fibre* self = machine.current;
  self->arrivals.push_back({barrier, self->landed + static_cast<int64_t>(self->copies.size()), where});
  machine.pending.push_back({self, nullptr});
  yield_at_random();
}

// A thread that wakes looks again, as on a GPU: by then the next phase may have completed too.
void wait(Mbarrier* barrier, int parity, const Location& where) {
  if (parity != 0 && parity != 1) fail("wait for a parity that is neither 0 nor 1", where);
  for (;;) {
    require_initialized(barrier, where);
    Phase phase = load(barrier);
    if (phase.parity != static_cast<uint64_t>(parity)) {
      phase.awaited = 1;
      store(barrier, phase);
      return;
    }
    machine.current->state = State::in_wait;
    machine.current->where = where;
    machine.waiting[barrier].push_back(machine.current);
    suspend();
  }
}

void store_message(Message16* to, const Message16& message, const Location& where) {
  require_aligned(to, where);
  uint64_t half[2];
  memcpy(half, &message, sizeof(message));
  for (int i = 0; i < 2; ++i) {
    machine.stores[&to->word[2 * i]].push_back({machine.current, half[i]});
    machine.pending.push_back({nullptr, &to->word[2 * i]});
    ++machine.current->stores;
  }
  yield_at_random();
}

Message16 load_message(const Message16* from, const Location& where) {
  require_aligned(from, where);
  const uint64_t half[2] = {load_half(&from->word[0]), load_half(&from->word[2])};
  Message16 message;
  memcpy(&message, half, sizeof(message));
  return message;
}

}  // namespace fastbn::device
