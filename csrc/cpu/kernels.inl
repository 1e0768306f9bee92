// The table of leaf loops for the instruction set FASTBN_ISA. Included last by kernels_*.cpp, after the standard headers
// and after the pragma that selects the instruction set, so that no shared inline function is compiled for it.
#include "cpu/elementwise.h"
#include "cpu/sums.h"

namespace fastbn::cpu::FASTBN_ISA {

template <class T>
constexpr Kernels table{
    pivots<T>,            channel_sums<T>,     column_sums<T>,       normalize<T, false>,  normalize<T, true>,
    channel_grad_sums<T>, column_grad_sums<T>, input_grad<T, false>, input_grad<T, true>,
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
