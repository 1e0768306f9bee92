// The launches of emulator.h. One runs at a time, on the host thread that made it; fibres and their stacks are reused
// by the next one.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <mutex>
#include <numeric>
#include <string>
#include <vector>

#include "machine.h"

namespace fastbn::emulator {
namespace {

using device::kWarp;
using device::Launch;

// Estimates: kernels use at most a few kilobytes of stack per thread, and sanitizers several times that.
constexpr size_t kStackBytes = FASTBN_EMULATOR_ASAN ? 256 << 10 : 64 << 10;
constexpr size_t kMaxFibres = 1 << 16;
constexpr const char* kStateNames[] = {
    "ready", "at a warp operation", "at sync_block", "at sync_grid", "at wait", "polling", "returned"};

void fibre_main() {
  after_switch(machine.current->context);
  for (;;) {
    machine.body(machine.argument);
    Fibre* self = machine.current;
    self->state = State::returned;
    if (--self->block->running == 0) check_returned(*self->block);
    suspend();
  }
}

bool grow_pool(size_t count) {
  if (count <= machine.pool.size()) return true;
  const size_t added = count - machine.pool.size();
  void* stacks =
      mmap(nullptr, added * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) return false;
  for (size_t i = 0; i < added; ++i) {
    machine.pool.push_back(std::make_unique<Fibre>());
    // Stacks that start at the same address modulo 64 KB would all fall on the same few cache sets.
    make_context(machine.pool.back()->context, static_cast<unsigned char*>(stacks) + i * kStackBytes, kStackBytes,
                 (machine.pool.size() % 61) * 64, fibre_main);
  }
  return true;
}

// Restarts all fibres: a failure leaves them in the middle of a kernel.
void reset_pool() {
  for (size_t i = 0; i < machine.pool.size(); ++i) {
    Context& context = machine.pool[i]->context;
    auto* stack = static_cast<unsigned char*>(const_cast<void*>(context.stack));
#if FASTBN_EMULATOR_ASAN
    __asan_unpoison_memory_region(stack, kStackBytes);
#endif
    make_context(context, stack, kStackBytes, ((i + 1) % 61) * 64, fibre_main);
  }
}

// Describes where the threads of the first block are that cannot go on.
std::string describe_deadlock(const std::vector<std::unique_ptr<Block>>& blocks) {
  for (const auto& block : blocks) {
    if (block->running == 0) continue;
    std::string text = "deadlock in " + describe(*block) + " of " + std::to_string(machine.shape.threads) + " threads:";
    std::vector<std::pair<std::string, int>> states;
    for (const Fibre* fibre : block->fibres) {
      std::string state = kStateNames[static_cast<int>(fibre->state)];
      if (fibre->state != State::returned) state += " (" + describe(fibre->where) + ")";
      auto found = std::find_if(states.begin(), states.end(), [&](const auto& s) { return s.first == state; });
      if (found == states.end()) {
        states.emplace_back(state, 1);
      } else {
        ++found->second;
      }
    }
    for (size_t i = 0; i < states.size(); ++i) {
      text += (i ? ", " : " ") + std::to_string(states[i].second) + " " + states[i].first;
    }
    const auto returned = std::count_if(blocks.begin(), blocks.end(), [](const auto& b) { return b->running == 0; });
    if (blocks.size() > 1) {
      text += "; " + std::to_string(returned) + " of " + std::to_string(blocks.size()) + " blocks returned";
    }
    return text;
  }
  return "deadlock";
}

// Runs the `count` blocks of those numbers to their end.
bool run_blocks(const int64_t* numbers, size_t count) {
  const Launch& shape = machine.shape;
  const size_t threads = static_cast<size_t>(shape.threads);
  std::vector<std::unique_ptr<Block>> blocks;
  machine.ready.clear();
  machine.polling.clear();
  machine.pending.clear();
  machine.stores.clear();
  machine.grid.waiting.clear();
  machine.waiting.clear();
  machine.grid.expected = count * threads;

  for (size_t i = 0; i < count; ++i) {
    auto block = std::make_unique<Block>();
    block->x = numbers[i];
    block->running = shape.threads;
    block->barrier.expected = threads;
    block->warps.resize((threads + kWarp - 1) / kWarp);
    for (size_t w = 0; w < block->warps.size(); ++w) {
      block->warps[w].block = block.get();
      block->warps[w].first = static_cast<int>(w) * kWarp;
      block->warps[w].barrier.expected = kWarp;
    }
    block->shared.reset(new unsigned char[shape.shared_bytes]);
    memset(block->shared.get(), 0xff, shape.shared_bytes);
    for (size_t t = 0; t < threads; ++t) {
      Fibre* fibre = machine.pool[i * threads + t].get();
      fibre->block = block.get();
      fibre->warp = &block->warps[t / kWarp];
      fibre->index = static_cast<int>(t);
      fibre->copies.clear();
      fibre->arrivals.clear();
      fibre->landed = fibre->stores = 0;
      block->fibres.push_back(fibre);
    }
    blocks.push_back(std::move(block));
  }

  choose_starved(blocks);
  for (const auto& block : blocks) {
    for (Fibre* fibre : block->fibres) make_ready(fibre);
  }
  run_fibres();
  const bool finished = std::all_of(blocks.begin(), blocks.end(), [](const auto& b) { return b->running == 0; });
  if (!finished && !machine.failed) record_failure(describe_deadlock(blocks));
  return !machine.failed;
}

}  // namespace

// Never destroyed: suspended fibres outlive static destructors.
Machine& machine = *new Machine;

std::string describe(const Location& where) {
  const char* name = strrchr(where.file_name(), '/');
  return std::string(name ? name + 1 : where.file_name()) + ":" + std::to_string(where.line());
}

std::string describe(const Block& block) { return "block " + std::to_string(block.x); }

std::string describe(const char* what, const Fibre& fibre, const Location& where) {
  return std::string(what) + " in " + describe(*fibre.block) + ", thread " + std::to_string(fibre.index) + ", " +
         describe(where);
}

void record_failure(std::string what) {
  machine.failed = true;
  machine.failure = std::move(what);
}

void set_seed(uint64_t seed) {
  std::lock_guard lock(machine.mutex);
  machine.random = seed;
}

int64_t launches() {
  std::lock_guard lock(machine.mutex);
  return machine.launches;
}

int64_t overlapping_launches() {
  std::lock_guard lock(machine.mutex);
  return machine.overlapping_launches;
}

void set_observer(std::function<void()> observe) {
  std::lock_guard lock(machine.mutex);
  machine.observe = std::move(observe);
}

const char* last_failure() { return machine.failure.c_str(); }

cudaError_t run(const Launch& shape, void (*body)(void*), void* argument) {
  if (!is_valid(shape)) return cudaErrorInvalidConfiguration;
  int max_shared_bytes = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&max_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  if (error != cudaSuccess || shape.shared_bytes > max_shared_bytes) return cudaErrorInvalidValue;
  std::lock_guard lock(machine.mutex);
  const size_t blocks = static_cast<size_t>(shape.grid_x), at_once = shape.cooperative ? blocks : 1;
  const size_t threads = static_cast<size_t>(shape.threads);
  if (at_once > kMaxFibres / threads) return cudaErrorCooperativeLaunchTooLarge;
  if (!grow_pool(at_once * threads)) return cudaErrorMemoryAllocation;

  ++machine.launches;
  if (shape.overlaps_previous) ++machine.overlapping_launches;
  machine.shape = shape;
  machine.body = body;
  machine.argument = argument;
  machine.failed = false;
  machine.failure.clear();

  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), int64_t{0});
  for (size_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  for (size_t first = 0; first < blocks; first += at_once) {
    if (run_blocks(order.data() + first, at_once)) continue;
    reset_pool();
    fprintf(stderr, "emulator: %s\n", machine.failure.c_str());
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace fastbn::emulator

extern "C" void fastbn_emulator_set_seed(uint64_t seed) { fastbn::emulator::set_seed(seed); }
