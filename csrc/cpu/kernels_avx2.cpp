// The leaf loops for the avx2 instruction set.
#include "cpu/isa_headers.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define FASTBN_ISA avx2
#include "cpu/kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
