// Checks the CPU backend against the definitions in double: every leaf loop of the instruction set that FASTBN_CPU
// names, on memory of exactly the elements; and that results have the same bits for any number of threads and any order
// of their work.
#include <algorithm>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>

#include "check.h"
#include "cpu/kernels/kernels.h"
#include "cpu/workspace.h"
#include "cpu_backward.h"
#include "cpu_forward.h"

using namespace fastbn;
using namespace fastbn::test;

namespace {

const Layout layouts[] = {
    // One or two elements per channel.
    {1, 1, 1},
    {1, 5, 1},
    {2, 5, 1},
    {1, 1, 2},
    {1, 3, 2},
    // Runs shorter than a vector, with a tail, of full vectors, longer than a tile; one or several rows per tile.
    {13, 3, 7},
    {3, 5, 7},
    {3, 5, 49},
    {2, 64, 49},
    {3, 65, 7},
    {1, 29, 31},
    {2, 3, 784},
    {2, 5, 64},
    {1, 1, 33013},
    {2, 3, 16411},
    {41, 2, 784},
    {337, 3, 49},
    {17, 7, 512},  // groups of two channels, the last of one, and tiles of 16 rows, the last of one row
    // Images with more channels than a tile has rows.
    {1, 23, 784},
    {1, 2347, 7},
    // Rows of few channels, packed into one, with and without a tail; their masks fill bytes or have gaps.
    {3, 3, 1},
    {29, 3, 1},
    {37, 2, 1},
    {67, 5, 1},
    {97, 8, 1},
    {23, 12, 1},
    {41, 31, 1},
    {1009, 3, 1},
    // Channels that fill a row, or a vector and one more, in one or several tiles.
    {53, 64, 1},
    {53, 65, 1},
    {19, 1009, 1},
    {307, 65, 1},
    {23131, 3, 1},  // tiles of more rows than masks are gathered for at a time
    // Few, wide rows, cut into panels; the last panel has one channel, less than a vector, or a tail.
    {1, 8193, 1},
    {2, 8197, 1},
    {16, 4133, 1},
    {64, 1029, 1},
};

// The smallest number of work items that an op has distributed at a time: it must be several times the number of
// threads.
int64_t min_items;

void run_counted(int64_t count, int64_t, Task task, void* context) {
  min_items = std::min(min_items, count);
  task(0, count, context);
}

template <class T>
void test_few_wide_rows_are_distributed() {
  const cpu::Threads threads{2, run_counted};
  for (const Layout& layout : {Layout{2, 40000, 1}, Layout{16, 20000, 1}, Layout{64, 5000, 1}}) {
    const Case<T> a(layout, 0);
    const BackwardTest<T> backward(a, Activation::relu, variants[0], false);
    const Tensor<T> grad_input(layout.numel());
    Doubles first(layout.channels), second(layout.channels);
    auto check = [](auto&& run) {
      min_items = std::numeric_limits<int64_t>::max();
      run();
      CHECK(min_items >= 8 && min_items < std::numeric_limits<int64_t>::max());
    };
    for (Statistics statistics : {Statistics::batch, Statistics::running, Statistics::given}) {
      const Channels c = a.channels(variants[0], statistics);
      check([&] { run_forward(a, c, statistics, Activation::relu, variants[0], threads); });
      BackwardParams p = backward.params();
      p.statistics = statistics;
      p.grad_input = grad_input.data();
      p.sum_grad = backward.sum_grad.data();
      p.sum_grad_xhat = backward.sum_grad_xhat.data();
      p.count = backward.count.data();
      check([&] { cpu::backward(p, threads); });
    }
    ForwardParams stats;
    stats.layout = layout;
    stats.dtype = dtype_of<T>;
    stats.input = a.input.data();
    stats.mean = first.data();
    stats.var = second.data();
    check([&] { cpu::channel_stats(stats, threads); });
    BackwardParams sums = backward.params();
    sums.sum_grad = first.data();
    sums.sum_grad_xhat = second.data();
    check([&] { cpu::grad_sums(sums, threads); });
  }
}

bool is_small(const Layout& layout) { return layout.numel() < 5000; }

template <class T>
void test_activation(const Case<T>& a, Activation activation, const Options& options) {
  for (Statistics statistics : {Statistics::batch, Statistics::running, Statistics::given})
    test_forward(a, statistics, activation, options);
  if (options.mask && !is_piecewise_linear(activation)) return;
  const BackwardTest<T> backward(a, activation, options, options.mask);
  for (const Wanted& wanted : all_wanted) backward.test_gradients(wanted);
  backward.test_sums();
}

// Returns whether to test an activation on a layout. Large layouts are tested without one, and alternate between two
// pairs of activations, and with float64, whose exp and erf are libm's, between the first of each.
template <class T>
bool is_tested(Activation activation, const Layout& layout, int index) {
  if (is_small(layout) || activation == Activation::none ||
      activation == (index % 2 ? Activation::relu : Activation::leaky_relu))
    return true;
  return sizeof(T) < 8 && activation == (index % 2 ? Activation::gelu : Activation::silu);
}

// Checks that non-temporal stores and loops over tiles that are out of cache give the same output as others do: on
// tiles whose vectors are cache lines, with a tail, and on unaligned ones.
template <class T>
void test_memory_paths() {
  using A = acc_t<T>;
  constexpr int64_t size = 4096, width = 128;
  const cpu::Kernels& table = cpu::kernels(dtype_of<T>);
  const Tensor<T> input = random_tensor<T>(size, 1, 0), grad_out = random_tensor<T>(size, 2, 0);
  const Tensor<A> coefficients = random_tensor<A>(4 * width, 3, 1);
  const A* member = coefficients.data();
  const cpu::AffineArrays affine{member, member + width, member + 2 * width};
  const cpu::GradAffineArrays grad_affine{member, member + width, member + 2 * width, member + 3 * width};
  struct Outputs {
    // These fill pages, so that they begin at a cache line.
    Tensor<T> output{size, before_guard}, grad_input{size, before_guard}, grad_residual{size, before_guard};
    Tensor<T> frozen_grad{size, before_guard};
  };
  const cpu::Tile tiles[] = {{0, 3, 128, 128}, {16, 3, 112, 100}, {1, 3, 128, 100}, {0, 3, 50, 49}};
  for (cpu::Tile tile : tiles) {
    for (bool in_columns : {false, true}) {
      auto run = [&](bool non_temporal) {
        const Outputs outputs;
        double sums[2 * width] = {};
        const cpu::NormalizeArgs normalize{
            input.data(), nullptr, outputs.output.data(), nullptr, Activation::relu, 0, affine, non_temporal};
        cpu::GradArgs grad{grad_out.data(),
                           input.data(),
                           nullptr,
                           nullptr,
                           Activation::relu,
                           0,
                           affine.pivot,
                           affine,
                           grad_affine,
                           outputs.grad_input.data(),
                           outputs.grad_residual.data(),
                           non_temporal};
        (in_columns ? table.column_normalize : table.channel_normalize)(normalize, tile, {});
        (in_columns ? table.column_input_grad : table.channel_input_grad)(grad, tile, {});
        grad.activation = Activation::none;
        grad.grad_input = outputs.frozen_grad.data();
        grad.grad_residual = nullptr;
        (in_columns ? table.column_frozen_grad : table.channel_frozen_grad)(grad, tile, {}, {sums, sums + width});
        return outputs;
      };
      tile.out_of_cache = false;
      const Outputs cached = run(false), streamed = run(true);
      tile.out_of_cache = true;
      const Outputs out_of_cache = run(false);
      for (const Outputs* other : {&streamed, &out_of_cache}) {
        CHECK(same_bits(cached.output, other->output));
        CHECK(same_bits(cached.grad_input, other->grad_input));
        CHECK(same_bits(cached.grad_residual, other->grad_residual));
        CHECK(same_bits(cached.frozen_grad, other->frozen_grad));
      }
    }
  }
}

template <class T>
void test_type(const char* name) {
  test_memory_paths<T>();
  test_few_wide_rows_are_distributed<T>();
  test_relu_passes_gradients_of_nan<T>();
  int index = 0;
  for (const Layout& layout : layouts) {
    ++index;
    const Case<T> cases[] = {{layout, 0}, {layout, 1}, {layout, before_guard}};
    // Returns whether the last test failed, in which case the remaining ones would most likely fail alike.
    auto has_failed = [&, before = failures](const std::string& what) {
      if (failures > before)
        std::cerr << "the above: " << name << " [" << layout.outer << ", " << layout.channels << ", " << layout.inner
                  << "], " << what << "\n";
      return failures > before;
    };
    for (const Case<T>& a : cases) test_channel_stats(a);
    if (has_failed("channel_stats")) return;
    for (int activation = 0; activation < activation_count; ++activation) {
      if (!is_tested<T>(Activation(activation), layout, index)) continue;
      for (int variant = 0; variant < int(std::size(variants)); ++variant) {
        // Each variant is tested at each alignment with some activation.
        const Case<T>& a = cases[(activation + variant + index) % 3];
        test_activation(a, Activation(activation), variants[variant]);
        if (has_failed("activation " + std::to_string(activation) + ", variant " + std::to_string(variant) +
                       ", shift " + std::to_string(a.shift)))
          return;
      }
    }
  }
}

// Checks that arrays of a workspace are aligned and apart, in whatever order they are destroyed and however large they
// are, and that the next op gets the same memory.
void test_workspace() {
  [[maybe_unused]] const void* first = nullptr;
  for (int op = 0; op < 3; ++op) {
    auto a = std::make_unique<cpu::Workspace<float>>(size_t(3));
    auto b = std::make_unique<cpu::Workspace<double>>(size_t(5));
    cpu::Workspace<double> beyond_the_arena(size_t(1) << 20);
    std::fill(a->begin(), a->end(), 1.0f);
    std::fill(b->begin(), b->end(), 2.0);
    std::fill(beyond_the_arena.begin(), beyond_the_arena.end(), 3.0);
    for (const void* data : {static_cast<const void*>(a->data()), static_cast<const void*>(b->data()),
                             static_cast<const void*>(beyond_the_arena.data())})
      CHECK_EQUAL(uintptr_t(data) % 64, 0u);
    a.reset();
    cpu::Workspace<float> c(size_t(7));
    std::fill(c.begin(), c.end(), 4.0f);
    for (double value : *b) CHECK_EQUAL(value, 2.0);
    if (op == 0) first = b->data();
#if !defined(__SANITIZE_ADDRESS__)
    CHECK_EQUAL(b->data(), first);
#endif
  }
}

// Returns whether the machine has an instruction set, from the compiler's run-time library instead of the dispatch
// under test.
bool machine_has(const std::string& instruction_set) {
#if defined(__x86_64__)
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (instruction_set == "avx512") return has_avx512;
  if (instruction_set == "avx512_bf16") return has_avx512 && __builtin_cpu_supports("avx512bf16");
  if (instruction_set == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return instruction_set == "portable";
}

}  // namespace

int main() {
  const char* wanted = std::getenv("FASTBN_CPU");
  if (wanted && !machine_has(wanted)) {
    std::cerr << "skipped: this machine has no " << wanted << "\n";
    return fastbn::test::skipped;
  }
  if (wanted) CHECK_EQUAL(std::string(cpu::instruction_set()), wanted);
  test_workspace();
  test_relu_thresholds();
  test_type<float>("float32");
  test_type<double>("float64");
  test_type<bfloat16>("bfloat16");
  test_type<float16>("float16");
  return result();
}
