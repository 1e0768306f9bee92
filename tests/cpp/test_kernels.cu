// The kernels of two-phase plans on the emulator, against the definitions in double: every dtype, layout, activation
// and source of statistics; the edges of the contract; and the same bits in whatever order threads run.
#include "kernel_case.h"
#include "kernel_edges.h"

using namespace fastbn;
using namespace fastbn::test;

namespace {

const Shape shapes[] = {
    {{3, 5, 16}, 0, 0, 0},            // full and aligned vectors
    {{3, 5, 16}, 64, 2, 1},           // full, but not aligned
    {{2, 3, 49}, 64, 3, 0},           // a tail in every run
    {{4, 2, 200}, 32, 3, 0},          // runs longer than a block, splits that cut them
    {{70, 2, 8}, 32, 1, 0},           // many runs per block
    {{1, 1, 8 * 32 * 67}, 32, 1, 0},  // promotions of the running sums
    {{37, 16, 1}, 0, 0, 0},
    {{37, 16, 1}, 64, 5, 1},
    {{29, 13, 1}, 64, 2, 0},   // a tail in every row
    {{40, 264, 1}, 64, 2, 0},  // two channel tiles, the second one vector wide
    {{6, 3, 1}, 32, 4, 0},     // less than a vector, splits without rows
    {{32 * 67, 8, 1}, 32, 1, 0},
    // Rows that fill vectors where runs do not: some channels of a row, or several packed rows, of which the last lack
    // some.
    {{9, 16, 49}, 64, 2, 0},
    {{5, 6, 4}, 32, 1, 0},
    {{20, 16, 4}, 32, 2, 0},
    {{67, 3, 1}, 32, 2, 0},
    {{5, 7, 9}, 0, 1, 0},
    {{21, 20, 1}, 64, 2, 0},
    // Rows with promotions of the running sums, more of them in some threads and splits than in others.
    {{1200, 24, 1}, 32, 2, 0},
    {{1200, 24, 1}, 0, 2, 0},
    {{600, 8, 1}, 0, 1, 0},
    {{101, 600, 1}, 64, 2, 1},
    {{45, 16, 49}, 64, 2, 0},
    {{5003, 3, 1}, 32, 3, 0},
};

template <class T>
void test_type() {
  for (const Shape& shape : shapes) {
    const bool small = shape.layout.numel() < 1000;
    for (int activation = 0; activation < activation_count; ++activation) {
      if (!small && activation % 3 != 0) continue;
      for (bool with_residual : {false, true}) {
        test_forward<T>(shape, Activation(activation), with_residual);
        test_backward<T>(shape, Activation(activation), with_residual);
      }
    }
    test_seeds<T>(shape);
  }
}

// Checks that absent operands have their defaults, that gradients that are not wanted cost no launch, and that all
// launches of an op but the first overlap the one before.
void test_wanted() {
  Case<bfloat16> a(shapes[0]);
  const auto launches = [&](BackwardParams p) {
    const int64_t before = emulator::launches(), overlapping = emulator::overlapping_launches();
    CHECK_EQUAL(a.backward(p), cudaSuccess);
    const int64_t count = emulator::launches() - before;
    CHECK_EQUAL(emulator::overlapping_launches() - overlapping, std::max<int64_t>(count - 1, 0));
    return count;
  };
  for (Statistics statistics : {Statistics::batch, Statistics::running}) {
    const bool batch = statistics == Statistics::batch;
    BackwardParams p = a.backward_params(statistics, Activation::relu);
    CHECK_EQUAL(launches(p), batch ? 3 : 2);
    p.grad_weight = {};
    CHECK_EQUAL(launches(p), batch ? 3 : 2);
    p.grad_bias = {};
    CHECK_EQUAL(launches(p), batch ? 3 : 1);
    p.grad_input = nullptr;
    CHECK_EQUAL(launches(p), 0);
    p.grad_residual = a.grad_residual.data();
    CHECK_EQUAL(launches(p), 1);
    p.grad_residual = nullptr;
    p.grad_weight = vector_of(a.grad_weight);
    CHECK_EQUAL(launches(p), 2);
  }

  // Frozen statistics without a z to compute do not read the input.
  BackwardParams p = a.backward_params(Statistics::running, Activation::none);
  p.input = nullptr;
  p.grad_weight = {};
  CHECK_EQUAL(a.backward(p), cudaSuccess);

  const int64_t before = emulator::launches(), overlapping = emulator::overlapping_launches();
  ForwardParams f = a.forward_params(Statistics::batch, Activation::none, false);
  f.weight = f.bias = {};
  f.mean = f.inv_std = nullptr;
  CHECK_EQUAL(a.forward(f), cudaSuccess);
  CHECK_EQUAL(emulator::launches() - before, 3);
  CHECK_EQUAL(emulator::overlapping_launches() - overlapping, 2);
  Channels plain = a.channels;
  plain.weight.assign(a.layout.channels, 1);
  plain.bias.assign(a.layout.channels, 0);
  check_output(a, plain, Activation::none, false, false);
}

}  // namespace

int main() {
  test_type<float>();
  test_type<double>();
  test_type<bfloat16>();
  test_type<float16>();
  for (const Shape& shape : shapes) test_edges_of(shape);
  for (const Layout& layout : {Layout{0, 5, 1}, Layout{0, 5, 16}}) test_empty(layout);
  for (const Layout& layout : {Layout{1, 5, 1}, Layout{1, 16, 1}}) test_single(layout);
  test_wanted();
  return result();
}
