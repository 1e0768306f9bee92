// The second pass of a forward op: z = (x - pivot) * scale + shift + residual, its activation, and the mask of that.
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/loops.h"
#include "cpu/kernels/mask_bits.h"
#include "cpu/kernels/short_rows.h"
#include "cpu/simd/vec_math.h"
#include "cpu/simd/vec_memory.h"
#include "math/affine.h"

namespace fastbn::cpu::FASTBN_ISA {

// Loads a coefficient of the columns from `at` on, or broadcasts that of channel `at`.
template <bool per_column, class T, class Lanes>
FASTBN_INLINE Vec<acc_t<T>> coefficient(const void* array, int64_t plane, int64_t at, Lanes lanes) {
  const acc_t<T>* values = static_cast<const acc_t<T>*>(array);
  if constexpr (per_column)
    return load_planes<T>(values, plane, at, lanes);
  else
    return Vec<acc_t<T>>(values[at]);
}

// Loads the coefficients of Affine for the same columns or channel.
template <bool per_column, class T, class Lanes>
FASTBN_INLINE Affine<Vec<acc_t<T>>> affine_at(const AffineArrays& arrays, int64_t at, Lanes lanes) {
  auto member = [&](const void* array)
                    FASTBN_INLINE_LAMBDA { return coefficient<per_column, T>(array, arrays.plane, at, lanes); };
  return {member(arrays.pivot), member(arrays.scale), member(arrays.shift)};
}

// Calls `visit(prepared, row, column, lanes)` for every vector of a tile. `prepared` is what `prepare(at, lanes)`
// returns: coefficients of columns, which stay in registers down a few rows, or of a channel, which stay there along
// its row.
template <bool per_column, class T, class Prepare, class Visit>
FASTBN_INLINE void for_each_prepared(const Tile& tile, Prepare&& prepare, Visit&& visit) {
  if constexpr (per_column) {
    const bool by_row = tile.out_of_cache && tile.cols * int64_t(sizeof(T)) >= min_bytes_by_row;
    for_each_strip<T>(tile, by_row ? 1 : rows_of_strip,
                      [&](int64_t begin, int64_t end, int64_t column, auto lanes) FASTBN_INLINE_LAMBDA {
                        const auto prepared = prepare(column, lanes);
                        for (int64_t row = begin; row < end; ++row) visit(prepared, row, column, lanes);
                      });
  } else {
    for (int64_t row = 0; row < tile.rows; ++row) {
      const auto prepared = prepare(tile.channel + row * tile.channel_step, AllLanes<T>{});
      for_each_column<T>(tile.cols,
                         [&](int64_t column, auto lanes) FASTBN_INLINE_LAMBDA { visit(prepared, row, column, lanes); });
    }
  }
}

// Writes the output of a tile, and its mask unless `mask` is null, without gaps in its rows.
template <class T, bool per_column>
void normalize(const NormalizeArgs& args, const Tile& tile, uint8_t* mask, int64_t mask_stride) {
  using V = Vec<acc_t<T>>;
  const acc_t<T> param = acc_t<T>(args.activation_param);
  const InputRows<T> input(args.input, tile), residual(args.residual, tile);
  const OutputRows<T> output(args.output, tile, args.non_temporal);

  auto loop = [&]<EpilogueKind kind, bool plain>() FASTBN_INLINE_LAMBDA {
    if constexpr (occurs(kind, has_few_kinds<T>))
      for_each_prepared<per_column, T>(
          tile,
          [&](int64_t at, auto lanes) FASTBN_INLINE_LAMBDA { return affine_at<per_column, T>(args.affine, at, lanes); },
          [&](const Affine<V>& affine, int64_t row, int64_t column, auto lanes) FASTBN_INLINE_LAMBDA {
            const int64_t at = row * tile.row_stride + column;
            V z = affine.apply(load(input.at(at), lanes));
            if constexpr (!plain) {
              if (residual) z = z + load(residual.at(at), lanes);
            }
            const V y = activate<kind>(args.activation, param, z);
            if (!plain && mask)
              store_bits<T>(
                  mask + row * mask_stride, column, lanes,
                  kind == EpilogueKind::relu ? relu_bits<T>(y) : to_bits<T>(activation_is_upper(args.activation, z)));
            output.store(at, y, lanes);
          });
  };
  const bool plain = !residual && !mask;
  switch (kind_of(args.activation, has_few_kinds<T>)) {
    case EpilogueKind::none:
      return plain ? loop.template operator()<EpilogueKind::none, true>()
                   : loop.template operator()<EpilogueKind::none, false>();
    case EpilogueKind::relu:
      return plain ? loop.template operator()<EpilogueKind::relu, true>()
                   : loop.template operator()<EpilogueKind::relu, false>();
    case EpilogueKind::short_formula: return loop.template operator()<EpilogueKind::short_formula, false>();
    case EpilogueKind::silu: return loop.template operator()<EpilogueKind::silu, false>();
    case EpilogueKind::out_of_line: return loop.template operator()<EpilogueKind::out_of_line, false>();
    case EpilogueKind::any: return loop.template operator()<EpilogueKind::any, false>();
  }
}

// Does what `normalize` does, for rows of any length.
template <class T, bool per_column>
void normalize_rows(const NormalizeArgs& args, const Tile& tile, uint8_t* mask, int64_t mask_stride) {
  if (!has_short_rows<T>(tile)) return normalize<T, per_column>(args, tile, mask, mask_stride);
  PaddedRows<T> input, residual, output;
  PaddedBits bits;
  for (int64_t row = 0; row < tile.rows; row += padded_rows) {
    const Tile part = part_to_pad(tile, row);
    NormalizeArgs copies = args;
    copies.input = input.copy(args.input, part);
    copies.residual = residual.copy(args.residual, part);
    copies.output = output.rows_of(args.output);
    copies.non_temporal = false;
    normalize<T, per_column>(copies, padded<T>(part), mask ? bits.bytes() : nullptr, PaddedBits::stride);
    output.copy_to(args.output, part);
    if (mask) bits.copy_to(mask + row * mask_stride, mask_stride, part);
  }
}

// Writes the output and the mask of a tile.
template <class T, bool per_column>
void normalize_tile(const NormalizeArgs& args, Tile tile, MaskTile mask_tile) {
  uint8_t* mask = args.mask ? args.mask + mask_tile.offset : nullptr;
  if (!per_column || !mask || !has_gaps(mask_tile, tile.cols))
    return normalize_rows<T, per_column>(args, tile, mask, mask_tile.row_stride);
  for_gathered_rows(tile, [&](const Tile& part, int64_t first, uint64_t* words) {
    normalize_rows<T, per_column>(args, part, reinterpret_cast<uint8_t*>(words), gathered_bytes);
    for (int64_t row = 0; row < part.rows; ++row)
      spread_bits(words[row], tile.cols, mask_tile.run, mask + (first + row) * mask_tile.row_stride);
  });
}

}  // namespace fastbn::cpu::FASTBN_ISA
