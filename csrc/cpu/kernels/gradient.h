// The loops of backward: sums of grad_z and of grad_z * (x - pivot), and the gradient of the input made with them.
// grad_z is grad_out times the activation's derivative, known from the mask, from x alone, or from z, which is
// recomputed.
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/loops.h"
#include "cpu/kernels/mask_bits.h"
#include "cpu/kernels/normalize.h"
#include "cpu/kernels/relu_interval.h"
#include "cpu/kernels/short_rows.h"
#include "cpu/kernels/sums.h"
#include "cpu/simd/vec_math.h"
#include "cpu/simd/vec_memory.h"
#include "math/affine.h"

namespace fastbn::cpu::FASTBN_ISA {

// The sources of grad_z: without an activation, it is grad_out itself. All four share an interface: `prepare(at,
// lanes)` returns what is the same down a column or along a run, and `grad_z` computes a vector from that, its
// position, x and the address of its grad_out. The argument x has a value only if `needs_input`.
template <class T, bool per_column>
struct GradOut {
  using V = Vec<acc_t<T>>;
  static constexpr bool needs_input = false;

  template <class Lanes>
  FASTBN_INLINE bool prepare(int64_t, Lanes) const {
    return true;
  }
  template <class Lanes>
  FASTBN_INLINE V grad_z(bool, int64_t, int64_t, Lanes lanes, V, const T* grad_out) const {
    return load(grad_out, lanes);
  }
};

// grad_z from the mask.
template <class T, bool per_column, bool leaks>
struct MaskedGrad : GradOut<T, per_column> {
  using V = Vec<acc_t<T>>;
  MaskRows mask;
  acc_t<T> slope;

  FASTBN_INLINE MaskedGrad(MaskRows mask, acc_t<T> slope) : mask(mask), slope(slope) {}

  template <class Lanes>
  FASTBN_INLINE V grad_z(bool, int64_t row, int64_t column, Lanes lanes, V, const T* grad_out) const {
    const uint64_t upper = load_bits(mask.bits + row * mask.stride, column, lanes);
    if constexpr (leaks) {
      const V grad = load(grad_out, lanes);
      return select(from_bits<T>(upper), grad, grad * V(slope));
    }
    return load_where(upper, grad_out, lanes);
  }
};

// grad_z of relu, from x alone.
template <class T, bool per_column>
struct IntervalGrad {
  using V = Vec<acc_t<T>>;
  static constexpr bool needs_input = false;
  ReluIntervals intervals;
  const T* input;
  int64_t row_stride;

  template <class Lanes>
  FASTBN_INLINE Intervals prepare(int64_t column, Lanes lanes) const {
    return intervals_at<per_column>(intervals, column, lanes);
  }
  template <class Lanes>
  FASTBN_INLINE V grad_z(const Intervals& prepared, int64_t row, int64_t column, Lanes lanes, V,
                         const T* grad_out) const {
    return load_inside(prepared, input + row * row_stride + column, grad_out, lanes);
  }
};

// grad_z of any activation, from z, which is recomputed.
template <class T, bool per_column, EpilogueKind kind>
struct RecomputedGrad {
  using V = Vec<acc_t<T>>;
  static constexpr bool needs_input = true;
  AffineArrays affine;
  InputRows<T> residual;
  int64_t row_stride;
  Activation activation;
  acc_t<T> param;

