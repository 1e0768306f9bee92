// The shared math against what it is defined by: half conversions against every value, moments of hard data, layouts
// and formats against torch's rules, traffic of plans.
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "math/affine.h"
#include "math/moments.h"
#include "math/types.h"
#include "plan/plan.h"

using namespace fastbn;

namespace {

void test_float16_round_trips() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float16 half{uint16_t(bits)};
    const float value = to_acc(half);
    if (value == value) CHECK(from_acc<float16>(value).bits == bits);
    const int exponent = int(bits >> 10 & 31), fraction = int(bits & 1023);
    if (exponent < 31) {
      const double magnitude =
          exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(double(fraction), -24);
      CHECK(double(value) == (bits >> 15 ? -magnitude : magnitude));
    } else {
      CHECK(fraction ? value != value : std::isinf(value));
    }
  }
}

void test_halves_round_to_nearest_even() {
  // Between every two neighbours: below, at and above the middle.
  for (uint32_t bits = 0; bits < 0x7bff; ++bits) {
    const float low = to_acc(float16{uint16_t(bits)}), high = to_acc(float16{uint16_t(bits + 1)});
    const float middle = (low + high) / 2;
    CHECK(from_acc<float16>(std::nextafterf(middle, low)).bits == bits);
    CHECK(from_acc<float16>(std::nextafterf(middle, high)).bits == bits + 1);
    CHECK(from_acc<float16>(middle).bits == bits + (bits & 1));
  }
  CHECK(from_acc<float16>(65520.0f).bits == 0x7c00);
  CHECK(from_acc<float16>(65519.99f).bits == 0x7bff);
  for (uint32_t bits = 0; bits < 0x7f7f; ++bits) {
    const float middle = bit_cast<float>(bits << 16 | 0x8000u);
    CHECK(from_acc<bfloat16>(middle).bits == bits + (bits & 1));
    CHECK(from_acc<bfloat16>(std::nextafterf(middle, 0)).bits == bits);
  }
  const float nan = std::numeric_limits<float>::quiet_NaN();
  CHECK(to_acc(from_acc<bfloat16>(nan)) != to_acc(from_acc<bfloat16>(nan)));
  CHECK(to_acc(from_acc<float16>(nan)) != to_acc(from_acc<float16>(nan)));
}

Moments moments_of(const std::vector<double>& values) {
  double sum = 0, squares = 0;
  for (double value : values) {
    sum += value - values[0];
    squares += (value - values[0]) * (value - values[0]);
  }
  return Moments::from_shifted(double(values.size()), values[0], sum, squares);
}

void test_moments() {
  for (double constant : {0.0, 1.0, -1e30, 1e7 + 1, 0.1}) {
    const Moments moments = moments_of(std::vector<double>(1000, constant));
    CHECK(moments.mean == constant && moments.m2 == 0);
  }
  const Moments small = moments_of({1e8, 1e8 + 1, 1e8 + 2});
  CHECK(small.mean == 1e8 + 1 && std::abs(small.m2 - 2) < 1e-6);
  CHECK(small.var() * 3 == small.unbiased_var() * 2);
  const double inf = std::numeric_limits<double>::infinity();
  CHECK(moments_of({1, inf, 2}).mean == inf);
  CHECK(std::isnan(moments_of({1, inf, 2}).m2));
  CHECK(std::isnan(moments_of({inf, -inf}).mean));
  CHECK(std::isnan(Moments({1, 3, 0}).unbiased_var()));
  CHECK(averaging_factor(false, 0, 4) == 0.25 && averaging_factor(false, 0, 0) == 0);
  CHECK(averaging_factor(true, 2, 9) == 2);
}

// A float32 mean is off by up to half an ulp; the affine form gives that back.
void test_affine_keeps_the_rounding_of_the_mean() {
  const double mean = 10000.00031, inv_std = 100;
  const auto affine = Affine<float>::make(mean, inv_std, 1, 0);
  for (float x : {9999.99f, 10000.0f, 10000.01f})
    CHECK(std::abs(double(affine.apply(x)) - (double(x) - mean) * inv_std) < 1e-6);
  const auto grad = GradAffine<float>::make(mean, inv_std, 1, 4, 8, 4);
  const double xhat = (10000.01f - mean) * inv_std;
  CHECK(std::abs(double(grad.apply(3.0f, 10000.01f)) - (3 - 1 - xhat * 2) * inv_std) < 1e-3);
}

