#define FASTBN_ISA avx512_bf16
#include "vec_math.inl"
