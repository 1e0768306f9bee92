// The device primitives, which suspend the fibre of a running thread where a thread of a GPU would wait.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cuda/device/device.cuh"
#include "machine.h"

namespace fastbn::emulator {
namespace {

using device::kWarp;

void wait_at(Barrier& barrier, State at, const Location& where) {
  Fibre* self = machine.current;
  self->state = at;
  self->where = where;
  barrier.waiting.push_back(self);
  if (barrier.waiting.size() == barrier.expected) {
    for (Fibre* fibre : barrier.waiting) make_ready(fibre);
    barrier.waiting.clear();
  }
  suspend();
}

bool same_call(const Location& a, const Location& b) {
  return a.line() == b.line() && a.column() == b.column() && strcmp(a.file_name(), b.file_name()) == 0;
}

}  // namespace

void fail(const char* what, const Location& where) {
  record_failure(std::string(what) + " in " + describe(*machine.current->block) + ", thread " +
                 std::to_string(machine.current->index) + ", " + describe(where));
  suspend();
  abort();
}

unsigned char* shared_memory() { return machine.current->block->shared.get(); }

unsigned char* cluster_shared(const void* local, int rank, const Location& where) {
  const Block& block = *machine.current->block;
  const auto& blocks = block.cluster->blocks;
  if (rank < 0 || rank >= static_cast<int>(blocks.size())) fail("rank outside of the cluster", where);
  const int64_t offset = static_cast<const unsigned char*>(local) - block.shared.get();
  if (offset < 0 || offset > machine.shape.shared_bytes) fail("address outside of shared memory", where);
  if (blocks[rank]->running == 0) fail("shared memory of a block that has returned", where);
  return blocks[rank]->shared.get() + offset;
}

void exchange(Exchange kind, int argument, const void* send, void* receive, size_t bytes, const Location& where) {
  Fibre* self = machine.current;
  Block& block = *self->block;
  Barrier& warp = block.warps[self->index / kWarp];
  self->kind = kind;
  self->argument = argument;
  self->bytes = bytes;
  self->send = send;
  self->receive = receive;
  if (!warp.waiting.empty()) {
    const Fibre& first = *warp.waiting.front();
    if (!same_call(first.where, where) || first.kind != kind || first.argument != argument || first.bytes != bytes) {
      fail("lanes of one warp at different warp operations", where);
    }
  }
  if (warp.waiting.size() + 1 == kWarp) {
    // Exchange for all lanes at once: one that ran ahead would overwrite what others have yet to receive.
    const int base = self->index / kWarp * kWarp;
    uint32_t votes = 0;
    for (int lane = 0; lane < kWarp; ++lane) {
      const Fibre& to = *block.fibres[base + lane];
      uint32_t vote;
      memcpy(&vote, to.send, sizeof(vote));
      votes |= (vote != 0 ? 1u : 0u) << lane;
      if (kind == Exchange::shuffle_xor) memcpy(to.receive, block.fibres[base + (lane ^ argument)]->send, bytes);
    }
    if (kind == Exchange::ballot) {
      for (int lane = 0; lane < kWarp; ++lane) memcpy(block.fibres[base + lane]->receive, &votes, sizeof(votes));
    }
  }
  wait_at(warp, State::in_shuffle, where);
}

void copy_async_wait(int pending) {
  Fibre* self = machine.current;
  auto arrived = std::stable_partition(self->copies.begin(), self->copies.end(),
                                       [&](const Copy& copy) { return copy.group < self->committed - pending; });
  for (auto copy = self->copies.begin(); copy != arrived; ++copy) memcpy(copy->to, copy->from, 16);
  self->copies.erase(self->copies.begin(), arrived);
}

}  // namespace fastbn::emulator