// The rounding of the mean of the gradients too, where all of them are nearly the same.
void test_gradients_keep_the_rounding_of_their_mean() {
  const double mean_grad = 300.30003, count = 8;
  const auto grad = GradAffine<float>::make(0, 2, 1, mean_grad * count, 0, count);
  CHECK(double(float(mean_grad)) != mean_grad);
  for (float g : {300.3f, 300.29997f, 300.3003f})
    CHECK(std::abs(double(grad.apply(g, 0.0f)) - (double(g) - mean_grad) * 2) < 1e-9);
}

// Squares of standard deviations leave the range of float, and differences from the mean do.
void test_coefficients_at_the_ends_of_the_range() {
  for (double std : {1e-30, 1e-21, 1e21, 1e30, 1e37}) {
    for (double mean : {0.0, 100 * std}) {
      const float x = float(mean + 1.5 * std), g = 0.75f;
      const double xhat = (double(x) - mean) / std;
      const auto affine = Affine<float>::make(mean, 1 / std, 2, 0.5);
      CHECK(mean > 3e38 || std::abs(double(affine.apply(x)) - (xhat * 2 + 0.5)) < 1e-6);
      const auto grad = GradAffine<float>::make(mean, 1 / std, 2, 1, 3, 4, true);
      const double expected = (g - 0.25 - xhat * 0.75) * 2 / std;
      CHECK(mean > 3e38 || std::abs(double(grad.apply_far(g, x)) - expected) < 1e-6 * 2 / std);
      CHECK(is_far_from_one(1 / std));
    }
  }
  // 3 in 4 elements are the largest number, the others the least one.
  const double largest = std::numeric_limits<float>::max(), mean = largest / 2;
  const double inv_std = 2 / (std::sqrt(3.0) * largest);
  const auto affine = Affine<float>::make(mean, inv_std, 1, 0);
  CHECK(std::abs(double(affine.apply(float(largest))) - 0.57735027) < 1e-6);
  CHECK(std::abs(double(affine.apply(float(-largest))) + 1.73205081) < 1e-6);
  const auto grad = GradAffine<float>::make(mean, inv_std, 1, 0, 4, 4, true);
  CHECK(std::abs(double(grad.apply_far(0.0f, float(-largest))) / (1.73205081 * inv_std) - 1) < 1e-6);
  for (double ordinary : {0.0, 1.0, 316.0, HUGE_VAL, double(NAN)}) CHECK(!is_far_from_one(ordinary));
  CHECK(grad_pivot_of(mean, inv_std) == 0 && grad_pivot_of(1, 1) == 1);
  const double near_largest = 0.9999999 * largest, steps = grad_pivot_of(near_largest, 1e-30);
  CHECK(std::isfinite(float(steps)) && grad_pivot_of(largest, 0.9e-37) <= largest);
}

void test_what_rounding_a_mean_loses() {
  const double pivot = 1e6, sum = 1.0, count = 3;
  const Moments moments = Moments::from_shifted(count, pivot, sum, 1);
  const double rest = Moments::rest_of_mean(count, pivot, sum);
  CHECK(moments.mean + rest == moments.mean && rest != 0);
  CHECK((moments.mean - pivot) + rest == sum / count);
  const auto affine = Affine<double>::make(moments.mean, 1e6, 1, 0, rest);
  CHECK(std::abs(affine.apply(pivot) + 1e6 / 3) < 1e-10);
  const double inf = std::numeric_limits<double>::infinity();
  CHECK(Moments::rest_of_mean(2, 1, inf) == 0);
}

