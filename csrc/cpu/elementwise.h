// The loops over elements that follow a reduction: normalise, sum gradients, form the gradient of the input. Each is
// written once for both kinds of block; `PerColumn` says whether coefficients vary along a row.
#pragma once

#include "cpu/kernels.h"
#include "cpu/sums.h"
#include "cpu/vec.h"
#include "math/affine.h"

namespace fastbn::cpu::FASTBN_ISA {

template <bool PerColumn, class A>
FASTBN_INLINE Vec<A> coefficient(const void* array, int64_t column, int64_t count) {
  const A* values = static_cast<const A*>(array);
  if constexpr (PerColumn) {
    return count == Vec<A>::lanes ? load(values + column) : load_some(values + column, count, Vec<A>(0));
  } else {
    return Vec<A>(values[0]);
  }
}

// Bits of a run are read and written a vector at a time; a vector of fewer than eight lanes shares its byte with its
// neighbours, and the first of them starts it.
FASTBN_INLINE void store_bits(uint8_t* row, int64_t column, int64_t count, uint64_t bits) {
  bits &= (uint64_t(1) << count) - 1;
  for (int64_t done = 0; done < count;) {
    const int64_t at = column + done, in_byte = at % 8;
    const uint8_t part = uint8_t(bits >> done << in_byte);
    row[at / 8] = in_byte == 0 ? part : uint8_t(row[at / 8] | part);
    done += 8 - in_byte;
  }
}

FASTBN_INLINE uint64_t load_bits(const uint8_t* row, int64_t column, int64_t count) {
  uint64_t bits = 0;
  for (int64_t done = 0; done < count;) {
    const int64_t at = column + done, in_byte = at % 8;
    bits |= uint64_t(row[at / 8] >> in_byte) << done;
    done += 8 - in_byte;
  }
  return bits;
}

struct Columns {
  int64_t begin, end;
};

// Walks columns of a block a vector at a time: visit(row, column, count), count < lanes only at the end.
template <class A, class Visit>
FASTBN_INLINE void for_each_vector(const Block& block, Columns columns, Visit&& visit) {
  for (int64_t r = 0; r < block.rows; ++r) {
    int64_t j = columns.begin;
    for (; j + Vec<A>::lanes <= columns.end; j += Vec<A>::lanes) visit(r, j, int64_t(Vec<A>::lanes));
    if (j < columns.end) visit(r, j, columns.end - j);
  }
}

template <bool PerColumn, class A>
FASTBN_INLINE Affine<Vec<A>> affine_at(const AffineArrays& arrays, int64_t column, int64_t count) {
  return {coefficient<PerColumn, A>(arrays.pivot, column, count),
          coefficient<PerColumn, A>(arrays.scale, column, count),
          coefficient<PerColumn, A>(arrays.shift, column, count)};
}

template <class T, bool PerColumn>
void normalize(const NormalizeArgs& args, Block block, MaskBlock mask_block) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const T* input = static_cast<const T*>(args.input) + block.offset;
  const T* residual = args.residual ? static_cast<const T*>(args.residual) + block.offset : nullptr;
  T* output = static_cast<T*>(args.output) + block.offset;
  uint8_t* mask = args.mask ? args.mask + mask_block.offset : nullptr;

  auto loop = [&](auto&& activation_of) {
    for_each_vector<A>(block, {0, block.cols}, [&](int64_t r, int64_t j, int64_t count) FASTBN_INLINE_LAMBDA {
      const int64_t at = r * block.row_stride + j;
      V z = affine_at<PerColumn, A>(args.affine, j, count).apply(load_up_to(input + at, count));
      if (residual) z = z + load_up_to(residual + at, count);
      if (mask)
        store_bits(mask + r * mask_block.row_stride, j, count, to_bits(activation_is_upper(args.activation, z)));
      store_up_to(output + at, count, activation_of(z));
    });
  };
  // The two that every network uses get a loop of their own, without a branch an element.
  if (args.activation == Activation::none)
    loop([](V z) FASTBN_INLINE_LAMBDA { return z; });
  else if (args.activation == Activation::relu)
    loop([](V z) FASTBN_INLINE_LAMBDA { return activation_forward(Activation::relu, z); });
  else
    loop([&](V z) FASTBN_INLINE_LAMBDA { return activation_forward(args.activation, z); });
}

