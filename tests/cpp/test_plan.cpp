// The planner: plans and their traffic, what fits on chip, and the map of shared memory.
#include "check.h"
#include "plan/planner.h"

using namespace fastbn;

namespace {

void test_two_phase_plans() {
  const DeviceLimits h200 = known_devices[2];
  // A channel is 256 MB, and its runs cannot be visited in the order that keeping a part of it takes.
  Request request{{128, 3, 1024 * 1024}, DType::bfloat16};
  Plan plan = choose_plan(request, h200);
  CHECK(plan.schedule == Schedule::two_phase && plan.cluster == 1 && plan.launches == 3);
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
            CHECK(plan.schedule == bare.schedule && plan.groups == bare.groups && plan.splits == bare.splits);
            CHECK(plan.vectors_per_row == bare.vectors_per_row && plan.fold == bare.fold &&
                  plan.cluster == bare.cluster);
            CHECK(plan.tensor_reads == bare.tensor_reads + 1);
          }
        }
}

void test_resident_plans() {
  const DeviceLimits h200 = known_devices[2], a100 = known_devices[0];
  // Eight channels of 128 x 7 x 7 bfloat16 are 100 KB and take a cluster of two. One channel of 256 x 56 x 56 is 1.6
  // MB, one of 256 x 112 x 112 is 6.4 MB, and they take many blocks of a cooperative grid.
  Plan plan = choose_plan({{128, 512, 7 * 7}, DType::bfloat16}, h200);
  CHECK(plan.schedule == Schedule::resident && plan.cluster == 2 && plan.launches == 1 && plan.tiles == 64);
  CHECK(plan.tensor_reads == 1 && plan.tensor_writes == 1 && plan.shared_bytes <= h200.shared_bytes_per_block);
  // A GPU without clusters uses blocks of a cooperative grid where others use clusters.
  CHECK(choose_plan({{256, 64, 56 * 56}, DType::bfloat16}, a100).schedule == Schedule::cooperative);
  for (int64_t inner : {56 * 56, 112 * 112}) {
    plan = choose_plan({{256, 64, inner}, DType::bfloat16}, h200);
    CHECK(plan.schedule == Schedule::cooperative && plan.cluster == 1 && plan.launches == 1);
    CHECK(plan.groups > 1 && plan.groups * plan.splits > h200.sm_count && plan.tensor_reads == 1);
  }
  Request request{{128, 64, 56 * 56}, DType::bfloat16};
  request.direction = Direction::backward;
  request.residual = request.masked = true;
  request.activation = Activation::relu;
  plan = choose_plan(request, h200);
  CHECK(plan.schedule == Schedule::cooperative && plan.resident_tensors == 2 && plan.launches == 1);
  CHECK(plan.tensor_reads == 2 + 2.0 / 16 && plan.tensor_writes == 2);
  request.masked = false;
  request.activation = Activation::silu;
  plan = choose_plan(request, h200);
  CHECK(plan.launches == 1 && plan.resident_tensors == 3 && plan.tensor_reads == 3);
  request.fused = false;
  CHECK(choose_plan(request, h200).schedule == Schedule::two_phase);
  CHECK(choose_plan({{0, 512, 49}, DType::bfloat16}, h200).schedule == Schedule::two_phase);
  // Three channels would fill three clusters of 132 SMs; they take them only if the launch is most of the time.
  CHECK(choose_plan({{32, 3, 224 * 224}, DType::bfloat16}, h200).schedule == Schedule::cooperative);
  plan = choose_plan({{16, 3, 28 * 28}, DType::bfloat16}, h200);
  CHECK(plan.schedule == Schedule::resident && plan.cluster > 2);

  for (DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16})
    for (Direction direction : {Direction::forward, Direction::backward})
      for (int64_t channels : {1, 3, 8, 100, 512, 4096})
        for (int64_t outer : {1, 7, 64, 12544, 50176, 3000000})
          for (int64_t inner : {1, 2, 49, 3136}) {
            const Plan p = choose_plan({{outer, channels, inner}, dtype, direction}, h200);
            if (p.schedule == Schedule::two_phase) continue;
            CHECK(p.shared_bytes <= h200.shared_bytes_per_block && p.launches == 1);
            if (p.schedule == Schedule::resident) {
              CHECK(p.cluster == p.splits && p.cluster <= h200.max_cluster && p.groups == p.tiles);
            } else {
              // All blocks fit at once.
              const int64_t blocks = p.groups * p.splits, per_sm = (blocks + h200.sm_count - 1) / h200.sm_count;
              CHECK(p.cluster == 1 && p.splits > 1 && p.groups <= p.tiles);
              CHECK(per_sm * (p.shared_bytes + 1024) <= h200.shared_bytes_per_block + 1024);
              CHECK(per_sm <=
                    blocks_per_sm(element_size(dtype), p.kernel, direction == Direction::backward, p.vectorized));
            }
            // Every element has a slot, or the slots of one group are a ring that consists of full stages.
            const Layout layout{outer, channels, inner};
            CHECK(p.tiles * p.channels_per_tile >= channels);
            if (p.resident_fraction == 1) {
              CHECK(int64_t(p.slots) * (p.threads / p.vectors_per_row) * p.splits >= p.work_items(layout) &&
                    p.reread_fraction == 0);
            } else {
              CHECK(p.groups == 1 && p.kernel == Kernel::row_tiles && p.slots > 0 &&
                    p.slots == copy_stages * p.slots_per_stage);
              CHECK(p.resident_fraction > 0 && p.resident_fraction < 1 && p.reread_fraction >= 0 &&
                    p.reread_fraction < 1 - p.resident_fraction);
            }
            CHECK(p.kernel == Kernel::channel_tiles || p.tiles == 1 ||
                  p.vectors_per_row * vec_size * element_size(dtype) >= min_row_bytes);
          }
}

