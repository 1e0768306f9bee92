// FASTBN_INLINE compiles a function for host and device and always inlines it, so that it takes the instruction set of
// the loop that calls it. FASTBN_INLINE_LAMBDA, after the parameters of a lambda, does the same. FASTBN_UNROLL goes
// before a loop that keeps an array in registers; g++ unrolls on its own.
#pragma once

#ifdef __CUDACC__
#define FASTBN_INLINE __host__ __device__ __forceinline__
#define FASTBN_INLINE_LAMBDA
#define FASTBN_UNROLL _Pragma("unroll")
#else
#define FASTBN_INLINE inline __attribute__((always_inline))
#define FASTBN_INLINE_LAMBDA __attribute__((always_inline))
#define FASTBN_UNROLL
#endif
