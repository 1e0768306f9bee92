// The leaf loops of bfloat16 for AVX-512 BF16 beside F, BW, DQ and VL; the build gives this file their flags.
#ifndef __AVX512BF16__
#error "compile with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512bf16 -mfma -mf16c"
#endif
#define FASTBN_ISA avx512_bf16
#include "cpu/kernels/kernels.inl"