// Near the mean, and such that float differences from it are exact, of an x farther from zero than the mean.
void test_gradient_pivots() {
  for (double inv_std : {1e-6, 0.3, 1.0, 1.7, 316.0, 1e9}) {
    for (double deviations : {-3e4, -1.0, 1e-9, 0.7, 100.0}) {
      const double mean = deviations / inv_std, pivot = grad_pivot_of(mean, inv_std);
      CHECK(std::fabs(pivot - mean) * inv_std <= 1.0 / 16);
      CHECK(double(float(pivot)) == pivot);
      const float x = float(mean + std::copysign(1.2345, mean) / inv_std);
      CHECK(double(x - float(pivot)) == double(x) - pivot);
    }
  }
  const double inf = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  for (double inv_std : {0.0, 1e-310, inf, nan}) CHECK(grad_pivot_of(0.1, inv_std) == 0.1);
  CHECK(grad_pivot_of(1e30, 1) == 1e30 && grad_pivot_of(inf, 1) == inf && std::isnan(grad_pivot_of(nan, 1)));
}

void test_layouts() {
  const int64_t sizes[] = {2, 3, 4, 5};
  const int64_t contiguous[] = {60, 20, 5, 1}, last[] = {60, 1, 15, 3}, transposed[] = {60, 20, 1, 4};
  CHECK(suggest_memory_format(sizes, contiguous, 4) == MemoryFormat::contiguous);
  CHECK(suggest_memory_format(sizes, last, 4) == MemoryFormat::channels_last);
  CHECK(suggest_memory_format(sizes, transposed, 4) == MemoryFormat::contiguous);
  CHECK(is_dense(sizes, contiguous, 4, MemoryFormat::contiguous) &&
        !is_dense(sizes, last, 4, MemoryFormat::contiguous));
  CHECK(is_dense(sizes, last, 4, MemoryFormat::channels_last));
  CHECK(!is_dense(sizes, transposed, 4, MemoryFormat::contiguous));

  // The stride of a dimension of size 1 says nothing where the others do; of an ambiguous tensor it decides.
  const int64_t column[] = {2, 3, 4, 1}, odd[] = {12, 1, 3, 1}, gaps[] = {24, 1, 6, 1}, pixel[] = {2, 3, 1, 1};
  const int64_t ambiguous[] = {3, 1, 1, 1}, ambiguous_last[] = {3, 1, 3, 3};
  CHECK(suggest_memory_format(column, odd, 4) == MemoryFormat::channels_last);
  CHECK(suggest_memory_format(column, gaps, 4) == MemoryFormat::contiguous);
  CHECK(suggest_memory_format(pixel, ambiguous, 4) == MemoryFormat::contiguous);
  CHECK(suggest_memory_format(pixel, ambiguous_last, 4) == MemoryFormat::channels_last);
  const int64_t empty[] = {2, 3, 0, 5};
  CHECK(suggest_memory_format(empty, last, 4) == MemoryFormat::contiguous);
  CHECK(is_dense(empty, transposed, 4, MemoryFormat::contiguous));
  CHECK(extent_of(sizes, last, 4) == 120 && extent_of(column, gaps, 4) == 24 + 2 + 18 + 1);
  CHECK(extent_of(empty, last, 4) == 0);

  const Layout nchw = layout_of(sizes, 4, MemoryFormat::contiguous);
  CHECK(nchw.runs() == 6 && nchw.run() == 20 && nchw.mask_bytes_per_run() == 3 && nchw.count() == 40);
  const Layout nhwc = layout_of(sizes, 4, MemoryFormat::channels_last);
  CHECK(nhwc.runs() == 40 && nhwc.run() == 3 && nhwc.mask_bytes_per_run() == 1 && nhwc.count() == 40);
  const int64_t one[] = {2, 1, 4, 5};
  CHECK(layout_of(one, 4, MemoryFormat::channels_last).runs() == 1);
}

