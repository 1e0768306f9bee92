#define FASTBN_ISA portable
#include "vec_math.inl"
