// The stream kernels on the emulator, under random schedules in which some role or block may be starved: every layout
// that they serve, several groups, splits and tiles ahead, and rings of every fullness, against the definitions in
// double.
#include "kernel_case.h"
#include "kernel_edges.h"

using namespace fastbn;
using namespace fastbn::test;

namespace {

constexpr Kernel runs = Kernel::channel_tiles, rows = Kernel::row_tiles;

const Shape shapes[] = {
    // Runs of one channel: one block; groups that have several tiles, or one less; splits that cut runs; rings that are
    // just large enough, and larger ones.
    {.layout = {3, 5, 16}, .stream = {.kernel = runs, .groups = 1}},
    {.layout = {3, 5, 16}, .stream = {.kernel = runs, .groups = 2, .ahead = 1}},
    {.layout = {4, 7, 200}, .stream = {.kernel = runs, .groups = 2, .splits = 2, .ahead = 2}},
    {.layout = {4, 7, 200}, .stream = {.kernel = runs, .groups = 3, .splits = 3, .ahead = 1, .spare_tiles = 1}},
    {.layout = {70, 9, 8}, .stream = {.kernel = runs, .groups = 1, .splits = 4, .ahead = 3}},
    // Rows of which a tile has 4, 8 or 16 vectors, the last tile fewer.
    {.layout = {37, 64, 1}, .stream = {.kernel = rows, .row_vectors = 4, .groups = 1}},
    {.layout = {37, 264, 1}, .stream = {.kernel = rows, .row_vectors = 4, .groups = 2, .splits = 2, .ahead = 1}},
    {.layout = {150, 264, 1},
     .stream = {.kernel = rows, .row_vectors = 8, .groups = 2, .splits = 3, .ahead = 2, .spare_tiles = 2}},
    {.layout = {41, 200, 1}, .stream = {.kernel = rows, .row_vectors = 16, .groups = 1, .splits = 2, .ahead = 1}},
    // Rows of several runs, which vectors span.
    {.layout = {9, 32, 49}, .stream = {.kernel = rows, .channels = 8, .groups = 1, .splits = 2, .ahead = 1}},
    {.layout = {9, 24, 49}, .stream = {.kernel = rows, .channels = 16, .groups = 2, .ahead = 1}},
    {.layout = {21, 6, 196}, .stream = {.kernel = rows, .channels = 2, .groups = 2, .splits = 2, .spare_tiles = 1}},
    {.layout = {20, 16, 16}, .stream = {.kernel = rows, .channels = 4, .groups = 2, .splits = 2, .ahead = 1}},
};

// Larger shapes, of several chunks per tile, the last of them not full.
const Shape large_shapes[] = {
    {.layout = {13, 3, 3200}, .stream = {.kernel = runs, .groups = 1, .splits = 4, .ahead = 1}},
    {.layout = {4000, 128, 1},
     .stream = {.kernel = rows, .row_vectors = 4, .groups = 1, .splits = 6, .ahead = 1, .spare_tiles = 1}},
    {.layout = {130, 16, 49}, .stream = {.kernel = rows, .channels = 8, .groups = 1, .splits = 3, .ahead = 1}},
};

// Runs all activations on the smallest shapes, and on the others one of each path through the loops.
template <class T>
void test_type() {
  for (const Shape& shape : shapes) {
    const bool smallest = shape.layout.numel() < 300;
    for (int activation = 0; activation < activation_count; ++activation) {
      const bool has_own_path = activation == int(Activation::none) || activation == int(Activation::relu) ||
                                activation == int(Activation::leaky_relu) || activation == int(Activation::silu);
      if (!smallest && !has_own_path) continue;
      for (bool with_residual : {false, true}) {
        test_forward<T>(shape, Activation(activation), with_residual);
        test_backward<T>(shape, Activation(activation), with_residual);
      }
    }
  }
}

// Checks that float sums need no promotion: a channel of 2^20 elements whose mean is a million standard deviations.
// Each of a thread's accumulators adds 16 terms, exact differences from the pivot or their squares, and the rest is
// added in double, so that relative errors are at most 16 roundings of the terms.
void test_long_channel() {
  constexpr double bound = 16 * 0x1p-24;
  Case<float> a({.layout = {1024, 1, 1024}, .stream = {.kernel = runs, .groups = 1, .splits = 32}});
  for (int64_t i = 0; i < a.input.size; ++i) a.input.data()[i] = float(1e4 + 0.01 * a.input.at(i));
  reference_stats(a.layout, a.input, a.channels.mean, a.var);
  CHECK_EQUAL(a.forward(a.forward_params(Statistics::batch, Activation::none, false)), cudaSuccess);
  const double std_dev = std::sqrt(a.var[0]);
  CHECK(std_dev > 0.005 && std_dev < 0.02);
  CHECK_NEAR(a.mean[0], a.channels.mean[0], bound * 4 * std_dev);  // the pivot is within a few deviations
  CHECK_NEAR(1 / (a.inv_std[0] * a.inv_std[0]) - kEps, a.var[0], bound * 4 * a.var[0]);
}

}  // namespace

int main() {
  test_type<float>();
  test_type<bfloat16>();
  for (const Shape& shape : shapes) {
    test_backward<float16>(shape, Activation::relu, true);
    test_seeds<bfloat16>(shape);
  }
  for (const Shape& shape : large_shapes) {
    test_forward<float>(shape, Activation::relu, true);
    test_backward<bfloat16>(shape, Activation::relu, true);
    test_backward<float16>(shape, Activation::silu, false);
  }
  // One shape of each kind of tile, with splits.
  for (const Shape& shape : {shapes[2], shapes[6], shapes[9]}) test_edges_of(shape);
  for (const Shape& shape : shapes) test_counter(shape);
  test_long_channel();
  return result();
}
