// The emulator's mbarriers, copies, messages and starved warps, alone and in a ring of warps with roles: right under
// every seed, and every fault planted in it is found.
#include <chrono>
#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "emulator.h"
#include "primitive_kernels.cu"
#include "seeds.h"

using namespace fastbn;
using namespace fastbn::test;
using device::Launch;
using device::Message16;

namespace {

constexpr int64_t kGroups = 2;
constexpr int kThreads = 4 * device::kWarp;

// Runs the ring over numbers whose sums are exact.
class RingCase {
 public:
  explicit RingCase(const RingShape& shape, int threads = kThreads)
      : shape_(shape),
        threads_(threads),
        per_block_(shape.chunks * int64_t{threads - 2 * device::kWarp} * 4),
        in_(numbers(shape.tiles * kGroups * shape.group * per_block_)),
        out_(in_.size()),
        messages_(2 * kGroups * shape.group) {}

  cudaError_t run(Fault fault) {
    out_.assign(out_.size(), kNaN);
    messages_.assign(messages_.size(), Message16{});
    return run_ring(fault, shape_, kGroups, threads_, in_.data(), messages_.data(), out_.data(), nullptr);
  }

  bool is_right() const {
    const int64_t per_group = shape_.group * per_block_;
    for (int64_t first = 0; first < int64_t(in_.size()); first += per_group) {
      const float total = sum(in_, first, per_group);
      for (int64_t i = first; i < first + per_group; ++i) {
        if (out_[i] != in_[i] - total) return false;
      }
    }
    return true;
  }

