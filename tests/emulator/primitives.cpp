// The device primitives, which suspend the fibre of a running thread where a thread of a GPU would wait. Those whose
// effect comes later are in asynchronous.cpp.
#include <cstdint>
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

void sync_block(const Location& where) {
  Barrier& barrier = machine.current->block->barrier;
  if (!barrier.waiting.empty() && !same_call(barrier.waiting.front()->where, where)) {
    fail("threads of one block at different calls of sync_block", where);
  }
  wait_at(barrier, State::in_sync_block, where);
}

void sync_grid(const Location& where) {
  if (!machine.shape.cooperative) fail("sync_grid in a launch that is not cooperative", where);
  make_stores_visible();
  wait_at(machine.grid, State::in_sync_grid, where);
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
