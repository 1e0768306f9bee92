// All of this folder as one translation unit. Reading torch's headers takes most of the time, and this reads them once:
// 18 s instead of 45.
#include "node/arguments.cpp"
#include "node/function.cpp"
#include "node/memory.cpp"
#include "node/node.cpp"
#include "node/ops.cpp"
