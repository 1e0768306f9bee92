#define FASTBN_ISA avx512
#include "vec_math.inl"
