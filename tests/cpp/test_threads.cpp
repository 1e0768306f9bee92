// Runs every op of the CPU backend on several threads at once, which is for ThreadSanitizer (FASTBN_TSAN in
// CMakeLists.txt), and checks that results have the same bits as on one thread. Then two callers, each with threads of
// its own, run ops on the same input. `test_threads overlap forward|backward` plants a race: it gives the same tiles to
// two threads, which ThreadSanitizer must report.
#include <cstdlib>
#include <string>
#include <thread>

#include "check.h"
#include "cpu/kernels/kernels.h"
#include "cpu_backward.h"
#include "cpu_forward.h"
#include "thread_pool.h"

using namespace fastbn;
using namespace fastbn::test;

namespace {

constexpr int thread_count = 3;

const Layout layouts[] = {
    // Each group of channels goes through all phases on one thread, or there are too few groups for that.
    {2, 33, 1024},
    {2, 5, 1024},
    // Runs longer than a tile, and full tiles of rows of short runs.
    {2, 3, 16411},
    {337, 3, 49},
    // Several channels share a tile, and an image has more channels than a tile has rows.
    {3, 65, 7},
    {1, 2347, 7},
    // Rows of few channels, packed into one, with a tail; and full rows, in several tiles.
    {1009, 3, 1},
    {307, 65, 1},
    // Panels.
    {2, 8197, 1},
    {64, 1029, 1},
};

// Checks that `run` gives the same result on the pool as on one thread. Runs take turns in how items are distributed.
template <class Run>
void same_on_the_pool(Run&& run) {
  static int64_t runs = 0;
  const auto distribute = ++runs % 2 ? run_in_parts : run_in_turn;
  CHECK(run(cpu::Threads{thread_count, distribute}) == run(cpu::Threads{1, run_in_order}));
}

template <class T>
void test_case(const Case<T>& a, Activation activation, const Options& options) {
  for (Statistics statistics : {Statistics::batch, Statistics::running, Statistics::given}) {
    const Channels c = a.channels(options, statistics);
    same_on_the_pool(
        [&](const cpu::Threads& threads) { return run_forward(a, c, statistics, activation, options, threads); });
  }
  if (options.mask && !is_piecewise_linear(activation)) return;
  const BackwardTest<T> backward(a, activation, options, options.mask);
  for (const Wanted& wanted : all_wanted)
    same_on_the_pool([&](const cpu::Threads& threads) { return backward.run(wanted, threads); });
  same_on_the_pool([&](const cpu::Threads& threads) { return backward.run_sums(threads); });
}

template <class T>
void test_type(const char* name) {
  for (const Layout& layout : layouts) {
    const Case<T> a(layout, 0);
    same_on_the_pool([&](const cpu::Threads& threads) { return run_channel_stats(a, threads); });
    test_case(a, Activation::none, variants[2]);
    test_case(a, Activation::relu, variants[0]);
    test_case(a, Activation::relu, variants[1]);
    if (failures == 0) continue;
    std::cerr << "the above: " << name << " [" << layout.outer << ", " << layout.channels << ", " << layout.inner
              << "]\n";
    return;
  }
}

// Runs ops on the same tensors from two threads, as two modules that share an input do.
template <class T>
void test_two_callers() {
  for (const Layout& layout : {Layout{2, 33, 1024}, Layout{1009, 3, 1}, Layout{2, 8197, 1}}) {
    const Case<T> a(layout, 0);
    const Channels c = a.channels(variants[0], Statistics::batch);
    const BackwardTest<T> backward(a, Activation::relu, variants[0], false);
    auto forward = [&](const cpu::Threads& threads) {
      return run_forward(a, c, Statistics::batch, Activation::relu, variants[0], threads);
    };
    const auto output = forward({1, run_in_order});
    const auto grads = backward.run(all_wanted[0], {1, run_in_order});
    bool same[2] = {};
    auto call = [&](int caller) {
      ThreadPool pool(2);
      pool_of_caller = &pool;
      const cpu::Threads threads{2, run_in_turn};
      same[caller] = forward(threads) == output && backward.run(all_wanted[0], threads) == grads;
    };
    std::thread first(call, 0), second(call, 1);
    first.join();
    second.join();
    CHECK(same[0] && same[1]);
  }
}

int overlap(const std::string& op) {
  const Case<float> a({3, 65, 7}, 0);
  const BackwardTest<float> backward(a, Activation::relu, variants[0], false);
  const cpu::Threads threads{thread_count, run_overlapping};
  if (op == "forward")
    run_forward(a, a.channels(variants[0], Statistics::running), Statistics::running, Activation::relu, variants[0],
                threads);
  else
    backward.run(all_wanted[4], threads);
  return result();
}

}  // namespace

int main(int argc, char** argv) {
  const char* wanted = std::getenv("FASTBN_CPU");
  try {
    cpu::instruction_set();
  } catch (const std::exception& error) {
    std::cerr << "skipped: " << error.what() << "\n";
    return fastbn::test::skipped;
  }
  if (wanted) CHECK_EQUAL(std::string(cpu::instruction_set()), wanted);
  ThreadPool pool(thread_count);
  pool_of_caller = &pool;
  if (argc == 3 && std::string(argv[1]) == "overlap") return overlap(argv[2]);
  test_type<float>("float32");
  test_type<double>("float64");
  test_type<bfloat16>("bfloat16");
  test_two_callers<float>();
  return result();
}
