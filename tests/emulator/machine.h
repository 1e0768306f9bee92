// The emulator's state while a launch runs: who waits where, and what has yet to happen. Shared by the launch
// (emulator.cpp), its schedule (schedule.cpp) and the primitives that a running thread calls (primitives.cpp,
// asynchronous.cpp).
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "context.h"
#include "emulator.h"

namespace fastbn::emulator {

enum class State { ready, in_shuffle, in_sync_block, in_sync_grid, in_wait, polling, returned };

struct Block;
struct Warp;

struct Copy {
  void* to;
  const void* from;
  Location where;
};

// An arrive_after_copies that is still to come: it follows the first `copies` copies of its thread.
struct Arrival {
  device::Mbarrier* barrier;
  int64_t copies;
  Location where;
};

struct Fibre {
  Context context;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int index = 0;
  State state = State::ready;
  Location where;
  Exchange kind;
  int argument = 0;
  size_t bytes = 0;
  const void* send = nullptr;
  void* receive = nullptr;
  std::deque<Copy> copies;  // those that have not landed
  std::deque<Arrival> arrivals;
  int64_t landed = 0;
  int stores = 0;  // halves of messages that are not visible yet
};

struct Barrier {
  size_t expected = 0;
  std::vector<Fibre*> waiting;
};

// Half of a message on its way to memory.
struct Store {
  Fibre* from;
  uint64_t value;
};

// Something that happens at a random moment: the next arrival of `fibre`, or the earliest store to `half`.
struct Event {
  Fibre* fibre;
  void* half;
};

// The lanes of a warp that are in a queue, and the warp's position there.
struct Lanes {
  uint32_t mask = 0;
  size_t position = 0;
};

struct Warp {
  Block* block = nullptr;
  int first = 0;  // thread
  bool starved = false;
  Lanes ready, polling;
  Barrier barrier;
};

// Fibres that can run, by their warps: a few hundred warps stay in the cache, and thousands of fibres do not. A starved
// warp hardly runs while one that is not can.
struct Queue {
  Lanes Warp::* lanes;
  std::vector<Warp*> favoured, starved;

  bool empty() const { return favoured.empty() && starved.empty(); }
  size_t size() const { return favoured.size() + starved.size(); }
  std::vector<Warp*>& list_of(const Warp& warp) { return warp.starved ? starved : favoured; }

  void clear() {
    favoured.clear();
    starved.clear();
  }

  void insert(const Fibre& fibre) {
    Lanes& own = fibre.warp->*lanes;
    if (own.mask == 0) {
      std::vector<Warp*>& list = list_of(*fibre.warp);
      own.position = list.size();
      list.push_back(fibre.warp);
    }
    own.mask |= 1u << fibre.index % device::kWarp;
  }

  void erase(const Fibre& fibre) {
    Lanes& own = fibre.warp->*lanes;
    own.mask &= ~(1u << fibre.index % device::kWarp);
    if (own.mask != 0) return;
    std::vector<Warp*>& list = list_of(*fibre.warp);
    list[own.position] = list.back();
    (list[own.position]->*lanes).position = own.position;
    list.pop_back();
  }
};

struct Block {
  int64_t x = 0;
  int running = 0;
  bool waited_for_previous = false;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Fibre*> fibres;
  // Exactly the bytes that the launch asks for, so that AddressSanitizer sees an overrun.
  std::unique_ptr<unsigned char[]> shared;
};

struct Machine {
  std::mutex mutex;
  uint64_t random = 0;
  int64_t launches = 0;
  int64_t overlapping_launches = 0;
  std::function<void()> observe;
  std::string failure;
  bool failed = false;

  Context host;
  std::vector<std::unique_ptr<Fibre>> pool;
  Fibre* current = nullptr;
  Queue ready{&Warp::ready, {}, {}};
  Queue polling{&Warp::polling, {}, {}};
  std::vector<Event> pending;
  std::unordered_map<const void*, std::deque<Store>> stores;  // by their target
  Barrier grid;
  std::unordered_map<const device::Mbarrier*, std::vector<Fibre*>> waiting;

  device::Launch shape;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
};

extern Machine& machine;

// Returns a random number below `bound`, which is less than 2^32.
uint64_t random_below(uint64_t bound);

inline bool one_in(uint64_t count) { return random_below(count) == 0; }

inline void suspend() { switch_context(machine.current->context, machine.host); }

inline void make_ready(Fibre* fibre) {
  fibre->state = State::ready;
  machine.ready.insert(*fibre);
}

// Chooses whom this run starves: nobody, a block, or the same warps of a block or of every block: one warp, all before
// it or all from it on, as a kernel gives warps their roles. Choosing evenly would keep all fibres level; so, the
// others get as far ahead of the starved ones as barriers allow.
void choose_starved(std::vector<std::unique_ptr<Block>>& blocks);

// Runs fibres until none can go on: all have returned, or wait, or poll for what will never come.
void run_fibres();

// Makes the halves of all messages visible, as a barrier of the grid does.
void make_stores_visible();

// Makes the event happen, and returns whether anything did.
bool happen(const Event& event);

// Fails if the block, whose threads have all returned, left something undone.
void check_returned(const Block& block);

void record_failure(std::string what);
std::string describe(const Location& where);
std::string describe(const Block& block);
std::string describe(const char* what, const Fibre& fibre, const Location& where);

}  // namespace fastbn::emulator