  template <class Lanes>
  FASTBN_INLINE Affine<V> prepare(int64_t column, Lanes lanes) const {
    return affine_at<per_column, T>(affine, column, lanes);
  }
  template <class Lanes>
  FASTBN_INLINE V grad_z(const Affine<V>& prepared, int64_t row, int64_t column, Lanes lanes, V x,
                         const T* grad_out) const {
    V z = prepared.apply(x);
    if (residual) z = z + load(residual.at(row * row_stride + column), lanes);
    return differentiate<kind>(activation, param, z, load(grad_out, lanes));
  }
};

// The sources that a loop is compiled for: all; few in a loop that runs rarely, and with has_few_kinds, where all
// activations but relu share one; or GradOut alone, in a loop that never has an activation.
enum class Sources { all, few, grad_out };

// Calls `use(source)` with the source of grad_z.
template <class T, bool per_column, Sources sources, class Use>
FASTBN_INLINE void with_grad(const GradArgs& args, const Tile& tile, MaskRows mask, int64_t ahead, Use&& use) {
  if constexpr (sources == Sources::grad_out) return use(GradOut<T, per_column>{});
  if (args.activation == Activation::none) return use(GradOut<T, per_column>{});
  const acc_t<T> param = acc_t<T>(args.activation_param);
  if (mask.bits && leaks(args.activation)) return use(MaskedGrad<T, per_column, true>(mask, param));
  if (mask.bits) return use(MaskedGrad<T, per_column, false>(mask, param));
  if constexpr (interleaved<T> && sources == Sources::all) {
    if (args.relu.first) {
      const T* input = static_cast<const T*>(args.input) + tile.offset;
      return use(IntervalGrad<T, per_column>{args.relu, input, tile.row_stride});
    }
  }
  const InputRows<T> residual(args.residual, tile, ahead);
  constexpr bool few = has_few_kinds<T> || sources == Sources::few;
  auto recompute = [&]<EpilogueKind kind>() FASTBN_INLINE_LAMBDA {
    if constexpr (occurs(kind, few))
      use(RecomputedGrad<T, per_column, kind>{args.affine, residual, tile.row_stride, args.activation, param});
  };
  switch (kind_of(args.activation, few)) {
    case EpilogueKind::none: return;
    case EpilogueKind::relu: return recompute.template operator()<EpilogueKind::relu>();
    case EpilogueKind::silu: return recompute.template operator()<EpilogueKind::silu>();
    case EpilogueKind::short_formula: return recompute.template operator()<EpilogueKind::short_formula>();
    case EpilogueKind::out_of_line: return recompute.template operator()<EpilogueKind::out_of_line>();
    case EpilogueKind::any: return recompute.template operator()<EpilogueKind::any>();
  }
}

// Calls `call(arguments, tile, its mask)` once or, if rows are short, for copies of a few rows at a time.
template <class T, class Call>
void with_full_rows(const GradArgs& args, const Tile& tile, MaskRows mask, Call&& call) {
  if (!has_short_rows<T>(tile)) return call(args, tile, mask);
  PaddedGrads<T> copies;
  for (int64_t row = 0; row < tile.rows; row += padded_rows) {
    const Tile part = part_to_pad(tile, row);
    GradArgs copied_args = args;
    Tile copied = part;
    MaskRows copied_mask{mask.bits ? mask.bits + row * mask.stride : nullptr, mask.stride};
    copies.replace(copied_args, copied, copied_mask);
    call(copied_args, copied, copied_mask);
    copies.write(args, part);
  }
}

// Calls `call(arguments, tile, its mask)` once or, if the mask has gaps or rows are short, for a few rows at a time.
// Only tiles of columns have gaps. `call` is not inlined, for its loops would be compiled twice.
template <class T, class Call>
void with_mask_rows(const GradArgs& args, const Tile& tile, const MaskTile& mask_tile, Call&& call) {
  const uint8_t* mask = args.mask ? args.mask + mask_tile.offset : nullptr;
  if (!mask || args.activation == Activation::none || !has_gaps(mask_tile, tile.cols))
    return with_full_rows<T>(args, tile, {mask, mask_tile.row_stride}, call);
  for_gathered_rows(tile, [&](const Tile& part, int64_t first, uint64_t* words) {
    for (int64_t row = 0; row < part.rows; ++row)
      words[row] = gather_bits(mask + (first + row) * mask_tile.row_stride, tile.cols, mask_tile.run);
    with_full_rows<T>(args, part, {reinterpret_cast<const uint8_t*>(words), gathered_bytes}, call);
  });
}

// The other uses of grad_z in loops that sum it. Here there is none.
template <class T, bool per_column>
struct SumsOnly {
  template <class Terms>
  static constexpr Sources sources = std::is_same_v<Terms, GradTerms<T>> ? Sources::all : Sources::few;
  FASTBN_INLINE SumsOnly(const GradArgs&, const Tile&) {}
  template <class Lanes>
  FASTBN_INLINE bool prepare(int64_t, Lanes) const {
    return true;
  }
  template <class Lanes>
  FASTBN_INLINE void take(bool, int64_t, const Vec<acc_t<T>>&, Lanes) const {}
};

// Writes the input gradient that frozen statistics give grad_z.
template <class T, bool per_column>
struct FrozenGrad {
  using V = Vec<acc_t<T>>;
  template <class>
  static constexpr Sources sources = Sources::grad_out;
  GradAffineArrays arrays;
  OutputRows<T> grad_input;

