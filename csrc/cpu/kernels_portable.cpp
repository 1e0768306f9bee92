// The leaf loops for the baseline instruction set.
#include "cpu/isa_headers.h"

#define FASTBN_ISA portable
#include "cpu/kernels.inl"
