// The device primitives, which suspend the fibre of a running thread where a thread of a GPU would wait. Those whose
// effect comes later are in asynchronous.cpp.
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
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || strcmp(a.file_name(), b.file_name()) == 0);
}

}  // namespace

void fail(const char* what, const Location& where) {
  record_failure(describe(what, *machine.current, where));
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
  Barrier& warp = self->warp->barrier;
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

void pause(const Location& where) {
  Fibre* self = machine.current;
  self->state = State::polling;
  self->where = where;
  machine.polling.insert(*self);
  suspend();
}

void sync_warp(const Location& where) {
  const uint32_t nothing = 0;
  exchange(Exchange::sync, 0, &nothing, nullptr, sizeof(nothing), where);
}

void allow_next_launch() {}
void wait_for_previous_launch() { machine.current->block->waited_for_previous = true; }

}  // namespace fastbn::device