  FASTBN_INLINE FrozenGrad(const GradArgs& args, const Tile& tile)
      : arrays(args.grad_affine), grad_input(args.grad_input, tile, args.non_temporal) {}
  template <class Lanes>
  FASTBN_INLINE V prepare(int64_t at, Lanes lanes) const {
    return coefficient<per_column, T>(arrays.scale, arrays.plane, at, lanes);
  }
  template <class Lanes>
  FASTBN_INLINE void take(const V& scale, int64_t at, const V& grad_z, Lanes lanes) const {
    grad_input.store(at, grad_z * scale, lanes);
  }
};

// Adds the gradient sums of a tile's channels to `sums`. `Also` is the other use of grad_z.
template <class T, class Terms, template <class, bool> class Also = SumsOnly>
void channel_grad_sums(const GradArgs& tile_args, Tile tile, MaskTile mask_tile, ColumnSums sums) {
  using A = acc_t<T>;
  using V = Vec<A>;
  PaddedGrads<T> copies;
  sum_channels<T>(tile, sums, [&](int64_t channel, int64_t first_row, const Tile& rows) FASTBN_INLINE_LAMBDA {
    const int64_t mask_offset =
        mask_tile.offset + first_row * mask_tile.row_stride + channel * ((mask_tile.run + 7) / 8);
    MaskRows mask{tile_args.mask ? tile_args.mask + mask_offset : nullptr, mask_tile.row_stride};
    GradArgs copied_args;
    const bool is_short = has_short_rows<T>(rows);
    Tile part = rows;
    if (is_short) {
      copied_args = tile_args;
      copies.replace(copied_args, part, mask);
    }
    const GradArgs& args = is_short ? copied_args : tile_args;
    const int64_t ahead = part.row_stride;
    const InputRows<T> grad_out(args.grad_out, part, ahead), input(args.input, part, ahead);
    const Also<T, false> also(args, part);
    const V pivot(static_cast<const A*>(args.pivot)[channel]);
    WideSums<A> result;
    with_grad<T, false, Also<T, false>::template sources<Terms>>(
        args, part, mask, ahead, [&](auto source) FASTBN_INLINE_LAMBDA {
          const auto prepared = source.prepare(channel, AllLanes<T>{});
          const auto scale = also.prepare(channel, AllLanes<T>{});
          result = sum_channel<T, Terms>(
              part, [&](Terms& terms, int64_t row, int64_t column, auto lanes) FASTBN_INLINE_LAMBDA {
                const int64_t at = row * part.row_stride + column;
                // Lanes other than the row's new ones add 0 * (pivot - pivot).
                const V x = keep(lanes, load(input.at(at), lanes), pivot);
                const V grad_z = source.grad_z(prepared, row, column, lanes, x, grad_out.at(at));
                also.take(scale, at, grad_z, lanes);
                terms.template add_weighted<T>(keep(lanes, grad_z, V(0)), x - pivot);
              });
        });
    if (is_short) copies.write(tile_args, rows);
    return result;
  });
}

// Adds the gradient sums of the columns of a tile whose mask has no gaps.
template <class T, class Terms, template <class, bool> class Also>
void sum_column_grads(const GradArgs& args, const Tile& tile, MaskRows mask, ColumnSums result) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const int64_t ahead = rows_ahead_of_column_sums * tile.row_stride;
  const InputRows<T> grad_out(args.grad_out, tile, ahead), input(args.input, tile, ahead);
  const Also<T, true> also(args, tile);
  with_grad<T, true, Also<T, true>::template sources<Terms>>(
      args, tile, mask, ahead, [&](auto source) FASTBN_INLINE_LAMBDA {
        using Prepared = decltype(source.prepare(0, AllLanes<T>{}));
        struct Column {
          Prepared prepared;
          V pivot;
          decltype(also.prepare(0, AllLanes<T>{})) scale;
        };
        sum_columns<T, Terms>(
            tile, rows_of_column_grad_sums<T>(tile), result,
            [&](int64_t column, auto lanes) FASTBN_INLINE_LAMBDA {
              return Column{source.prepare(column, lanes), load(static_cast<const A*>(args.pivot) + column, lanes),
                            also.prepare(column, lanes)};
            },
            [&](Terms& terms, const Column& at_column, int64_t row, int64_t column, auto lanes) FASTBN_INLINE_LAMBDA {
              const int64_t at = row * tile.row_stride + column;
              const V x = load(input.at(at), lanes);
              const V grad_z = source.grad_z(at_column.prepared, row, column, lanes, x, grad_out.at(at));
              also.take(at_column.scale, at, grad_z, lanes);
              terms.template add_weighted<T>(grad_z, x - at_column.pivot);
            });
      });
}

// Adds the gradient sums of a tile's columns to `result`.
template <class T, class Terms, template <class, bool> class Also = SumsOnly>
void column_grad_sums(const GradArgs& args, Tile tile, MaskTile mask_tile, ColumnSums result) {
  with_mask_rows<T>(args, tile, mask_tile, [&](const GradArgs& rows_args, const Tile& part, MaskRows mask) {
    sum_column_grads<T, Terms, Also>(rows_args, part, mask, result);
  });
}