namespace fastbn::device {

using namespace fastbn::emulator;

int thread_index() { return machine.current->index; }
int block_threads() { return machine.shape.threads; }
int64_t block_x() { return machine.current->block->x; }
int64_t grid_x() { return machine.shape.grid_x; }
int cluster_rank() { return machine.current->block->rank; }

void sync_block(const Location& where) {
  Barrier& barrier = machine.current->block->barrier;
  if (!barrier.waiting.empty() && !same_call(barrier.waiting.front()->where, where)) {
    fail("threads of one block at different calls of sync_block", where);
  }
  wait_at(barrier, State::in_sync_block, where);
}

void sync_cluster(const Location& where) {
  wait_at(machine.current->block->cluster->barrier, State::in_sync_cluster, where);
}

void sync_grid(const Location& where) {
  if (!machine.shape.cooperative) fail("sync_grid in a launch that is not cooperative", where);
  wait_at(machine.grid, State::in_sync_grid, where);
}

// Counts up while the threads of a round arrive, as a GPU does, so that clearing the counter too late is found.
void sync_blocks(uint32_t* arrived, int blocks, int round, const Location& where) {
  if (!machine.shape.cooperative) fail("sync_blocks in a launch that is not cooperative", where);
  const size_t threads = static_cast<size_t>(machine.shape.threads);
  Round& current = machine.rounds[arrived];
  Barrier& barrier = current.barrier;
  if (barrier.waiting.empty()) {
    barrier.expected = static_cast<size_t>(blocks) * threads;
    current.blocks = blocks;
    current.round = round;
  } else if (current.blocks != blocks || current.round != round) {
    fail("different blocks or rounds at one counter of sync_blocks", where);
  }
  const uint32_t before = static_cast<uint32_t>(blocks) * (static_cast<uint32_t>(round) - 1);
  const uint32_t expected = before + static_cast<uint32_t>(barrier.waiting.size() / threads);
  if (*arrived != expected) {
    char what[80];
    snprintf(what, sizeof(what), "sync_blocks expected a counter of %u, got %u", expected, *arrived);
    fail(what, where);
  }
  *arrived = before + static_cast<uint32_t>((barrier.waiting.size() + 1) / threads);
  wait_at(barrier, State::in_sync_blocks, where);
}

void copy_async16(void* shared, const void* global, const Location& where) {
  require_aligned(shared, where);
  require_aligned(global, where);
  // Poison that is not NaN: NaN would make the kernels sum again in float64, by when the copy has arrived.
  memset(shared, 0x4b, 16);
  machine.current->copies.push_back({shared, global, machine.current->committed});
}

namespace {

// An mbarrier in its 8 bytes. Shared memory is filled with ones, which are not the tag.
struct Phase {
  static constexpr uint64_t kTag = 0x5b5b5;
  uint64_t tag : 20, expected : 21, pending : 21, parity : 1;

  static Phase of(const Mbarrier* barrier, const Location& where) {
    const auto* address = reinterpret_cast<const unsigned char*>(barrier);
    const int64_t offset = address - machine.current->block->shared.get();
    if (reinterpret_cast<uintptr_t>(barrier) % sizeof(Mbarrier) != 0) fail("mbarrier at an unaligned address", where);
    if (offset < 0 || offset + int64_t{sizeof(Mbarrier)} > machine.shape.shared_bytes) {
      fail("mbarrier outside of the block's shared memory", where);
    }
    Phase phase;
    memcpy(&phase, barrier, sizeof(phase));
    return phase;
  }

  static Phase of_initialized(const Mbarrier* barrier, const Location& where) {
    const Phase phase = of(barrier, where);
    if (phase.tag != kTag) fail("mbarrier that is not initialized", where);
    return phase;
  }

  void store(Mbarrier* barrier) const { memcpy(barrier, this, sizeof(*this)); }
};
static_assert(sizeof(Phase) == sizeof(Mbarrier));

}  // namespace

void init_mbarrier(Mbarrier* barrier, int arrivals, const Location& where) {
  Phase phase = Phase::of(barrier, where);
  if (arrivals < 1 || arrivals > kMaxArrivals) fail("mbarrier of an impossible number of arrivals", where);
  phase.tag = Phase::kTag;
  phase.expected = phase.pending = static_cast<uint64_t>(arrivals);
  phase.parity = 0;
  phase.store(barrier);
}

void arrive(Mbarrier* barrier, const Location& where) {
  Phase phase = Phase::of_initialized(barrier, where);
  if (--phase.pending == 0) {
    phase.pending = phase.expected;
    phase.parity ^= 1;
    std::vector<Fibre*>& waiting = machine.waiting[barrier];
    for (Fibre* fibre : waiting) make_ready(fibre);
    waiting.clear();
  }
  phase.store(barrier);
}

// A thread that wakes looks again, as on a GPU: the next phase may have completed too.
void wait(Mbarrier* barrier, int parity, const Location& where) {
  if (parity != 0 && parity != 1) fail("wait for a parity that is neither 0 nor 1", where);
  while (Phase::of_initialized(barrier, where).parity == static_cast<uint64_t>(parity)) {
    machine.current->state = State::in_wait;
    machine.current->where = where;
    machine.waiting[barrier].push_back(machine.current);
    suspend();
  }
}

void arrive_after_copies(Mbarrier* barrier, const Location& where) {
  for (const Copy& copy : machine.current->copies) memcpy(copy.to, copy.from, 16);
  machine.current->copies.clear();
  arrive(barrier, where);
}

void store_message(Message16* to, const Message16& message, const Location& where) {
  require_aligned(to, where);
  memcpy(to, &message, sizeof(message));
}

Message16 load_message(const Message16* from, const Location& where) {
  require_aligned(from, where);
  Message16 message;
  memcpy(&message, from, sizeof(message));
  return message;
}

void pause(const Location& where) {
  machine.current->where = where;
  make_ready(machine.current);
  suspend();
}

void sync_warp(const Location& where) {
  const uint32_t nothing = 0;
  exchange(Exchange::none, 0, &nothing, nullptr, sizeof(nothing), where);
}

void allow_next_launch() {}
void wait_for_previous_launch() { machine.current->block->waited_for_previous = true; }

void copy_async_commit() { ++machine.current->committed; }

}  // namespace fastbn::device
