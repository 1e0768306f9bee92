// FASTBN_INLINE: compiled for host and device, and always inlined, so that a function takes the instruction set of the
// loop that calls it.
#pragma once

#ifdef __CUDACC__
#define FASTBN_INLINE __host__ __device__ __forceinline__
#else
#define FASTBN_INLINE inline __attribute__((always_inline))
#endif
