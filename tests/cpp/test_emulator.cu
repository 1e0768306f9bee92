// The emulator's barriers, warp operations and grouped copies: correct kernels give correct results under every seed,
// and wrong ones are found.
#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "emulator.h"
#include "primitive_kernels.cu"
#include "seeds.h"

using namespace fastbn;
using namespace fastbn::test;
using device::Launch;

namespace {

void test_block_sum() {
  const auto in = numbers(4 * 128);
  for_each_seed([&] {
    std::vector<float> out(4, kNaN);
    CHECK_EQUAL(block_sum(true, 4, 128, in.data(), out.data(), nullptr), cudaSuccess);
    for (int b = 0; b < 4; ++b) CHECK_EQUAL(out[b], sum(in, b * 128, 128));
  });
}

void test_missing_barrier_is_found() {
  const auto in = numbers(128);
  bool found = false;
  for_each_seed([&] {
    std::vector<float> out(1, kNaN);
    CHECK_EQUAL(block_sum(false, 1, 128, in.data(), out.data(), nullptr), cudaSuccess);
    found |= !(out[0] == sum(in, 0, 128));
  });
  CHECK(found);
}

void test_warp_sums() {
  const auto in = numbers(3 * 256);
  for_each_seed([&] {
    std::vector<float> sums(3, kNaN);
    std::vector<int64_t> counts(3, -1);
    CHECK_EQUAL(warp_sums(3, in.data(), sums.data(), counts.data(), nullptr), cudaSuccess);
    for (int b = 0; b < 3; ++b) {
      CHECK_EQUAL(sums[b], sum(in, b * 256, 256));
      const auto* first = in.data() + b * 256;
      CHECK_EQUAL(counts[b], std::count_if(first, first + 256, [](float v) { return v > 0; }));
    }
  });
}

void test_grid_sum() {
  const auto in = numbers(20 * 32);
  for_each_seed([&] {
    std::vector<float> partial(20, kNaN), out(20 * 32, kNaN);
    CHECK_EQUAL(grid_sum(20, in.data(), partial.data(), out.data(), nullptr), cudaSuccess);
    const float total = sum(in, 0, 20 * 32);
    for (int i = 0; i < 20 * 32; ++i) CHECK_EQUAL(out[i], in[i] - total);
  });
  const auto start = Launch{.threads = 32};
  std::vector<float> partial(1), out(32);
  CHECK_EQUAL(device::launch(grid_sum_kernel, start, nullptr, in.data(), partial.data(), out.data()),
              cudaErrorLaunchFailure);
  CHECK(mentions("not cooperative"));
}

void test_copies() {
  alignas(16) static float in[2 * 64 * 4];
  alignas(16) static float out[2 * 64 * 4];
  const auto values = numbers(2 * 64 * 4);
  std::copy(values.begin(), values.end(), in);
  for_each_seed([&] {
    std::fill(std::begin(out), std::end(out), kNaN);
    CHECK_EQUAL(reverse(true, 2, 64, in, out, nullptr), cudaSuccess);
    for (int i = 0; i < 512; ++i) CHECK_EQUAL(out[i], in[i / 256 * 256 + 255 - i % 256]);
  });
  std::fill(std::begin(out), std::end(out), kNaN);
  CHECK_EQUAL(reverse(false, 1, 64, in, out, nullptr), cudaErrorLaunchFailure);
  CHECK(mentions("copy that was never waited for"));
  // Half of the poison of a copy in flight plus half of a number; or NaN where no copy has started.
  const float poison = std::bit_cast<float>(0x4b4b4b4bu);
  CHECK(std::all_of(std::begin(out), std::end(out), [=](float v) { return v > poison / 4 || std::isnan(v); }));
  CHECK_EQUAL(reverse(true, 1, 64, in + 1, out, nullptr), cudaErrorLaunchFailure);
  CHECK(mentions("unaligned"));
}

void test_broken_kernels() {
  std::vector<float> out(64);
  const Launch one{.threads = 64, .shared_bytes = 256};
  CHECK_EQUAL(device::launch(broken_write_kernel, one, nullptr, out.data()), cudaSuccess);
  for (int i = 0; i < 64; ++i) CHECK(std::isnan(out[i]) == (i == 5));

  CHECK_EQUAL(device::launch(broken_barrier_kernel, one, nullptr), cudaErrorLaunchFailure);
  CHECK(mentions("deadlock in block 0 of 64 threads") && mentions("63 at sync_block") && mentions("1 returned"));
  CHECK_EQUAL(device::launch(broken_shuffle_kernel, one, nullptr, out.data()), cudaErrorLaunchFailure);
  CHECK(mentions("lanes of one warp at different warp operations"));
  CHECK_EQUAL(device::launch(broken_warp_kernel, one, nullptr, out.data()), cudaErrorLaunchFailure);
  CHECK(mentions("deadlock") && mentions("at a warp operation"));

  // A failed launch does not affect the next one.
  CHECK_EQUAL(device::launch(broken_write_kernel, one, nullptr, out.data()), cudaSuccess);
  CHECK_EQUAL(std::string(emulator::last_failure()), "");
}

void test_refused_launches() {
  std::vector<float> out(64);
  const auto try_shape = [&](Launch shape) { return device::launch(broken_write_kernel, shape, nullptr, out.data()); };
  const int64_t before = emulator::launches();
  CHECK_EQUAL(try_shape({.grid_x = int64_t{1} << 31, .shared_bytes = 1024}), cudaErrorInvalidConfiguration);
  CHECK_EQUAL(try_shape({.grid_x = 0}), cudaErrorInvalidConfiguration);
  CHECK_EQUAL(try_shape({.threads = 1025}), cudaErrorInvalidConfiguration);
  CHECK_EQUAL(try_shape({.threads = 0}), cudaErrorInvalidConfiguration);
  CHECK_EQUAL(try_shape({.shared_bytes = (227 << 10) + 1}), cudaErrorInvalidValue);
  CHECK_EQUAL(try_shape({.grid_x = 1 << 20, .shared_bytes = 1024, .cooperative = true}),
              cudaErrorCooperativeLaunchTooLarge);
  CHECK_EQUAL(emulator::launches(), before);
}

void test_seed_sets_the_schedule() {
  const auto run = [](uint64_t seed) {
    fastbn_emulator_set_seed(seed);
    std::vector<int> order;
    auto body = [&] { order.push_back(device::thread_index()); };
    const auto call = [](void* b) { (*static_cast<decltype(body)*>(b))(); };
    CHECK_EQUAL(emulator::run({.threads = 64}, call, &body), cudaSuccess);
    return order;
  };
  CHECK(run(1) == run(1));
  CHECK(run(1) != run(2));
}

void print_speed() {
  const auto in = numbers(64 * 256);
  std::vector<float> sums(64);
  std::vector<int64_t> counts(64);
  for (int round = 0; round < 2; ++round) {
    const auto start = std::chrono::steady_clock::now();
    CHECK_EQUAL(warp_sums(64, in.data(), sums.data(), counts.data(), nullptr), cudaSuccess);
    const std::chrono::duration<double, std::milli> time = std::chrono::steady_clock::now() - start;
    std::cout << "64 blocks of 256 threads, 8 waits per thread: " << time.count() << " ms\n";
  }
}

}  // namespace

// Runs the tests. With the argument "overrun", writes past the end of shared memory, for AddressSanitizer to report.
int main(int argc, char** argv) {
  if (argc > 1 && std::string(argv[1]) == "overrun") {
    return device::launch(broken_overrun_kernel, {.threads = 32, .shared_bytes = 128}, nullptr);
  }
  test_block_sum();
  test_missing_barrier_is_found();
  test_warp_sums();
  test_grid_sum();
  test_copies();
  test_broken_kernels();
  test_refused_launches();
  test_seed_sets_the_schedule();
  print_speed();
  return result();
}