void test_plans_that_keep_a_part() {
  const DeviceLimits h200 = known_devices[2];
  // The two tensors have 103 MB. 17 MB stay on chip, 31 MB in half of L2, and the rest is read from memory again.
  Request request{{128 * 56 * 56, 64, 1}, DType::bfloat16, Direction::backward};
  Plan plan = choose_plan(request, h200);
  CHECK(plan.schedule == Schedule::cooperative && plan.groups == 1 && plan.tiles == 1 && plan.launches == 1);
  CHECK(plan.slots == 16 && plan.slots == copy_stages * plan.slots_per_stage);
  CHECK_NEAR(plan.resident_fraction, 16 / 96.0, 0.01);
  CHECK_NEAR(plan.tensor_reads, 2 + 2 * (1 - 16 / 96.0 - 31.5 / 102.8), 0.02);
  // Keeping a part does not pay if more is read or written, nor in forward, whose plans ignore the epilogue.
  request.dtype = DType::float32;
  CHECK(choose_plan(request, h200).resident_fraction == 1);
  request.dtype = DType::bfloat16;
  request.activation = Activation::relu;
  CHECK(choose_plan(request, h200).resident_fraction < 1);
  request.masked = true;
  CHECK(choose_plan(request, h200).resident_fraction == 1);
  CHECK(choose_plan({request.layout, DType::bfloat16}, h200).resident_fraction == 1);
  // A GPU without room for a stage of two vectors has no such plan.
  request.masked = false;
  DeviceLimits small = h200;
  small.shared_bytes_per_block = 48 << 10;
  CHECK(choose_plan(request, small).schedule == Schedule::two_phase);
}

// Checks the map of shared memory: arrays follow one another without overlap, each aligned for its type.
void test_shared_memory_map() {
  Plan plan;
  plan.kernel = Kernel::row_tiles;
  plan.channels_per_tile = 5;
  const SharedMemoryMap<bfloat16, GradCoefficients<float>> two_phase(plan, vec_size);
  CHECK_EQUAL(two_phase.scratch.offset, 2 * 8 * 256 * 8 + 8 * 4);
  CHECK_EQUAL(two_phase.bytes(), two_phase.scratch.offset + 5 * 32);

  plan.schedule = Schedule::resident;
  plan.slots = 3;
  plan.resident_tensors = 2;
  plan.threads = 64;
  const SharedMemoryMap<bfloat16, GradCoefficients<float>> map(plan, vec_size);
  CHECK_EQUAL(map.exchange.offset, map.scratch.end());
  CHECK_EQUAL(map.coefficients.offset, map.exchange.offset + 2 * 5 * 16);
  CHECK_EQUAL(map.ring.offset, map.coefficients.offset + 128);  // 5 * 24 bytes, and 8 to a multiple of 16
  CHECK_EQUAL(map.bytes(), map.ring.offset + 3 * 2 * 64 * 16);
  plan.schedule = Schedule::cooperative;  // which exchanges sums in global memory
  CHECK_EQUAL((SharedMemoryMap<bfloat16, GradCoefficients<float>>(plan, vec_size).bytes()), map.bytes() - 2 * 5 * 16);

  CHECK_EQUAL(InputGradMap<float>(plan).bytes(), 8 * 4 + 5 * 24);
  CHECK_EQUAL(InputGradMap<double>(plan).bytes(), 5 * 48);  // nothing to vote on
}

}  // namespace

int main() {
  test_two_phase_plans();
  test_walks();
  test_forward_plans_ignore_the_epilogue();
  test_resident_plans();
  test_plans_that_keep_a_part();
  test_shared_memory_map();
  return fastbn::test::result();
}
