// FASTBN_INLINE: compiled for host and device, and always inlined, so that a function takes the instruction set of the
// loop that calls it; FASTBN_INLINE_LAMBDA stands behind the parameters of a lambda for the same. FASTBN_UNROLL stands
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
