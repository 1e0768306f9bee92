// The leaf loops of the CPU backend: each handles one block of one tensor on one thread, and exists once for every
// instruction set and element type. Partition, threads and merging are in forward.cpp and backward.cpp.
#pragma once

#include <cstdint>

#include "math/activation.h"
#include "math/affine.h"
#include "math/layout.h"
#include "math/types.h"

namespace fastbn::cpu {

// Rows of contiguous elements. A block's rows are runs of one channel, or of one channel after the other; or its
// columns are channels. What sums are taken of may be several such blocks of one channel each, side by side.
struct Block {
  int64_t offset;  // of the first element, in elements
  int64_t rows;
  int64_t row_stride;  // in elements
  int64_t cols;
  int64_t channel_step = 0;  // from row to row
  int64_t channels = 1;      // side by side, at most most_channels
  bool far = false;          // of a tensor that a core's caches do not hold
};

constexpr int64_t most_channels = 64;  // an estimate: so many sums are kept on the stack

// Where a block's mask lies. A run starts at a byte of its own; a row of the block is one run, part of one, or several.
struct MaskBlock {
  int64_t offset = 0;  // in bytes
  int64_t row_stride = 0;
  int64_t run = 0;  // in elements
};

// Arrays of acc_t<T>: an element for each of the block's channels or columns, those of columns by planes
// (coefficients.h) where the kernels' column_planes is 2: even ones from 0, odd ones from `plane` on. Members are those
// of Affine.
struct AffineArrays {
  const void* pivot = nullptr;
  const void* scale = nullptr;
  const void* shift = nullptr;
  int64_t plane = 0;
};

// Likewise for GradAffine, whose pivot is Affine's.
struct GradAffineArrays {
  const void* slope = nullptr;
  const void* mean_grad = nullptr;
  const void* rest = nullptr;
  const void* scale = nullptr;
  int64_t plane = 0;
};

// Where relu's derivative is 1, for each channel or column: at x whose bits, less `first`, modulo 2^16, are at most
// `span` (relu_interval.h).
struct ReluIntervals {
  const uint16_t* first = nullptr;
  const uint16_t* span = nullptr;
};

using FindReluIntervals = void(const AffineArrays& affine, int64_t channels, uint16_t* first, uint16_t* span);

struct NormalizeArgs {
  const void* input;
  const void* residual;
  void* output;
  uint8_t* mask;
  Activation activation;
  AffineArrays affine;
  bool past_caches;  // how to store the output
};

struct GradArgs {
  const void* grad_out;
  const void* input;
  const void* residual;
  const uint8_t* mask;
  Activation activation;
  const void* pivot;             // of sums
  AffineArrays affine;           // recomputes z, where the activation needs it; and the pivot of input_grad
  GradAffineArrays grad_affine;  // of input_grad; a null slope says that statistics are frozen
  void* grad_input;
  void* grad_residual;
  bool past_caches;         // how to store these two
  ReluIntervals relu = {};  // instead of recomputing z, of kernels that have them
  bool is_far = false;      // whether grad_affine is that of apply_far
};

// Partial results of a block: plain sums, so that merging is adding.
struct Sums {
  double first = 0;   // of x - pivot; of grad_z
  double second = 0;  // of (x - pivot)^2; of grad_z * (x - pivot)
};

// Likewise for each channel or column of a block.
struct ColumnSums {
  double* first;
  double* second;
};

struct ConstColumnSums {
  const double* first;
  const double* second;
};

// Per-channel numbers are computed for this many channels at a time, in arrays that fit in L1, by loops that compilers
// vectorise (an estimate).
constexpr int64_t chunk_channels = 64;

// Numbers of channels [first, first + channels), each in double.
struct Chunk {
  int64_t first, channels;
  double mean[chunk_channels], var[chunk_channels], inv_std[chunk_channels], unbiased_var[chunk_channels];
  double mean_rest[chunk_channels] = {};  // what rounding the mean lost
  double weight[chunk_channels], bias[chunk_channels];
  double sum_grad[chunk_channels], sum_grad_xhat[chunk_channels];
};

// Coefficients of a chunk, one array a member, the members in the order of CoefficientTable's.
template <class A, int members>
using ChunkCoefficients = A[members][chunk_channels];

// Sums are added to what is there.
struct Kernels {
  // How much an op has to touch for stores past the caches to pay.
  int64_t streamed_bytes_a_thread;
  // How tables of columns are stored, but for pivots of sums.
  int column_planes;
  // Of each channel in [begin, end) the median of five elements, to entry `channel` of an array of acc_t<T>.
  void (*pivots)(const void* input, const Layout& layout, int64_t begin, int64_t end, void* pivots);
  // Of a chunk: mean, var and unbiased_var from sums of `count` terms about pivots; inv_std from var; the coefficients
  // of Affine<acc_t<T>>. Pivots and sums have an entry for every channel, `coefficients` is a ChunkCoefficients.
  void (*moments)(const void* pivots, ConstColumnSums sums, double count, Chunk& chunk);
  void (*inv_std)(double eps, Chunk& chunk);
  void (*affine)(const Chunk& chunk, void* coefficients);
  // Likewise in backward: pivots, the two sums from those about pivots, the coefficients of GradAffine.
  void (*grad_pivots)(const Chunk& chunk, void* pivots);
  void (*grad_sums)(const void* pivots, ConstColumnSums sums, Chunk& chunk);
  void (*grad_affine)(const Chunk& chunk, double count, bool is_far, void* coefficients);
  // From coefficients of a chunk; null where loops do not use intervals.
  FindReluIntervals* relu_intervals;
  // About pivots, an acc_t<T> a channel or column.
  void (*channel_sums)(const void* input, Block block, const void* pivots, ColumnSums sums);
  void (*column_sums)(const void* input, Block block, const void* pivots, ColumnSums sums);
  // The same without a step in float, for data that it cannot sum well.
  void (*channel_sums_in_double)(const void* input, Block block, const void* pivots, ColumnSums sums);
  void (*column_sums_in_double)(const void* input, Block block, const void* pivots, ColumnSums sums);
  void (*channel_normalize)(const NormalizeArgs& args, Block block, MaskBlock mask);
  void (*column_normalize)(const NormalizeArgs& args, Block block, MaskBlock mask);
  void (*channel_grad_sums)(const GradArgs& args, Block block, MaskBlock mask, ColumnSums sums);
  void (*column_grad_sums)(const GradArgs& args, Block block, MaskBlock mask, ColumnSums sums);
  void (*channel_grad_sums_in_double)(const GradArgs& args, Block block, MaskBlock mask, ColumnSums sums);
  void (*column_grad_sums_in_double)(const GradArgs& args, Block block, MaskBlock mask, ColumnSums sums);
  void (*channel_input_grad)(const GradArgs& args, Block block, MaskBlock mask);
  void (*column_input_grad)(const GradArgs& args, Block block, MaskBlock mask);
};

// Those of the instruction set in use.
const Kernels& kernels(DType dtype);

// The instruction sets that this build holds and this machine can run, best first, and the one in use: the best, or the
// one that the environment variable FASTBN_CPU names (portable, avx2, avx512, avx512_bf16).
const char* const* instruction_sets();
const char* instruction_set();

namespace portable {
const Kernels& kernels(DType dtype);
}
namespace avx2 {
const Kernels& kernels(DType dtype);
}
namespace avx512 {
const Kernels& kernels(DType dtype);
}
namespace avx512_bf16 {
const Kernels& kernels(DType dtype);
}

}  // namespace fastbn::cpu