void test_two_phase_plans() {
  const DeviceLimits h200 = known_devices[2];
  // A channel is 256 MB, in runs that cannot be visited in any order.
  Request request{{128, 3, 1024 * 1024}, DType::bfloat16};
  Plan plan = choose_plan(request, h200);
  CHECK(plan.schedule == Schedule::two_phase && plan.cluster == 1 && plan.launches == 3);
  CHECK(plan.kernel == Kernel::channel_blocks && plan.vectorized && plan.splits > 1);
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
      CHECK(rows.kernel == Kernel::row_blocks && rows.splits >= 1 && rows.splits <= 1024);
      CHECK(rows.slices * rows.slice_channels >= channels);
    }
}

// Rows that are whole octets where runs are not.
void test_walks() {
  const DeviceLimits h200 = known_devices[2];
  const auto plan_of = [&](Layout layout, bool masked, bool aligned) {
    Request request{layout, DType::bfloat16};
    request.masked = masked;
    request.aligned = aligned;
    return choose_plan(request, h200);
  };
  const auto check_rows = [&](const Plan& p, int lanes, int fold, int slice_channels) {
    CHECK(p.kernel == Kernel::row_blocks && p.vectorized);
    CHECK_EQUAL(p.lanes, lanes);
    CHECK_EQUAL(p.fold, fold);
    CHECK_EQUAL(p.slice_channels, slice_channels);
  };
  check_rows(plan_of({32, 512, 7 * 7}, false, true), 49, 1, 8);
  check_rows(plan_of({32, 256, 14 * 14}, false, true), 49, 1, 2);
  check_rows(plan_of({32, 64, 4 * 4}, true, true), 8, 1, 4);  // its mask has whole bytes a run
  check_rows(plan_of({1000, 3, 1}, false, true), 3, 8, 3);
  check_rows(plan_of({1000, 100, 1}, false, true), 25, 2, 100);
  check_rows(plan_of({64, 5, 9}, false, true), 45, 8, 5);
  for (bool masked : {false, true}) {
    CHECK(plan_of({32, 64, 56 * 56}, masked, true).kernel == Kernel::channel_blocks);
    CHECK(!plan_of({32, 512, 49}, masked, masked).vectorized);  // masked, or not aligned
    CHECK(!plan_of({1000, 3, 1}, masked, masked).vectorized);
    CHECK(!plan_of({1000, 1001, 1}, masked, true).vectorized);
    CHECK(!plan_of({32, 64, 35 * 35}, masked, true).vectorized);  // more octets than a block has threads
  }
}

// Statistics are the same bits whatever comes after them: a forward's plan follows from neither residual nor mask, but
// for a mask that would begin in the middle of an octet.
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
            request.masked = masked && request.layout.run() % octet == 0;
            const Plan plan = choose_plan(request, limits);
            CHECK(plan.schedule == bare.schedule && plan.groups == bare.groups && plan.splits == bare.splits);
            CHECK(plan.lanes == bare.lanes && plan.fold == bare.fold && plan.cluster == bare.cluster);
            CHECK(plan.tensor_reads == bare.tensor_reads + 1);
          }
        }
}

