#define FASTBN_ISA avx2
#include "vec_math.inl"
