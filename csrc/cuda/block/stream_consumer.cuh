// The consumers of a stream kernel: they visit the vectors of their tiles in the ring twice, to sum them and, `ahead`
// tiles later, to write what becomes of them. A thread has every `threads`-th vector of a part, and so in row_tiles the
// same vector of every row that it visits.
#pragma once

#include "cuda/block/loop.cuh"
#include "cuda/block/stream_ring.cuh"
#include "cuda/block/stream_tiles.cuh"
#include "cuda/block/vec16.cuh"
#include "math/affine.h"

namespace fastbn::cuda {

template <class T, Kernel kernel, class Map, int unroll_>
class StreamConsumer {
 public:
  static constexpr bool by_rows = kernel == Kernel::row_tiles;
  static constexpr int size = vec16_size<T>;
  static constexpr int unroll = unroll_;
  static constexpr int channels = by_rows ? size : 1;  // of a thread
  // Accumulators per sum: those of one channel are four, to break the dependency chain.
  static constexpr int accumulators = by_rows ? size : 4;

  // Keeps references to its arguments, which outlive it.
  FASTBN_DEVICE StreamConsumer(const Layout& layout, const Plan& plan, const StreamTiles& tiles,
                               const StreamRing<Map>& ring)
      : walk(plan.stream, tiles.begin + device::thread_index(), plan.stream.consumer_step),
        layout_(layout),
        plan_(plan),
        tiles_(tiles),
        ring_(ring) {
    if constexpr (by_rows) {
      column_ = thread() % plan.stream.row_vectors;
      first_channel_ = column_ * size / (plan.stream.spans_runs ? static_cast<int>(layout.inner) : 1);
    }
  }

  // Loads `count` fields of the channels of the thread's vectors, from `field` on. They are arbitrary where it has no
  // vectors. `next`: of the vector after the thread's, where both lie in one byte of a mask.
  template <int count>
  FASTBN_DEVICE void load_fields(const RingPosition& tile, int field, float (&values)[count][channels],
                                 bool next = false) const {
    const int stride = plan_.channels_per_tile;
    const float* const fields = ring_.fields(tile) + field * stride;
    const int first = by_rows ? device::opaque(first_channel_) : 0;
    if constexpr (!by_rows) {
      FASTBN_UNROLL
      for (int i = 0; i < count; ++i) values[i][0] = fields[i * stride];
    } else if (plan_.stream.spans_runs) {
      const int boundary = this->boundary(first), second = first + (boundary < size);
      FASTBN_UNROLL
      for (int i = 0; i < count; ++i) {
        const float left = fields[i * stride + first], right = fields[i * stride + second];
        FASTBN_UNROLL
        for (int j = 0; j < size; ++j) values[i][j] = j < boundary ? left : right;
      }
    } else {
      FASTBN_UNROLL
      for (int i = 0; i < count; ++i) {
        FASTBN_UNROLL
        for (int j = 0; j < size; j += 4) {
          const auto four = device::load16(fields + i * stride + first + (next ? size : 0) + j);
          FASTBN_UNROLL
          for (int k = 0; k < 4; ++k) values[i][j + k] = four.element[k];
        }
      }
    }
  }

  // Loads three neighbouring fields as the coefficients of an affine map.
  FASTBN_DEVICE void load_affine(const RingPosition& tile, int field, Affine<float> (&affine)[channels],
                                 bool next = false) const {
    float values[3][channels];
    load_fields(tile, field, values, next);
    FASTBN_UNROLL
    for (int i = 0; i < channels; ++i) affine[i] = {values[0][i], values[1][i], values[2][i]};
  }

  static FASTBN_DEVICE int thread() { return device::thread_index(); }
  FASTBN_DEVICE int threads() const { return threads(plan_); }  // from one of a thread's vectors to the next
  FASTBN_DEVICE bool has_vectors(int width) const { return !by_rows || (thread() < threads() && column_ < width); }

  // Visits the vectors of a tile to be summed: calls load(where, u) for `batch` of them and then use(where, item) for
  // each, where `u` counts those of a chunk and `where` is the vector in the ring. A batch of 0 is for long bodies: the
  // loop over a chunk stays rolled, and u is 0.
  template <int batch, class Load, class Use>
  FASTBN_DEVICE void sum_tile(const RingPosition& tile, int width, Load load, Use use) const {
    device::Mbarrier* const full = device::opaque(ring_.full(tile, 0));
    visit_tile<batch>(tile, width, [&](int chunk) { device::wait(full + chunk, tile.parity); }, load, use, [](int) {});
  }

  // Visits the vectors of a tile to be written, which has been summed, and frees its chunks.
  template <int batch, class Load, class Use>
  FASTBN_DEVICE void write_tile(const RingPosition& tile, int width, Load load, Use use) const {
    device::Mbarrier* const empty = device::opaque(ring_.empty(tile, 0));
    visit_tile<batch>(
        tile, width, [](int) {}, load, use,
        [&](int chunk) {
          device::sync_warp();
          if (thread() % device::kWarp == 0) device::arrive(empty + chunk);
        });
  }

