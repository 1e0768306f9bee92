// The leaf loops for the compiler's baseline.
#define FASTBN_ISA portable
#include "cpu/kernels/kernels.inl"
