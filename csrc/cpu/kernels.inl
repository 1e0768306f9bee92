// The table of leaf loops for the instruction set FASTBN_ISA, which names the namespace that all of them are in: a
// function outside it that were not inlined could be taken by the linker for machines without those instructions.
#include "cpu/elementwise.h"
#include "cpu/sums.h"

namespace fastbn::cpu::FASTBN_ISA {

template <class T>
constexpr Kernels table{
    pivots<T>,           channel_sums<T>,      column_sums<T>,
    normalize<T, false>, normalize<T, true>,   channel_grad_sums<T>,
    column_grad_sums<T>, input_grad<T, false>, input_grad<T, true>,
};

const Kernels& kernels(DType dtype) {
  switch (dtype) {
    case DType::float32: return table<float>;
    case DType::float64: return table<double>;
    case DType::bfloat16: return table<bfloat16>;
    default: return table<float16>;
  }
}

}  // namespace fastbn::cpu::FASTBN_ISA
