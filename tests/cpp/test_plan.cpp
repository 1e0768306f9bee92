// Two-phase plans: walks, traffic, waves and the maps of shared memory. Requests are of ops that are not fused, or the
// planner would stream many of them (test_stream_plan.cpp).
#include "check.h"
#include "plan/planner.h"

using namespace fastbn;

namespace {

void test_two_phase_plans() {
  const DeviceLimits h200 = known_devices[2];
  Request request{{128, 3, 1024 * 1024}, DType::bfloat16};
  request.fused = false;
  Plan plan = choose_plan(request, h200);
  CHECK(plan.schedule == Schedule::two_phase && plan.launches == 3);
  CHECK(plan.kernel == Kernel::channel_tiles && plan.vectorized && plan.splits > 1);
  CHECK(plan.tensor_reads == 2 && plan.tensor_writes == 1);
  request.direction = Direction::backward;
  CHECK(choose_plan(request, h200).tensor_reads == 4);
  request.residual = request.masked = true;
  request.activation = Activation::relu;
  CHECK(choose_plan(request, h200).tensor_reads == 2 * (2 + 1.0 / 16));
  request.masked = false;
  request.activation = Activation::silu;
  CHECK(choose_plan(request, h200).tensor_reads == 6 && choose_plan(request, h200).tensor_writes == 2);
  request.aligned = false;
  CHECK(!choose_plan(request, h200).vectorized);
  for (int64_t channels : {1, 3, 8, 100, 4096})
    for (int64_t outer : {1, 2, 1000, 10000000}) {
      Request rows_request{{outer, channels, 1}, DType::float32};
      rows_request.fused = false;
      const Plan rows = choose_plan(rows_request, h200);
      CHECK(rows.kernel == Kernel::row_tiles && rows.splits >= 1 && rows.splits <= 1024);
      CHECK(rows.tiles * rows.channels_per_tile >= channels);
    }
}

// Checks the walks of layouts whose rows fill vectors where runs do not.
void test_walks() {
  const DeviceLimits h200 = known_devices[2];
  const auto plan_of = [&](Layout layout, bool masked, bool aligned) {
    Request request{layout, DType::bfloat16};
    request.fused = false;
    request.masked = masked;
    request.aligned = aligned;
    return choose_plan(request, h200);
  };
  const auto check_rows = [&](const Plan& p, int vectors_per_row, int fold, int channels_per_tile) {
    CHECK(p.kernel == Kernel::row_tiles && p.vectorized);
    CHECK_EQUAL(p.vectors_per_row, vectors_per_row);
    CHECK_EQUAL(p.fold, fold);
    CHECK_EQUAL(p.channels_per_tile, channels_per_tile);
  };
  check_rows(plan_of({32, 512, 7 * 7}, false, true), 49, 1, 8);
  check_rows(plan_of({32, 256, 14 * 14}, false, true), 49, 1, 2);
  check_rows(plan_of({32, 64, 4 * 4}, true, true), 8, 1, 4);  // a run of its mask fills bytes
  check_rows(plan_of({1000, 3, 1}, false, true), 3, 8, 3);
  check_rows(plan_of({1000, 100, 1}, false, true), 25, 2, 100);
  check_rows(plan_of({64, 5, 9}, false, true), 45, 8, 5);
  for (bool masked : {false, true}) {
    CHECK(plan_of({32, 64, 56 * 56}, masked, true).kernel == Kernel::channel_tiles);
    CHECK(!plan_of({32, 512, 49}, masked, masked).vectorized);  // masked, or not aligned
    CHECK(!plan_of({1000, 3, 1}, masked, masked).vectorized);
    CHECK(!plan_of({1000, 1001, 1}, masked, true).vectorized);
    CHECK(!plan_of({32, 64, 35 * 35}, masked, true).vectorized);  // more vectors per row than a block has threads
  }
}

// Checks that no pass has a last wave of a few blocks: in as many waves, no tile could have another split.
void test_passes_take_whole_waves() {
  const int64_t activations[][2] = {{64, 112}, {64, 56},  {128, 56}, {256, 56},  {128, 28}, {256, 28},
                                    {512, 28}, {256, 14}, {512, 14}, {1024, 14}, {512, 7},  {2048, 7}};
  for (const DeviceLimits& limits : known_devices)
    for (auto [channels, size] : activations)
      for (int64_t n : {8, 32, 128, 256})
        for (bool channels_last : {false, true})
          for (Direction direction : {Direction::forward, Direction::backward})
            for (DType dtype : {DType::bfloat16, DType::float32, DType::float64}) {
              const int64_t space = size * size;
              const Layout layout = channels_last ? Layout{n * space, channels, 1} : Layout{n, channels, space};
              Request request{layout, dtype, direction};
              request.fused = false;
              const Plan plan = choose_plan(request, limits);
              const bool forward = direction == Direction::forward;
              const auto check_pass = [&](Pass pass, int64_t splits) {
                const int compiled = compiled_blocks_per_sm(pass, plan.kernel, element_size(dtype), true);
                const int64_t wave = blocks_per_wave(limits, compiled, plan.shared_bytes);
                const int64_t blocks = plan.tiles * splits, waves = (blocks + wave - 1) / wave;
                const bool is_most = splits == max_splits_of(layout, plan);
                CHECK(is_most || blocks + plan.tiles > waves * wave);
                CHECK(is_most || layout.numel() < 16000000 || double(blocks) > 0.75 * double(waves * wave));
              };
              CHECK(is_aligned_walk(plan, layout) && plan.items_per_split * plan.splits >= plan.work_items(layout));
              check_pass(forward ? Pass::moments : Pass::grad_sums, plan.splits);
              check_pass(forward ? Pass::normalize : Pass::input_grad, plan.last_splits);
            }
  // Shared memory may leave room for fewer blocks than registers.
  CHECK_EQUAL(blocks_per_wave(known_devices[0], 3, 60000), 108 * 2);
  CHECK_EQUAL(blocks_per_wave(known_devices[0], 3, 200000), 108);
}

// Checks that statistics have the same bits whatever follows them: a forward's plan depends on neither residual nor
// mask, except for a mask that would begin in the middle of a vector.
void test_forward_plans_ignore_the_epilogue() {
  for (int64_t channels : {3, 64, 100, 512, 2048})
    for (int64_t outer : {8, 64, 12544, 100352, 802816})
      for (int64_t inner : {1, 16, 49, 3136})
        for (const DeviceLimits& limits : known_devices) {
          Request request{{outer, channels, inner}, DType::bfloat16};
          const Plan bare = choose_plan(request, limits);
          request.activation = Activation::relu;
          request.residual = true;
          for (bool masked : {false, true}) {
            request.masked = masked && request.layout.run() % vec_size == 0;
            const Plan plan = choose_plan(request, limits);
            CHECK(plan.schedule == bare.schedule && plan.groups == bare.groups && plan.splits == bare.splits &&
                  plan.last_splits == bare.last_splits);
            CHECK(plan.vectors_per_row == bare.vectors_per_row && plan.fold == bare.fold);
            CHECK(plan.channels_per_tile == bare.channels_per_tile && plan.stream.ahead == bare.stream.ahead &&
                  plan.stream.vectors_per_split == bare.stream.vectors_per_split);
            CHECK(plan.tensor_reads == bare.tensor_reads + 1);
          }
        }
}

// Checks the map of shared memory: arrays follow one another without overlap, each aligned for its type.
void test_shared_memory_map() {
  Plan plan;
  plan.kernel = Kernel::row_tiles;
  plan.channels_per_tile = 5;
  const ReduceMap map(plan, channels_per_thread(plan.kernel));
  CHECK_EQUAL(map.scratch.offset, 2 * 8 * 256 * 8 + 8 * 4 + 8);
  CHECK_EQUAL(map.bytes(), map.scratch.offset + 5 * 32);
  CHECK_EQUAL(ReduceMap(plan, 1).scratch.offset, 2 * 256 * 8 + 8 * 4 + 8);

  CHECK_EQUAL(InputGradMap<float>(plan).bytes(), 8 * 4 + 5 * 24);
  CHECK_EQUAL(InputGradMap<double>(plan).bytes(), 5 * 48);  // nothing to vote on
}

}  // namespace

int main() {
  test_two_phase_plans();
  test_walks();
  test_passes_take_whole_waves();
  test_forward_plans_ignore_the_epilogue();
  test_shared_memory_map();
  return fastbn::test::result();
}
