// The leaf loops for AVX2, FMA and F16C; the build gives this file their flags.
#ifndef __AVX2__
#error "compile with -mavx2 -mfma -mf16c"
#endif
#define FASTBN_ISA avx2
#include "cpu/kernels/kernels.inl"
