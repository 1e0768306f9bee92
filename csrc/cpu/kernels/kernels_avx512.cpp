// The leaf loops for AVX-512 F, BW, DQ and VL; the build gives this file their flags.
#ifndef __AVX512DQ__
#error "compile with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"
#endif
#define FASTBN_ISA avx512
#include "cpu/kernels/kernels.inl"
