// The emulator's state while a launch runs: who waits where. Shared by the scheduler (emulator.cpp) and by the
// primitives that a running thread calls (primitives.cpp).
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "context.h"
#include "emulator.h"

namespace fastbn::emulator {

enum class State { ready, in_shuffle, in_sync_block, in_sync_cluster, in_sync_grid, in_sync_blocks, in_wait, returned };

struct Block;

struct Copy {
  void* to;
  const void* from;
  int group;
};

struct Fibre {
  Context context;
  Block* block = nullptr;
  int index = 0;
  State state = State::ready;
  Location where;
  Exchange kind;
  int argument = 0;
  size_t bytes = 0;
  const void* send = nullptr;
  void* receive = nullptr;
  std::vector<Copy> copies;
  int committed = 0;
};

struct Barrier {
  size_t expected = 0;
  std::vector<Fibre*> waiting;
};

// The arguments of the sync_blocks that fibres wait at.
struct Round {
  Barrier barrier;
  int blocks = 0;
  int round = 0;
};

struct Cluster {
  std::vector<Block*> blocks;
  Barrier barrier;
};

struct Block {
  int64_t x = 0;
  int rank = 0;
  Cluster* cluster = nullptr;
  int running = 0;
  bool waited_for_previous = false;
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<Fibre*> fibres;
  // Exactly the bytes that the launch asks for, so that AddressSanitizer sees an overrun.
  std::unique_ptr<unsigned char[]> shared;
};

struct Machine {
  std::mutex mutex;
  uint64_t random = 0;
  int64_t launches = 0;
  std::function<void()> observe;
  std::string failure;
  bool failed = false;

  Context host;
  std::vector<std::unique_ptr<Fibre>> pool;
  Fibre* current = nullptr;
  std::vector<Fibre*> ready;
  Barrier grid;
  std::map<const uint32_t*, Round> rounds;  // by their counter
  std::unordered_map<const device::Mbarrier*, std::vector<Fibre*>> waiting;

  device::Launch shape;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
};

extern Machine& machine;

inline void suspend() { switch_context(machine.current->context, machine.host); }

inline void make_ready(Fibre* fibre) {
  fibre->state = State::ready;
  machine.ready.push_back(fibre);
}

void record_failure(std::string what);
std::string describe(const Location& where);
std::string describe(const Block& block);

}  // namespace fastbn::emulator