  // Leaves the thread's sums for the finisher (add_partials).
  FASTBN_DEVICE void publish(const RingPosition& tile, float (&first)[accumulators], float (&second)[accumulators]) {
    FloatSums* const partials = ring_.partials(tile);
    if constexpr (!by_rows) {
      partials[thread()] = {total(first), total(second)};
    } else if (plan_.stream.spans_runs) {
      const int boundary = this->boundary(first_channel_);
      FloatSums left = {0, 0}, right = {0, 0};
      FASTBN_UNROLL
      for (int i = 0; i < size; ++i) {
        left.first += i < boundary ? first[i] : 0;
        left.second += i < boundary ? second[i] : 0;
        right.first += i < boundary ? 0 : first[i];
        right.second += i < boundary ? 0 : second[i];
      }
      partials[2 * thread()] = left;
      partials[2 * thread() + 1] = right;
    } else {
      FASTBN_KEEP_LOOP
      for (int delta = plan_.stream.row_vectors; delta < device::kWarp; delta *= 2) {
        FASTBN_UNROLL
        for (int i = 0; i < size; ++i) {
          first[i] += device::shuffle_xor(first[i], delta);
          second[i] += device::shuffle_xor(second[i], delta);
        }
      }
      if (thread() % device::kWarp < plan_.stream.row_vectors) {
        FloatSums* const mine = partials + thread() / device::kWarp * plan_.channels_per_tile + first_channel_;
        FASTBN_UNROLL
        for (int i = 0; i < size; i += 2) {
          device::store16(&mine[i].first, {first[i], second[i], first[i + 1], second[i + 1]});
        }
      }
    }
    device::sync_warp();
    if (thread() % device::kWarp == 0) ring_.arrive_summed(tile);
  }

  // Moves on to the thread's next vector in the tensor.
  FASTBN_DEVICE void next(VectorWalk& at) const { at.next<by_rows>(); }

  VectorWalk walk;  // the thread's vectors of a part

 private:
  static FASTBN_DEVICE int threads(const Plan& plan) { return by_rows ? plan.stream.threads : stream_consumers; }
  FASTBN_DEVICE int chunk_vectors() const { return by_rows ? plan_.stream.chunk_vectors : stream_consumers * unroll; }

  // Returns how many elements of the thread's vectors belong to the first of its channels, where rows span runs; at
  // least `size` if all do. The others belong to the next.
  FASTBN_DEVICE int boundary(int first_channel) const {
    return (first_channel + 1) * static_cast<int>(layout_.inner) - column_ * size;
  }

  static FASTBN_DEVICE float total(const float (&terms)[accumulators]) {
    return (terms[0] + terms[1]) + (terms[2] + terms[3]);
  }

  template <int batch, class Wait, class Load, class Use, class Done>
  FASTBN_DEVICE void visit_tile(const RingPosition& tile, int width, Wait wait, Load load, Use use, Done done) const {
    // Opaque, since nvcc for sm_80 spills two words where it may fold this into what follows.
    const bool has_vectors = this->has_vectors(device::opaque(width));
    FASTBN_KEEP_LOOP
    for (int begin = 0, chunk = 0; begin < tiles_.vectors; begin += chunk_vectors(), ++chunk) {
      wait(chunk);
      if (has_vectors) visit_chunk<batch>(tiles_.vectors - begin, ring_.part(tile) + begin + thread(), load, use);
      done(chunk);
    }
  }

  // `left` counts from the chunk's first vector to the end of the part.
  template <int batch, class Load, class Use>
  FASTBN_DEVICE void visit_chunk(int left, Vec16* where, Load load, Use use) const {
    using Item = decltype(load(where, 0));
    if constexpr (batch == 0) {
      const int end = left < chunk_vectors() ? left : chunk_vectors();
      FASTBN_KEEP_LOOP
      for (int i = thread(); i < end; i += threads(), where += threads()) use(where, load(where, 0));
    } else if (left >= chunk_vectors()) {
      FASTBN_UNROLL
      for (int u = 0; u < unroll; u += batch) {
        Item items[batch];
        FASTBN_UNROLL
        for (int i = 0; i < batch; ++i) items[i] = load(where + (u + i) * threads(), u + i);
        FASTBN_UNROLL
        for (int i = 0; i < batch; ++i) use(where + (u + i) * threads(), items[i]);
      }
    } else {
      // cold path
      FASTBN_UNROLL
      for (int u = 0; u < unroll; ++u) {
        if (u * threads() + thread() < left) use(where + u * threads(), load(where + u * threads(), u));
      }
      // end of cold path
    }
  }

  const Layout& layout_;
  const Plan& plan_;
  const StreamTiles& tiles_;
  const StreamRing<Map>& ring_;
  int column_ = 0, first_channel_ = 0;
};

}  // namespace fastbn::cuda