// Calls consume(offset, column, count, x, grad_z) for each vector of some columns of a block. x is loaded only if
// `need_input`, or if the activation's derivative has to be recomputed from it.
template <class T, bool PerColumn, class Consume>
FASTBN_INLINE void for_each_grad(const GradArgs& args, const Block& block, const MaskBlock& mask_block, Columns columns,
                                 bool need_input, Consume&& consume) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const T* grad_out = static_cast<const T*>(args.grad_out) + block.offset;
  const T* input = static_cast<const T*>(args.input) + block.offset;
  const T* residual = args.residual ? static_cast<const T*>(args.residual) + block.offset : nullptr;

  auto loop = [&](auto&& grad_z_of) {
    for_each_vector<A>(block, columns, [&](int64_t r, int64_t j, int64_t count) FASTBN_INLINE_LAMBDA {
      const int64_t at = r * block.row_stride + j;
      const V x = need_input ? load_up_to(input + at, count) : V(0);
      consume(at, j, count, x, grad_z_of(r, at, j, count, x, load_up_to(grad_out + at, count)));
    });
  };
  if (args.activation == Activation::none) {
    loop([](int64_t, int64_t, int64_t, int64_t, V, V grad) FASTBN_INLINE_LAMBDA { return grad; });
  } else if (args.mask) {
    const uint8_t* mask = args.mask + mask_block.offset;
    loop([&](int64_t r, int64_t, int64_t j, int64_t count, V, V grad) FASTBN_INLINE_LAMBDA {
      const Mask<A> upper = from_bits<A>(load_bits(mask + r * mask_block.row_stride, j, count));
      return activation_backward_masked(args.activation, upper, grad);
    });
  } else {
    auto recompute = [&](Activation activation, int64_t at, int64_t j, int64_t count, V x, V grad)
                         FASTBN_INLINE_LAMBDA {
                           if (!need_input) x = load_up_to(input + at, count);
                           V z = affine_at<PerColumn, A>(args.affine, j, count).apply(x);
                           if (residual) z = z + load_up_to(residual + at, count);
                           return activation_backward(activation, z, grad);
                         };
    if (args.activation == Activation::relu) {
      loop([&](int64_t, int64_t at, int64_t j, int64_t count, V x, V grad)
               FASTBN_INLINE_LAMBDA { return recompute(Activation::relu, at, j, count, x, grad); });
    } else {
      loop([&](int64_t, int64_t at, int64_t j, int64_t count, V x, V grad)
               FASTBN_INLINE_LAMBDA { return recompute(args.activation, at, j, count, x, grad); });
    }
  }
}

// Lanes beyond a row's end have grad 0, but the activation's derivative there may be anything.
template <class A>
FASTBN_INLINE Vec<A> keep_first(Vec<A> x, int64_t count) {
  return count == Vec<A>::lanes ? x : select(from_bits<A>((uint64_t(1) << count) - 1), x, Vec<A>(0));
}

// Sums of grad_z and of grad_z * (x - pivot) over some columns, in double; x - pivot is exact where |x| >> |x - pivot|.
template <class T, bool PerColumn>
FASTBN_INLINE ShiftedSums<acc_t<T>> sum_grads(const GradArgs& args, const Block& block, const MaskBlock& mask,
                                              Columns columns) {
  using A = acc_t<T>;
  using V = Vec<A>;
  ShiftedSums<A> sums;
  for_each_grad<T, PerColumn>(args, block, mask, columns, true,
                              [&](int64_t, int64_t j, int64_t count, V x, V grad_z) FASTBN_INLINE_LAMBDA {
                                const V pivot = coefficient<PerColumn, A>(args.affine.pivot, j, count);
                                sums.first.add(WideSum<A>(keep_first(grad_z, count)));
                                sums.second.add(WideSum<A>(keep_first(grad_z * (x - pivot), count)));
                              });
  return sums;
}

template <class T>
Sums channel_grad_sums(const GradArgs& args, Block block, MaskBlock mask) {
  const auto sums = sum_grads<T, false>(args, block, mask, {0, block.cols});
  return {sums.first.total(), sums.second.total()};
}

template <class T>
void column_grad_sums(const GradArgs& args, Block block, MaskBlock mask, Sums* result) {
  constexpr int lanes = Vec<acc_t<T>>::lanes;
  // A strip of one vector at a time keeps its sums in registers; the block is cached.
  for (int64_t j = 0; j < block.cols; j += lanes) {
    const int64_t count = block.cols - j < lanes ? block.cols - j : lanes;
    const auto sums = sum_grads<T, true>(args, block, mask, {j, j + count});
    for (int64_t i = 0; i < count; ++i) result[j + i] = {sums.first.lane(int(i)), sums.second.lane(int(i))};
  }
}

template <class T, bool PerColumn>
void input_grad(const GradArgs& args, Block block, MaskBlock mask) {
  using A = acc_t<T>;
  using V = Vec<A>;
  T* grad_input = args.grad_input ? static_cast<T*>(args.grad_input) + block.offset : nullptr;
  T* grad_residual = args.grad_residual ? static_cast<T*>(args.grad_residual) + block.offset : nullptr;
  const GradAffineArrays& arrays = args.grad_affine;
  const bool frozen = arrays.slope == nullptr;
  for_each_grad<T, PerColumn>(args, block, mask, {0, block.cols}, grad_input && !frozen,
                              [&](int64_t at, int64_t j, int64_t count, V x, V grad_z) FASTBN_INLINE_LAMBDA {
                                if (grad_residual) store_up_to(grad_residual + at, count, grad_z);
                                if (!grad_input) return;
                                const V scale = coefficient<PerColumn, A>(arrays.scale, j, count);
                                if (frozen) {
                                  store_up_to(grad_input + at, count, grad_z * scale);
                                } else {
                                  const GradAffine<V> grad_affine{coefficient<PerColumn, A>(arrays.pivot, j, count),
                                                                  coefficient<PerColumn, A>(arrays.slope, j, count),
                                                                  coefficient<PerColumn, A>(arrays.mean_grad, j, count),
                                                                  coefficient<PerColumn, A>(arrays.rest, j, count),
                                                                  scale};
                                  store_up_to(grad_input + at, count, grad_affine.apply(grad_z, x));
                                }
                              });
}

}  // namespace fastbn::cpu::FASTBN_ISA
