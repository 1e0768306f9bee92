// Leaf loops of the CPU backend. Each processes one tile of one tensor on one thread, and is compiled once per
// instruction set and element type. Partition, threads and merging are in forward.cpp and backward.cpp.
#pragma once

#include <cstdint>

#include "math/activation.h"
#include "math/affine.h"
#include "math/layout.h"
#include "math/types.h"

namespace fastbn::cpu {

// A tile of contiguous rows. With channels outermost, rows belong to one channel, or to consecutive channels; with
// channels innermost, columns are channels. For sums, a tile may consist of several parts side by side, each of one
// channel.
struct Tile {
  int64_t offset;  // to the first element, in elements
  int64_t rows;
  int64_t row_stride;  // in elements
  int64_t cols;
  int64_t channel_step = 0;   // channels from one row to the next
  int64_t channels = 1;       // side by side, at most max_tile_channels
  bool out_of_cache = false;  // whether the tensor is too large for a core's caches
  int64_t channel = 0;        // of the first row among the coefficients, not 0 in parts of a tile alone
};

constexpr int64_t max_tile_channels = 64;  // bounds the sums on the stack (an estimate)

// The position of a tile's mask. A run starts at a byte boundary; a row of the tile is one run, part of one, or
// several.
struct MaskTile {
  int64_t offset = 0;  // in bytes
  int64_t row_stride = 0;
  int64_t run = 0;  // in elements
};

// Entries that tables of columns have beyond those of the tile, since loops load vectors of them: float lanes of the
// widest register. Their values reach no result.
constexpr int64_t table_padding = 16;

// The members of Affine as arrays of acc_t<T>, with an element per channel or column of the tile. If the kernels'
// column_planes is 2, arrays of columns have two planes (coefficients.h): even columns from 0 on, odd ones from `plane`
// on.
struct AffineArrays {
  const void* pivot = nullptr;
  const void* scale = nullptr;
  const void* shift = nullptr;
  int64_t plane = 0;
};

// The members of GradAffine in the same form, except for the pivot, which is Affine's.
struct GradAffineArrays {
  const void* slope = nullptr;
  const void* mean_grad = nullptr;
  const void* rest = nullptr;
  const void* scale = nullptr;
  int64_t plane = 0;
};

// The x for which relu's derivative is 1, per channel or column: those whose bits, minus `first` modulo 2^16, are at
// most `span` (relu_interval.h).
struct ReluIntervals {
  const uint16_t* first = nullptr;
  const uint16_t* span = nullptr;
};

using FindReluIntervals = void(const AffineArrays& affine, int64_t channels, uint16_t* first, uint16_t* span);

// The arguments of loops that write the output of a forward op.
struct NormalizeArgs {
  const void* input;
  const void* residual;
  void* output;
  uint8_t* mask;
  Activation activation;
  double activation_param;
  AffineArrays affine;
  bool non_temporal;  // how to store the output
};

// The arguments of the loops of backward.
struct GradArgs {
  const void* grad_out;
  const void* input;
  const void* residual;
  const uint8_t* mask;
  Activation activation;
  double activation_param;
  const void* pivot;             // of the sums
  AffineArrays affine;           // recomputes z if the activation needs it; has the pivot of input_grad
  GradAffineArrays grad_affine;  // for the input gradient; a null slope means that statistics are frozen
  void* grad_input;
  void* grad_residual;
  bool non_temporal;        // how to store these two
  ReluIntervals relu = {};  // used instead of recomputing z, if present
  bool is_far = false;      // whether grad_affine is for apply_far
};

// Partial sums of a tile, which merge by addition.
struct Sums {
  double first = 0;   // of x - pivot, or of grad_z
  double second = 0;  // of (x - pivot)^2, or of grad_z * (x - pivot)
};

// Partial sums for each channel or column of a tile.
struct ColumnSums {
  double* first;
  double* second;
};

struct ConstColumnSums {
  const double* first;
  const double* second;
};

// Channels whose numbers are computed at a time, in arrays that fit in L1 and in loops that compilers vectorise (an
// estimate).
constexpr int64_t chunk_channels = 64;

// Per-channel numbers of channels [first, first + channels), in double.
struct Chunk {
  int64_t first, channels;
  double mean[chunk_channels], var[chunk_channels], inv_std[chunk_channels], unbiased_var[chunk_channels];
  double mean_rest[chunk_channels];  // rounding error of the mean; 0 if unknown
  double weight[chunk_channels], bias[chunk_channels];
  double sum_grad[chunk_channels], sum_grad_xhat[chunk_channels];
};

// Coefficients of a chunk, one array per member, in the order of CoefficientTable's members.
template <class A, int members>
using ChunkCoefficients = A[members][chunk_channels];

// The table of leaf loops for one element type. Loops that compute sums add them to the values already there.
struct Kernels {
  // Minimum memory traffic of an op, in bytes per thread, for which non-temporal stores pay.
  int64_t min_streamed_bytes_per_thread;
  // Number of planes in tables of columns, except in those of the pivots of sums.
  int column_planes;
  // Writes the median of five elements of each channel in [begin, end) to entry `channel` of an array of acc_t<T>.
  void (*pivots)(const void* input, const Layout& layout, int64_t begin, int64_t end, void* pivots);
  // Compute the forward formulas for a chunk: mean, var and unbiased_var from sums of `count` terms about pivots;
  // inv_std from var; the coefficients of Affine<acc_t<T>>. Pivots and sums have an entry per channel; `coefficients`
  // is a ChunkCoefficients.
  void (*moments)(const void* pivots, ConstColumnSums sums, double count, Chunk& chunk);
  void (*inv_std)(double eps, Chunk& chunk);
  void (*affine)(const Chunk& chunk, void* coefficients);
  // Compute the backward formulas for a chunk: pivots; the two sums from those about pivots; the coefficients of
  // GradAffine.
  void (*grad_pivots)(const Chunk& chunk, void* pivots);
  void (*grad_sums)(const void* pivots, ConstColumnSums sums, Chunk& chunk);
  void (*grad_affine)(const Chunk& chunk, double count, bool is_far, void* coefficients);
  // Finds intervals from the coefficients of a chunk. Null if the loops do not use intervals.
  FindReluIntervals* relu_intervals;
  // Add the sums about pivots, which are one acc_t<T> per channel or column.
  void (*channel_sums)(const void* input, Tile tile, const void* pivots, ColumnSums sums);
  void (*column_sums)(const void* input, Tile tile, const void* pivots, ColumnSums sums);
  // Add the same sums computed entirely in double, for data that float cannot sum accurately.
  void (*channel_sums_in_double)(const void* input, Tile tile, const void* pivots, ColumnSums sums);
  void (*column_sums_in_double)(const void* input, Tile tile, const void* pivots, ColumnSums sums);
  void (*channel_normalize)(const NormalizeArgs& args, Tile tile, MaskTile mask);
  void (*column_normalize)(const NormalizeArgs& args, Tile tile, MaskTile mask);
  void (*channel_grad_sums)(const GradArgs& args, Tile tile, MaskTile mask, ColumnSums sums);
  void (*column_grad_sums)(const GradArgs& args, Tile tile, MaskTile mask, ColumnSums sums);
  void (*channel_grad_sums_in_double)(const GradArgs& args, Tile tile, MaskTile mask, ColumnSums sums);
  void (*column_grad_sums_in_double)(const GradArgs& args, Tile tile, MaskTile mask, ColumnSums sums);
  // Add the same sums as the fast loops, and write the input gradient that frozen statistics give grad_out.
  void (*channel_frozen_grad)(const GradArgs& args, Tile tile, MaskTile mask, ColumnSums sums);
  void (*column_frozen_grad)(const GradArgs& args, Tile tile, MaskTile mask, ColumnSums sums);
  void (*channel_input_grad)(const GradArgs& args, Tile tile, MaskTile mask);
  void (*column_input_grad)(const GradArgs& args, Tile tile, MaskTile mask);
};

// Returns the kernels of the instruction set in use.
const Kernels& kernels(DType dtype);

// Return the names of the instruction sets that this build contains and this machine can run, best first and ending
// with null, and the name of the one in use: the best, or the one that the environment variable FASTBN_CPU names
// (portable, avx2, avx512, avx512_bf16).
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
