// The table of leaf loops for the instruction set FASTBN_ISA, which names the namespace that all of them are in: a
// function outside it that were not inlined could be taken by the linker for machines without those instructions.
#include "cpu/kernels/channels.h"
#include "cpu/kernels/gradient.h"
#include "cpu/kernels/normalize.h"
#include "cpu/kernels/relu_interval.h"
#include "cpu/kernels/sums.h"

namespace fastbn::cpu::FASTBN_ISA {

template <class T>
constexpr Kernels table{
    min_streamed_bytes_per_thread,
    interleaved<T> ? 2 : 1,
    pivots<T>,
    moments_of_chunk<acc_t<T>>,
    inv_std_of_chunk,
    affine_of_chunk<acc_t<T>>,
    grad_pivots_of_chunk<acc_t<T>>,
    grad_sums_of_chunk<acc_t<T>>,
    grad_affine_of_chunk<acc_t<T>>,
    interleaved<T> ? relu_intervals : nullptr,
    channel_sums<T, Terms<T>>,
    column_sums<T, Terms<T>>,
    channel_sums<T, DoubleTerms<T>>,
    column_sums<T, DoubleTerms<T>>,
    normalize_tile<T, false>,
    normalize_tile<T, true>,
    channel_grad_sums<T, GradTerms<T>>,
    column_grad_sums<T, GradTerms<T>>,
    channel_grad_sums<T, DoubleTerms<T>>,
    column_grad_sums<T, DoubleTerms<T>>,
    channel_grad_sums<T, GradTerms<T>, FrozenGrad>,
    column_grad_sums<T, GradTerms<T>, FrozenGrad>,
    input_grad_tile<T, false>,
    input_grad_tile<T, true>,
};

const Kernels& kernels(DType dtype) {
#if defined(__AVX512BF16__)
  // Only bfloat16 has more instructions than with AVX-512.
  return dtype == DType::bfloat16 ? table<bfloat16> : avx512::kernels(dtype);
#else
  switch (dtype) {
    case DType::float32: return table<float>;
    case DType::float64: return table<double>;
    case DType::bfloat16: return table<bfloat16>;
    case DType::float16: return table<float16>;
  }
  __builtin_unreachable();
#endif
}

}  // namespace fastbn::cpu::FASTBN_ISA
