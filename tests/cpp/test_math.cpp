// Checks the shared math against its definitions: half conversions of every value, moments of hard data, layouts and
// formats by torch's rules.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "math/affine.h"
#include "math/layout.h"
#include "math/moments.h"
#include "math/pivot.h"
#include "math/types.h"

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
  // These lie below, at and above the middle of every two neighbours.
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

// Checks that the affine form corrects the rounding of a float32 mean, which is off by up to half an ulp.
void test_affine_keeps_the_rounding_of_the_mean() {
  const double mean = 10000.00031, inv_std = 100;
  const auto affine = Affine<float>::make(mean, inv_std, 1, 0);
  for (float x : {9999.99f, 10000.0f, 10000.01f})
    CHECK(std::abs(double(affine.apply(x)) - (double(x) - mean) * inv_std) < 1e-6);
  const auto grad = GradAffine<float>::make(mean, inv_std, 1, 4, 8, 4);
  const double xhat = (10000.01f - mean) * inv_std;
  CHECK(std::abs(double(grad.apply(3.0f, 10000.01f)) - (3 - 1 - xhat * 2) * inv_std) < 1e-3);
}

// Checks that the rounding of the mean gradient is corrected too, where all gradients are nearly equal.
void test_gradients_keep_the_rounding_of_their_mean() {
  const double mean_grad = 300.30003, count = 8;
  const auto grad = GradAffine<float>::make(0, 2, 1, mean_grad * count, 0, count);
  CHECK(double(float(mean_grad)) != mean_grad);
  for (float g : {300.3f, 300.29997f, 300.3003f})
    CHECK(std::abs(double(grad.apply(g, 0.0f)) - (double(g) - mean_grad) * 2) < 1e-9);
}

// Checks coefficients where squares of the standard deviation, or differences from the mean, leave the range of float.
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
  // 3 in 4 elements are the largest number, the others the smallest.
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

void test_rounding_error_of_a_mean() {
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

void test_median_of_five() {
  const double inf = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  const double largest = std::numeric_limits<double>::max();
  double x[] = {-2, -1, 0.5, 1, 3};
  do CHECK(median(x) == 0.5);
  while (std::next_permutation(x, x + 5));
  for (double value : {inf, -inf, nan}) CHECK(finite_sample(value) == 0 && finite_sample(float(value)) == 0);
  CHECK(finite_sample(largest) == largest && finite_sample(-0.5f) == -0.5f);
}

void test_samples_of_pivots_lie_in_one_channel_and_off_its_ends() {
  for (const Layout layout : {Layout{1, 3, 5}, {5, 3, 1}, {2, 4, 49}, {1, 1, 1}, {7, 2, 3}, {32, 3, 3136}}) {
    for (int i = 0; i < pivot_samples; ++i) {
      const int64_t sample = pivot_sample(layout, i), run = sample / layout.inner, inner = sample % layout.inner;
      CHECK(run % layout.channels == 0 && run / layout.channels < layout.outer);
      if (layout.inner >= 10) CHECK(inner > 0 && inner < layout.inner - 1);
      if (layout.outer >= 10) CHECK(run > 0 && run / layout.channels < layout.outer - 1);
    }
  }
}

// Checks that the pivot is near the mean, and that float differences from it are exact for x farther from zero than the
// mean.
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

  // The stride of a dimension of size 1 does not matter unless the other dimensions are ambiguous; then it decides.
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

}  // namespace

int main() {
  test_float16_round_trips();
  test_halves_round_to_nearest_even();
  test_moments();
  test_affine_keeps_the_rounding_of_the_mean();
  test_gradients_keep_the_rounding_of_their_mean();
  test_coefficients_at_the_ends_of_the_range();
  test_rounding_error_of_a_mean();
  test_median_of_five();
  test_samples_of_pivots_lie_in_one_channel_and_off_its_ends();
  test_gradient_pivots();
  test_layouts();
  return fastbn::test::result();
}
