// Stream plans: what may be streamed, and the invariants without which blocks would wait for one another forever or
// leave most SMs idle.
#include <algorithm>
#include <vector>

#include "check.h"
#include "plan/planner.h"

using namespace fastbn;

namespace {

const DeviceLimits h200 = known_devices[2];

constexpr int64_t resnet50[][2] = {{64, 112}, {64, 56},  {128, 56}, {256, 56},  {128, 28}, {256, 28},
                                   {512, 28}, {256, 14}, {512, 14}, {1024, 14}, {512, 7},  {2048, 7}};

// Checks that a plan fits its device, covers the tensor, and keeps its blocks live.
void check_stream_plan(const Request& request, const DeviceLimits& limits, const Plan& plan) {
  const StreamPlan& stream = plan.stream;
  const Layout& layout = request.layout;
  const int64_t elements = 16 / element_size(request.dtype);
  CHECK(plan.shared_bytes <= limits.shared_bytes_per_block);
  CHECK(plan.shared_bytes == stream_shared_bytes(plan, request.direction));
  CHECK(plan.groups >= 1 && plan.splits >= 1 && int64_t(plan.groups) * plan.splits <= limits.sms_of_grid());
  CHECK(plan.threads == stream_threads && plan.launches == 1);

  CHECK(stream.ahead + 1 <= stream.ring_tiles && is_live(stream));
  CHECK(stream.ahead <= max_ahead && message_depth(stream) > stream.ahead);
  CHECK(stream.chunks_per_tile * stream.chunk_vectors >= stream.vectors_per_split || plan.splits == 1);
  CHECK(stream.chunks_per_tile * stream.chunk_vectors >= std::min(stream.vectors_per_split, stream.vectors));

  // Every split has vectors, and together they have all of a tile; the tiles have all channels.
  CHECK(int64_t(stream.vectors_per_split) * plan.splits >= stream.vectors);
  CHECK(int64_t(stream.vectors_per_split) * (plan.splits - 1) < stream.vectors);
  CHECK(int64_t(plan.tiles) * plan.channels_per_tile >= layout.channels);
  CHECK(int64_t(plan.tiles - 1) * plan.channels_per_tile < layout.channels);
  CHECK(stream.vectors == layout.outer * stream.row_vectors);
  CHECK_EQUAL((int64_t(plan.tiles - 1) * stream.row_vectors + stream.last_row_vectors) * elements,
              layout.channels * layout.inner);

  // A thread of row_tiles stays in its column, and lanes in one column add up by halving.
  if (plan.kernel == Kernel::row_tiles) {
    CHECK(stream.threads % stream.row_vectors == 0 && stream.vectors_per_split % stream.row_vectors == 0);
    CHECK(stream.spans_runs || stream_warp % stream.row_vectors == 0);
    CHECK(stream.consumer_step.column == 0);
  } else {
    CHECK(stream.threads == stream_consumers && plan.channels_per_tile == 1);
  }
  // A byte of a mask of float32 has the bits of two vectors, which are neighbours in their part.
  CHECK(!request.masked || stream.vectors_per_split % (vec_size / elements) == 0);
}

void test_plans_are_live() {
  int64_t streamed = 0;
  DeviceLimits few = h200, small = h200;
  few.sm_count = 3;
  small.shared_bytes_per_block = 64 << 10;
  for (const DeviceLimits& limits : {known_devices[0], h200, known_devices[3], few, small})
    for (DType dtype : {DType::float32, DType::bfloat16, DType::float16})
      for (Direction direction : {Direction::forward, Direction::backward})
        for (int64_t channels : {1, 2, 3, 8, 24, 40, 64, 72, 100, 184, 512, 2048, 4096})
          for (int64_t outer : {1, 2, 7, 32, 256, 12544, 50176, 802816})
            for (int64_t inner : {1, 2, 4, 8, 12, 16, 49, 64, 196, 784, 1000, 3136, 12544, 50176})
              for (int epilogue : {0, 1, 2}) {
                if (outer * channels * inner > int64_t(1) << 33) continue;
                Request request{{outer, channels, inner}, dtype, direction};
                request.activation = epilogue == 0 ? Activation::none : Activation::silu;
                request.residual = epilogue > 0;
                request.masked = epilogue == 2 && request.layout.run() % vec_size == 0;
                if (epilogue == 2) request.activation = Activation::relu;
                const Plan plan = choose_plan(request, limits);
                if (plan.schedule != Schedule::stream) continue;
                ++streamed;
                check_stream_plan(request, limits, plan);
              }
  CHECK(streamed > 10000);
}

void test_what_is_not_streamed() {
  const auto streams = [](auto... change) {
    Request request{{128, 256, 28 * 28}, DType::bfloat16};
    (change(request), ...);
    return choose_plan(request, h200).schedule == Schedule::stream;
  };
  CHECK(streams());
  CHECK(streams([](Request& r) { r.direction = Direction::backward; }));
  CHECK(!streams([](Request& r) { r.dtype = DType::float64; }));
  CHECK(!streams([](Request& r) { r.aligned = false; }));
  CHECK(!streams([](Request& r) { r.fused = false; }));
  CHECK(!streams([](Request& r) { r.direction = Direction::eval; }));
  CHECK(!streams([](Request& r) { r.direction = Direction::frozen_backward; }));
  CHECK(!streams([](Request& r) { r.layout.outer = 0; }));
  CHECK(!streams([](Request& r) { r.layout = {128, 255, 49}; }));        // rows that do not fill vectors
  CHECK(!streams([](Request& r) { r.layout = {100000, 24, 1}; }));       // rows of 48 bytes
  CHECK(!streams([](Request& r) { r.layout = {10000, 64, 4}; }));        // vectors that span three channels
  CHECK(!streams([](Request& r) { r.layout = {256, 64, 512 * 512}; }));  // a channel of 134 MB
  Request masked{{128, 256, 49}, DType::bfloat16, Direction::backward, Activation::relu};
  CHECK(choose_plan(masked, h200).schedule == Schedule::stream);
  masked.masked = true;  // bytes of the mask that end with each run
  CHECK(choose_plan(masked, h200).schedule == Schedule::two_phase);
  DeviceLimits old = h200;
  old.has_mbarriers = false;
  CHECK(choose_plan({{128, 256, 28 * 28}, DType::bfloat16}, old).schedule == Schedule::two_phase);
}

// Checks tiles by layout: runs, parts of rows, and rows of several runs.
void test_tiles() {
  const auto plan_of = [](Layout layout, DType dtype) { return choose_plan({layout, dtype}, h200); };
  Plan plan = plan_of({128, 256, 28 * 28}, DType::bfloat16);
  CHECK(plan.kernel == Kernel::channel_tiles && plan.stream.row_vectors == 98 && plan.tiles == 256);
  for (DType dtype : {DType::bfloat16, DType::float32}) {
    plan = plan_of({128, 512, 14 * 14}, dtype);
    const int channels = dtype == DType::float32 ? 1 : 2;
    CHECK_EQUAL(plan.stream.row_vectors, 49);
    CHECK_EQUAL(plan.channels_per_tile, channels);
    plan = plan_of({128, 512, 7 * 7}, dtype);
    CHECK_EQUAL(plan.stream.row_vectors, 49);
    CHECK(plan.stream.spans_runs && plan.stream.threads == 490 && plan.channels_per_tile == 4 * channels);
  }
  plan = plan_of({12544, 200, 1}, DType::bfloat16);  // the last tile has fewer channels
  CHECK(plan.kernel == Kernel::row_tiles && !plan.stream.spans_runs);
  CHECK(plan.stream.last_row_vectors < plan.stream.row_vectors);
}

// Checks that a stream plan of ResNet-50 gives work to 95 % of the SMs, in blocks and, as far as tiles can be shared
// out evenly, in time; that what fits on the chip is read once; and that a cap on SMs is kept.
void test_resnet50() {
  for (int64_t n : {32, 64, 128, 256})
    for (auto [channels, size] : resnet50)
      for (bool channels_last : {false, true})
        for (DType dtype : {DType::bfloat16, DType::float32})
          for (Direction direction : {Direction::forward, Direction::backward}) {
            const Layout layout =
                channels_last ? Layout{n * size * size, channels, 1} : Layout{n, channels, size * size};
            const Request request{layout, dtype, direction};
            const Plan plan = choose_plan(request, h200);
            const int64_t bytes = layout.numel() * element_size(dtype);
            if (!channels_last) CHECK(plan.schedule == Schedule::stream);
            if (plan.schedule != Schedule::stream) continue;
            CHECK_EQUAL(plan.tensor_reads, direction == Direction::forward ? 1 : 2);
            const int64_t blocks = int64_t(plan.groups) * plan.splits;
            // A tensor of 3 MB gives 24 kilobytes to each SM.
            CHECK(20 * blocks >= 19 * h200.sm_count || bytes < 4000000);
            DeviceLimits capped = h200;
            capped.grid_sms = 100;
            const Plan fewer = choose_plan(request, capped);
            CHECK(fewer.schedule != Schedule::stream || int64_t(fewer.groups) * fewer.splits <= 100);
            Request alone = request;
            alone.cooperative = false;
            const Plan without = choose_plan(alone, h200);
            CHECK(without.schedule != Schedule::stream || without.splits == 1);
          }
}

// Checks the traffic beside that of the tensors in the ring.
void test_traffic() {
  Request request{{128, 256, 28 * 28}, DType::bfloat16, Direction::backward, Activation::relu};
  Plan plan = choose_plan(request, h200);
  CHECK(plan.stream.tensors == 2 && plan.tensor_reads == 2 && plan.tensor_writes == 1);
  request.residual = true;
  plan = choose_plan(request, h200);
  CHECK(plan.stream.tensors == 3 && plan.tensor_reads == 3 && plan.tensor_writes == 2);
  request.masked = true;  // as bits, which do not pass through the ring
  plan = choose_plan(request, h200);
  CHECK(plan.stream.tensors == 2 && plan.tensor_reads == 2 + 1.0 / 16 && plan.tensor_writes == 2);
  request.activation = Activation::leaky_relu;
  CHECK(choose_plan(request, h200).tensor_reads == 2 + 2.0 / 16);
}

// Checks that a ring one tile too small is not live, and that its map has no gaps for arrays to overlap.
void test_ring() {
  Request request{{128, 256, 28 * 28}, DType::bfloat16};
  Plan plan = choose_plan(request, h200);
  CHECK(plan.stream.ahead > 0);
  plan.stream.ring_tiles = plan.stream.ahead + 1;
  CHECK(is_live(plan.stream));
  --plan.stream.ring_tiles;
  CHECK(!is_live(plan.stream));

  const BackwardMap map(plan);
  const std::vector<int64_t> ends = {0,
                                     map.full.end(),
                                     map.empty.end(),
                                     map.prepared.end(),
                                     map.summed.end(),
                                     map.ready.end(),
                                     map.totals.end(),
                                     map.channels.end(),
                                     map.partials.end(),
                                     map.fields.end(),
                                     map.is_far.end()};
  const std::vector<int64_t> begins = {map.full.offset,   map.empty.offset,  map.prepared.offset, map.summed.offset,
                                       map.ready.offset,  map.totals.offset, map.channels.offset, map.partials.offset,
                                       map.fields.offset, map.is_far.offset, map.ring.offset};
  for (size_t i = 0; i < begins.size(); ++i) CHECK(begins[i] >= ends[i] && begins[i] < ends[i] + 16);
  CHECK(map.totals.offset % 16 == 0 && map.channels.offset % 8 == 0 && map.partials.offset % 16 == 0);
  CHECK(map.fields.offset % 16 == 0 && map.ring.offset % 16 == 0);
}

}  // namespace

int main() {
  test_plans_are_live();
  test_what_is_not_streamed();
  test_tiles();
  test_resnet50();
  test_traffic();
  test_ring();
  return fastbn::test::result();
}