 private:
  RingShape shape_;
  int threads_;
  int64_t per_block_;
  std::vector<float> in_, out_;
  std::vector<Message16> messages_;
};

void test_ring() {
  for (const RingShape shape : {RingShape{.group = 3, .tiles = 7, .chunks = 2, .ahead = 1, .slots = 4},
                                RingShape{.group = 1, .tiles = 5, .chunks = 3, .ahead = 0, .slots = 3},
                                RingShape{.group = 2, .tiles = 6, .chunks = 2, .ahead = 2, .slots = 7}}) {
    RingCase ring(shape);
    for (int seed = 0; seed < 4 * kSeeds; ++seed) {
      emulator::set_seed(seed);
      CHECK_EQUAL(ring.run(Fault::none), cudaSuccess);
      CHECK(ring.is_right());
    }
  }
}

void test_short_ring_is_found() {
  RingCase ring({.group = 3, .tiles = 7, .chunks = 2, .ahead = 1, .slots = 3});
  for_each_seed([&] {
    CHECK_EQUAL(ring.run(Fault::none), cudaErrorLaunchFailure);
    CHECK(mentions("deadlock in block") && mentions("at wait (ring_kernel.cuh:"));
  });
}

void test_faults_are_found() {
  const struct {
    const char* name;
    Fault fault;
    const char* text;  // of a failure, empty for any, or null: wrong results
  } cases[] = {
      {"missing_arrival", Fault::missing_arrival, "deadlock"},
      {"extra_arrival", Fault::extra_arrival, "too many arrivals"},
      {"early_arrival", Fault::early_arrival, nullptr},
      {"early_signal", Fault::early_signal, nullptr},
      {"wrong_phase", Fault::wrong_phase, ""},
      {"early_refill", Fault::early_refill, "too many arrivals"},
      {"copies_not_awaited", Fault::copies_not_awaited, "copy that was never waited for"},
      {"barrier_uninitialized", Fault::barrier_uninitialized, "mbarrier that is not initialized"},
      {"barriers_unsynced", Fault::barriers_unsynced, "mbarrier that is not initialized"},
      {"no_flag", Fault::no_flag, nullptr},
      {"one_flag", Fault::one_flag, nullptr},
  };
  RingCase ring({.group = 3, .tiles = 7, .chunks = 2, .ahead = 1, .slots = 4});
  for (const auto& [name, fault, text] : cases) {
    int failed = 0, failed_so = 0, wrong = 0;
    for (int seed = 0; seed < 4 * kSeeds; ++seed) {
      emulator::set_seed(seed);
      if (ring.run(fault) != cudaSuccess) {
        ++failed;
        failed_so += text != nullptr && mentions(text);
      } else {
        wrong += !ring.is_right();
      }
    }
    std::cout << name << ": of " << 4 * kSeeds << " seeds, " << failed << " failed, " << wrong
              << " gave wrong results\n";
    CHECK((text != nullptr ? failed_so : wrong) > 0);
  }
}

void test_messages() {
  bool torn = false;
  for_each_seed([&] {
    Message16 message = {};
    uint32_t seen[2] = {};
    const Launch shape{.grid_x = 2, .threads = 32, .cooperative = true};
    CHECK_EQUAL(device::launch(message_order_kernel, shape, nullptr, 20u, &message, seen), cudaSuccess);
    CHECK_EQUAL(seen[1], 0u);
    CHECK_EQUAL(message.word[3], 20u);
    torn |= seen[0] != 0;
  });
  CHECK(torn);

  Message16 message = {};
  const Launch one{.threads = 64};
  CHECK_EQUAL(device::launch(broken_poll_kernel, one, nullptr, &message), cudaErrorLaunchFailure);
  CHECK(mentions("deadlock in block 0 of 64 threads") && mentions("63 polling (primitive_kernels.cu:"));
}

void test_late_copies() {
  alignas(16) const float in[4] = {5, 6, 7, 8};
  bool late = false, early = false;
  for_each_seed([&] {
    float out[2] = {};
    const Launch one{.threads = 64, .shared_bytes = 32};
    CHECK_EQUAL(device::launch(late_copies_kernel, one, nullptr, in, out), cudaSuccess);
    CHECK_EQUAL(out[1], 5.0f);
    (out[0] == 1 ? late : early) = true;
  });
  CHECK(late && early);
}

// Returns the warps of two blocks of four that had taken hardly a step when another had taken all of its own.
std::set<int> starved_warps() {
  constexpr int kWarps = 8, kSteps = 50;
  uint32_t count = 0;
  std::vector<int> log(kWarps * kSteps), taken(kWarps);
  const Launch shape{.grid_x = 2, .threads = 4 * device::kWarp, .cooperative = true};
  CHECK_EQUAL(device::launch(log_kernel, shape, nullptr, kSteps, &count, log.data()), cudaSuccess);
  CHECK_EQUAL(count, log.size());
  for (size_t i = 0; ++taken[log[i]] < kSteps; ++i) continue;
  std::set<int> starved;
  for (int warp = 0; warp < kWarps; ++warp) {
    if (taken[warp] <= kSteps / 10) starved.insert(warp);
  }
  return starved;
}

void test_starved_warps() {
  std::set<std::set<int>> seen;
  for (int seed = 0; seed < 512; ++seed) {
    emulator::set_seed(seed);
    seen.insert(starved_warps());
  }
  CHECK(seen.contains({}));
  for (int block = 0; block < 8; block += 4) CHECK(seen.contains({block, block + 1, block + 2, block + 3}));
  for (int warp = 0; warp < 4; ++warp) CHECK(seen.contains({warp, warp + 4}));
  for (int warp = 0; warp < 8; ++warp) CHECK(seen.contains({warp}));
  CHECK(seen.contains({0, 1, 4, 5}) && seen.contains({2, 3, 6, 7}));
}

void test_overlapping_launches() {
  const auto in = numbers(64);
  std::vector<float> out(64);
  const Launch ordinary{.grid_x = 2, .threads = 32};
  const Launch overlapping{.grid_x = 2, .threads = 32, .overlaps_previous = true};
  CHECK_EQUAL(device::launch(overlapping_kernel<true>, overlapping, nullptr, in.data(), out.data()), cudaSuccess);
  CHECK(out == in);
  CHECK_EQUAL(device::launch(overlapping_kernel<false>, ordinary, nullptr, in.data(), out.data()), cudaSuccess);
  CHECK_EQUAL(device::launch(overlapping_kernel<false>, overlapping, nullptr, in.data(), out.data()),
              cudaErrorLaunchFailure);
  CHECK(mentions("no wait_for_previous_launch in block 1"));
}

void test_misuse() {
  const auto try_misuse = [](Misuse misuse, const char* text) {
    Message16 messages[2];
    const Launch one{.threads = 1, .shared_bytes = 12};
    CHECK_EQUAL(device::launch(broken_mbarrier_kernel, one, nullptr, misuse, messages), cudaErrorLaunchFailure);
    CHECK(mentions(text) && mentions("primitive_kernels.cu:"));
  };
  try_misuse(Misuse::no_arrivals, "mbarrier of an impossible number of arrivals");
  try_misuse(Misuse::many_arrivals, "mbarrier of an impossible number of arrivals");
  try_misuse(Misuse::parity, "wait for a parity that is neither 0 nor 1");
  try_misuse(Misuse::unaligned, "mbarrier at an unaligned address");
  try_misuse(Misuse::outside, "mbarrier outside of the block's shared memory");
  try_misuse(Misuse::unseen_phase, "too many arrivals");
  try_misuse(Misuse::message, "16-byte access at an unaligned address");

  alignas(16) const float in[4] = {};
  bool found = false;
  for_each_seed([&] {
    const Launch one{.threads = 1, .shared_bytes = 32};
    if (device::launch(broken_arrival_kernel, one, nullptr, in) == cudaSuccess) return;
    found = true;
    CHECK(mentions("arrival that was never waited for") || mentions("copy that was never waited for"));
  });
  CHECK(found);

  CHECK_EQUAL(device::launch(broken_sync_warp_kernel, {.threads = 32}, nullptr), cudaErrorLaunchFailure);
  CHECK(mentions("lanes of one warp at different warp operations"));
}

void print_speed() {
  RingCase ring({.group = 6, .tiles = 8, .chunks = 4, .ahead = 1, .slots = 9}, 640);
  for (int seed = 0; seed < 4; ++seed) {
    emulator::set_seed(seed);
    const auto start = std::chrono::steady_clock::now();
    CHECK_EQUAL(ring.run(Fault::none), cudaSuccess);
    const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
    CHECK(ring.is_right());
    std::cout << "12 blocks of 640 threads, 8 tiles of 4 chunks: " << time.count() << " ms\n";
  }
}

}  // namespace

int main() {
  test_ring();
  test_short_ring_is_found();
  test_faults_are_found();
  test_messages();
  test_late_copies();
  test_starved_warps();
  test_overlapping_launches();
  test_misuse();
  print_speed();
  return result();
}
