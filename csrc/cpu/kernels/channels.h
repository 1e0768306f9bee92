// Per-channel work: the formulas of moments.h and affine.h on chunks of channels, in loops that compilers vectorise for
// FASTBN_ISA. For few, very wide rows this is most of the work.
#pragma once

#include "cpu/kernels/kernels.h"
#include "math/affine.h"
#include "math/moments.h"

namespace fastbn::cpu::FASTBN_ISA {

template <class A>
void moments_of_chunk(const void* pivots, ConstColumnSums sums, double count, Chunk& chunk) {
  const A* const pivot = static_cast<const A*>(pivots) + chunk.first;
  const double *const first = sums.first + chunk.first, *const second = sums.second + chunk.first;
  for (int64_t i = 0; i < chunk.channels; ++i) {
    const Moments moments = Moments::from_shifted(count, double(pivot[i]), first[i], second[i]);
    chunk.mean[i] = moments.mean;
    chunk.var[i] = moments.var();
    chunk.unbiased_var[i] = moments.unbiased_var();
    if constexpr (std::is_same_v<A, double>) chunk.mean_rest[i] = Moments::rest_of_mean(count, pivot[i], first[i]);
  }
}

inline void inv_std_of_chunk(double eps, Chunk& chunk) {
  for (int64_t i = 0; i < chunk.channels; ++i) chunk.inv_std[i] = inv_std_of(chunk.var[i], eps);
}

template <class A>
void affine_of_chunk(const Chunk& chunk, void* coefficients) {
  auto& [pivot, scale, shift] = *static_cast<ChunkCoefficients<A, 3>*>(coefficients);
  for (int64_t i = 0; i < chunk.channels; ++i) {
    // The rounding error of the mean is far below the precision of float elements.
    const double mean_rest = std::is_same_v<A, double> ? chunk.mean_rest[i] : 0;
    const auto affine = Affine<A>::make(chunk.mean[i], chunk.inv_std[i], chunk.weight[i], chunk.bias[i], mean_rest);
    pivot[i] = affine.pivot;
    scale[i] = affine.scale;
    shift[i] = affine.shift;
  }
}

template <class A>
void grad_pivots_of_chunk(const Chunk& chunk, void* pivots) {
  A* const pivot = static_cast<A*>(pivots) + chunk.first;
  for (int64_t i = 0; i < chunk.channels; ++i)
    pivot[i] = A(std::is_same_v<A, double> ? chunk.mean[i] : grad_pivot_of(chunk.mean[i], chunk.inv_std[i]));
}

template <class A>
void grad_sums_of_chunk(const void* pivots, ConstColumnSums sums, Chunk& chunk) {
  const A* const pivot = static_cast<const A*>(pivots) + chunk.first;
  const double *const first = sums.first + chunk.first, *const second = sums.second + chunk.first;
  for (int64_t i = 0; i < chunk.channels; ++i) {
    chunk.sum_grad[i] = first[i];
    chunk.sum_grad_xhat[i] = sum_grad_xhat_of(first[i], second[i], double(pivot[i]), chunk.mean[i], chunk.inv_std[i]);
  }
}

template <class A>
void grad_affine_of_chunk(const Chunk& chunk, double count, bool is_far, void* coefficients) {
  auto& [pivot, slope, mean_grad, rest, scale] = *static_cast<ChunkCoefficients<A, 5>*>(coefficients);
  for (int64_t i = 0; i < chunk.channels; ++i) {
    const auto affine = GradAffine<A>::make(chunk.mean[i], chunk.inv_std[i], chunk.weight[i], chunk.sum_grad[i],
                                            chunk.sum_grad_xhat[i], count, is_far);
    pivot[i] = affine.pivot;
    slope[i] = affine.slope;
    mean_grad[i] = affine.mean_grad;
    rest[i] = affine.rest;
    scale[i] = affine.scale;
  }
}

}  // namespace fastbn::cpu::FASTBN_ISA