// Loads the coefficients of GradAffine. The pivot is that of `args.affine`, which recomputes z, so that the difference
// from it is computed once for both.
template <bool per_column, class T, class Lanes>
FASTBN_INLINE GradAffine<Vec<acc_t<T>>> grad_affine_at(const GradArgs& args, int64_t column, Lanes lanes) {
  const GradAffineArrays& arrays = args.grad_affine;
  auto member = [&](const void* array)
                    FASTBN_INLINE_LAMBDA { return coefficient<per_column, T>(array, arrays.plane, column, lanes); };
  return {member(args.affine.pivot), member(arrays.slope), member(arrays.mean_grad), member(arrays.rest),
          member(arrays.scale)};
}

// Writes grad_input and grad_residual of a tile whose mask has no gaps.
template <class T, bool per_column>
void input_grad(const GradArgs& args, const Tile& tile, MaskRows mask) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const InputRows<T> grad_out(args.grad_out, tile), input(args.input, tile);
  const OutputRows<T> grad_input(args.grad_input, tile, args.non_temporal);
  const OutputRows<T> grad_residual(args.grad_residual, tile, args.non_temporal);
  const GradAffineArrays& arrays = args.grad_affine;

  // `coefficients(column, lanes)` are those of `gradient(coefficients, grad_z, x)`.
  auto loop = [&]<Sources sources, bool needs_input>(auto coefficients, auto gradient) FASTBN_INLINE_LAMBDA {
    with_grad<T, per_column, sources>(args, tile, mask, 0, [&](auto source) FASTBN_INLINE_LAMBDA {
      using Prepared = decltype(source.prepare(0, AllLanes<T>{}));
      using Coefficients = decltype(coefficients(0, AllLanes<T>{}));
      struct Column {
        Prepared prepared;
        Coefficients coefficients;
      };
      for_each_prepared<per_column, T>(
          tile,
          [&](int64_t column, auto lanes)
              FASTBN_INLINE_LAMBDA { return Column{source.prepare(column, lanes), coefficients(column, lanes)}; },
          [&](const Column& at_column, int64_t row, int64_t column, auto lanes) FASTBN_INLINE_LAMBDA {
            const int64_t at = row * tile.row_stride + column;
            V x(0);
            if constexpr (needs_input || decltype(source)::needs_input) x = load(input.at(at), lanes);
            const V grad_z = source.grad_z(at_column.prepared, row, column, lanes, x, grad_out.at(at));
            if (grad_residual) grad_residual.store(at, grad_z, lanes);
            if (grad_input) grad_input.store(at, gradient(at_column.coefficients, grad_z, x), lanes);
          });
    });
  };
  auto grad_affine = [&](int64_t column, auto lanes)
                         FASTBN_INLINE_LAMBDA { return grad_affine_at<per_column, T>(args, column, lanes); };
  if (grad_input && arrays.slope && args.is_far && sizeof(A) < sizeof(double))
    loop.template operator()<Sources::few, true>(grad_affine,
                                                 [](const GradAffine<V>& affine, V grad_z, V x)
                                                     FASTBN_INLINE_LAMBDA { return affine.apply_far(grad_z, x); });
  else if (grad_input && arrays.slope)
    loop.template operator()<Sources::all, true>(grad_affine,
                                                 [](const GradAffine<V>& affine, V grad_z, V x)
                                                     FASTBN_INLINE_LAMBDA { return affine.apply(grad_z, x); });
  else  // frozen statistics
    loop.template operator()<Sources::all, false>(
        [&](int64_t column, auto lanes)
            FASTBN_INLINE_LAMBDA { return coefficient<per_column, T>(arrays.scale, arrays.plane, column, lanes); },
        [](V scale, V grad_z, V) FASTBN_INLINE_LAMBDA { return grad_z * scale; });
}

// Writes grad_input and grad_residual of a tile.
template <class T, bool per_column>
void input_grad_tile(const GradArgs& args, Tile tile, MaskTile mask) {
  auto call = [](const GradArgs& part_args, const Tile& part, MaskRows rows) {
    input_grad<T, per_column>(part_args, part, rows);
  };
  if constexpr (per_column)
    with_mask_rows<T>(args, tile, mask, call);
  else
    with_full_rows<T>(args, tile, {args.mask ? args.mask + mask.offset : nullptr, mask.row_stride}, call);
}

}  // namespace fastbn::cpu::FASTBN_ISA
