// Compiles the checks of the bindings with this folder's tensors.
#include "bindings/arguments.cpp"
