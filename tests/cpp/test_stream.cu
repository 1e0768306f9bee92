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

template <class T>
void test_type() {
  for (const Shape& shape : shapes) {
    const bool small = shape.layout.numel() < 6000;
    for (int activation = 0; activation < activation_count; ++activation) {
      if (!small && activation % 3 != 0) continue;
      for (bool with_residual : {false, true}) {
        test_forward<T>(shape, Activation(activation), with_residual);
        test_backward<T>(shape, Activation(activation), with_residual);
      }
    }
    test_seeds<T>(shape);
  }
  for (const Shape& shape : large_shapes) {
    for (Activation activation : {Activation::none, Activation::relu, Activation::silu}) {
      for (bool with_residual : {false, true}) {
        test_forward<T>(shape, activation, with_residual);
        test_backward<T>(shape, activation, with_residual);
      }
    }
  }
}

}  // namespace

int main() {
  test_type<float>();
  test_type<bfloat16>();
  test_type<float16>();
  for (const Shape& shape : shapes) test_edges_of(shape);
  return result();
}