void test_resident_plans() {
  const DeviceLimits h200 = known_devices[2], a100 = known_devices[0];
  // Eight channels of 128 x 7 x 7 bfloat16 are 100 KB: a cluster of two. One channel of 256 x 56 x 56 is 1.6 MB, and of
  // 256 x 112 x 112 6.4 MB: many blocks of a cooperative grid.
  Plan plan = choose_plan({{128, 512, 7 * 7}, DType::bfloat16}, h200);
  CHECK(plan.schedule == Schedule::resident && plan.cluster == 2 && plan.launches == 1 && plan.slices == 64);
  CHECK(plan.tensor_reads == 1 && plan.tensor_writes == 1 && plan.shared_bytes <= h200.shared_bytes_per_block);
  // A chip without clusters keeps in blocks of a grid what others keep in clusters.
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
  CHECK(plan.schedule == Schedule::cooperative && plan.tensors == 2 && plan.launches == 1);
  CHECK(plan.tensor_reads == 2 + 2.0 / 16 && plan.tensor_writes == 2);
  request.masked = false;
  request.activation = Activation::silu;
  plan = choose_plan(request, h200);
  CHECK(plan.launches == 1 && plan.tensors == 3 && plan.tensor_reads == 3);
  request.fused = false;
  CHECK(choose_plan(request, h200).schedule == Schedule::two_phase);
  CHECK(choose_plan({{0, 512, 49}, DType::bfloat16}, h200).schedule == Schedule::two_phase);
  // Three channels fill three clusters of 132 multiprocessors, unless they are so small that launches are what counts.
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
              CHECK(p.cluster == p.splits && p.cluster <= h200.max_cluster && p.groups == p.slices);
            } else {
              // All blocks fit at once.
              const int64_t blocks = p.groups * p.splits, together = (blocks + h200.sm_count - 1) / h200.sm_count;
              CHECK(p.cluster == 1 && p.splits > 1 && p.groups <= p.slices);
              CHECK(together * (p.shared_bytes + 1024) <= h200.shared_bytes_per_block + 1024);
              CHECK(together <=
                    blocks_together(element_size(dtype), p.kernel, direction == Direction::backward, p.vectorized));
            }
            // Every element has a slot, or the slots of one group's rows come round in whole stages.
            const Layout layout{outer, channels, inner};
            CHECK(p.slices * p.slice_channels >= channels);
            if (p.kept == 1) {
              CHECK(int64_t(p.slots) * (p.threads / p.lanes) * p.splits >= p.places(layout) && p.from_memory == 0);
            } else {
              CHECK(p.groups == 1 && p.kernel == Kernel::row_blocks && p.slots > 0 &&
                    p.slots == copy_stages * p.slots_a_stage);
              CHECK(p.kept > 0 && p.kept < 1 && p.from_memory >= 0 && p.from_memory < 1 - p.kept);
            }
            CHECK(p.kernel == Kernel::channel_blocks || p.slices == 1 ||
                  p.lanes * octet * element_size(dtype) >= narrowest_bytes);
          }
}

void test_plans_that_keep_a_part() {
  const DeviceLimits h200 = known_devices[2];
  // Of two tensors of 103 MB, 17 MB are on chip, 31 MB in half of L2, and the rest comes from memory again.
  Request request{{128 * 56 * 56, 64, 1}, DType::bfloat16, Direction::backward};
  Plan plan = choose_plan(request, h200);
  CHECK(plan.schedule == Schedule::cooperative && plan.groups == 1 && plan.slices == 1 && plan.launches == 1);
  CHECK(plan.slots == 16 && plan.slots == copy_stages * plan.slots_a_stage);
  CHECK_NEAR(plan.kept, 16 / 96.0, 0.01);
  CHECK_NEAR(plan.tensor_reads, 2 + 2 * (1 - 16 / 96.0 - 31.5 / 102.8), 0.02);
  // It does not pay where more is read or written, and in forward, whose plans follow from nothing that comes after.
  request.dtype = DType::float32;
  CHECK(choose_plan(request, h200).kept == 1);
  request.dtype = DType::bfloat16;
  request.activation = Activation::relu;
  CHECK(choose_plan(request, h200).kept < 1);
  request.masked = true;
  CHECK(choose_plan(request, h200).kept == 1);
  CHECK(choose_plan({request.layout, DType::bfloat16}, h200).kept == 1);
  // A chip without room for a stage of two octets has no such plan.
  request.masked = false;
  DeviceLimits small = h200;
  small.shared_bytes_per_block = 48 << 10;
  CHECK(choose_plan(request, small).schedule == Schedule::two_phase);
}

}  // namespace

int main() {
  test_float16_round_trips();
  test_halves_round_to_nearest_even();
  test_moments();
  test_affine_keeps_the_rounding_of_the_mean();
  test_gradients_keep_the_rounding_of_their_mean();
  test_coefficients_at_the_ends_of_the_range();
  test_what_rounding_a_mean_loses();
  test_gradient_pivots();
  test_layouts();
  test_two_phase_plans();
  test_walks();
  test_forward_plans_ignore_the_epilogue();
  test_resident_plans();
  test_plans_that_keep_a_part();
  return fastbn::test::result();
}
