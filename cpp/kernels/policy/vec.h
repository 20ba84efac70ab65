// What kernels ask of vectors: the concept that `Vec` of every instruction set models. Whatever is not in a
// group here is a policy's own affair.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>

#include "core/types.h"

namespace ktmoe::kernels {

// Dot products of bf16. A step is kStep elements of K; a register tile is kRowTile weight rows by kTokenTile
// rows of activations, an accumulator of lanes for each output.
template <class V>
concept Bf16Dots =
    requires(typename V::Acc& acc, const typename V::Segment& s, std::byte* p, size_t count,
             const typename V::Acc (&one)[1], const typename V::Acc (&rows)[V::kRowTile], float* out) {
      { V::kStep } -> std::convertible_to<size_t>;
      { V::kRowTile } -> std::convertible_to<int>;
      { V::kTokenTile } -> std::convertible_to<int>;
      { V::zero_acc() } -> std::same_as<typename V::Acc>;
      { V::load(p) } -> std::same_as<typename V::Segment>;                 // kStep bf16 at any address
      { V::load_partial(p, count) } -> std::same_as<typename V::Segment>;  // fewer, then zeros
      V::store(p, s);       // exact: a segment's values are bf16
      V::dot(acc, s, s);    // acc += weights * activations, by lanes
      V::reduce(one, out);  // the sum of an accumulator's lanes, by one tree
      V::reduce(rows, out);
    };

// Codes of int8 and nibbles, and the segments that they stand for: bf(code scale), rounded once.
template <class V>
concept CodeLookups =
    requires(const typename V::Codes& codes, const typename V::Segment& s, const std::byte* p, size_t count,
             const int8_t* table, const typename V::Numbers& numbers, float scale) {
      { V::no_codes() } -> std::same_as<typename V::Codes>;
      { V::load_codes(p) } -> std::same_as<typename V::Codes>;  // kStep
      { V::load_codes_partial(p, count) } -> std::same_as<typename V::Codes>;
      { V::look_up(p, table) } -> std::same_as<typename V::Codes>;  // table[nibble], low nibbles first
      {
        V::look_up(p, table, table)
      } -> std::same_as<typename V::Bytes>;  // of 2 kStep, a table for each half
      // The same as bf16: by the codes, or by `numbers`, which a table of bf16 was put in with Numbers::set.
      { V::look_up_segment(p, table, numbers) } -> std::same_as<typename V::Segment>;
      // Whether tables of scaled numbers are faster than codes times scales; then there are more ways to look
      // up.
      { V::kLooksUpScaled } -> std::convertible_to<bool>;
      { V::to_segment(codes) } -> std::same_as<typename V::Segment>;
      { V::to_segment(codes, scale) } -> std::same_as<typename V::Segment>;
      { V::times(s, scale) } -> std::same_as<typename V::Segment>;
      { V::e4m3_segment(p, scale) } -> std::same_as<typename V::Segment>;
    };

// Dot products of int8 into int32, steps of 2 kStep.
template <class V>
concept IntegerDots =
    requires(typename V::IntAcc& acc, const typename V::Bytes& x, const typename V::Codes& codes,
             std::byte* p, size_t count, const typename V::IntAcc (&one)[1], int32_t* out) {
      { V::kWeightOffset } -> std::convertible_to<int32_t>;  // what as_weights adds to each weight
      { V::zero_int() } -> std::same_as<typename V::IntAcc>;
      { V::load_bytes(p) } -> std::same_as<typename V::Bytes>;
      { V::load_bytes_partial(p, count) } -> std::same_as<typename V::Bytes>;
      V::store_bytes(p, x);
      { V::join(codes, codes) } -> std::same_as<typename V::Bytes>;
      { V::as_weights(x) } -> std::same_as<typename V::Bytes>;
      V::dot_bytes(acc, x, x);  // acc += weights * activations
      V::reduce_int(one, out);
    };

// Products that sum over rows, of pairs of them: acc += a pair of the lhs in all lanes * pairs of the rhs.
// A register tile is kPairRows rows of the lhs by kPairGroups groups of 16 columns.
template <class V>
concept PairDots =
    requires(typename V::Acc& acc, const typename V::Pairs& pairs, const std::byte* p, uint32_t pair) {
      { V::kPairRows } -> std::convertible_to<int>;
      { V::kPairGroups } -> std::convertible_to<int>;
      { V::load_pairs(p) } -> std::same_as<typename V::Pairs>;
      { V::broadcast_pair(pair) } -> std::same_as<typename V::Pairs>;
      V::dot_pairs(acc, pairs, pairs);
    };

// Elementwise float32, kWidth lanes.
template <class V>
concept FloatLanes =
    requires(const typename V::Float& x, const typename V::Mask& mask, float* f, bf16* b, const std::byte* p,
             std::byte* to, float value, const uint64_t* words, size_t i, const typename V::Codes& codes,
             typename V::Float (&parts)[V::kStep / V::kWidth]) {
      { V::kWidth } -> std::convertible_to<size_t>;
      { V::set(value) } -> std::same_as<typename V::Float>;
      { V::load_f(f) } -> std::same_as<typename V::Float>;
      { V::load_bf16(b) } -> std::same_as<typename V::Float>;
      { V::half(p) } -> std::same_as<typename V::Float>;            // a float16, in all lanes
      { V::load_half_at(p) } -> std::same_as<typename V::Float>;    // kWidth float16
      { V::int8_of(words, i) } -> std::same_as<typename V::Float>;  // int8 from the i-th on, eight in a word
      V::to_floats(codes, parts);
      V::store_f(f, x);
      V::store_bf16(b, x);
      V::store_rounded(to, parts);
      { V::sum(x) } -> std::same_as<float>;  // of all lanes, by the tree of reduce
      { V::add(x, x) } -> std::same_as<typename V::Float>;
      { V::sub(x, x) } -> std::same_as<typename V::Float>;
      { V::mul(x, x) } -> std::same_as<typename V::Float>;
      { V::div(x, x) } -> std::same_as<typename V::Float>;
      { V::kFusesFma } -> std::convertible_to<bool>;  // fma rounds once
      { V::fma(x, x, x) } -> std::same_as<typename V::Float>;
      { V::clamp_above(x, x) } -> std::same_as<typename V::Float>;  // min(x, limit); a NaN in x comes through
      { V::clamp_below(x, x) } -> std::same_as<typename V::Float>;
      { V::abs(x) } -> std::same_as<typename V::Float>;
      { V::less(x, x) } -> std::same_as<typename V::Mask>;
      { V::select(mask, x, x) } -> std::same_as<typename V::Float>;
      { V::round(x) } -> std::same_as<typename V::Float>;     // to the nearest integer, even ones first
      { V::scale(x, x) } -> std::same_as<typename V::Float>;  // x 2^n for a whole n, rounded once
    };

// Quantizing: sizes are compared as bits, so that infinities and NaN are larger than any number.
template <class V>
concept Quantizes =
    requires(const typename V::Float& x, const typename V::Bits& bits, const std::byte* p, int8_t* codes) {
      { V::load_f_at(p) } -> std::same_as<typename V::Float>;
      { V::load_bf16_at(p) } -> std::same_as<typename V::Float>;
      { V::zero_bits() } -> std::same_as<typename V::Bits>;
      { V::larger_size(bits, x) } -> std::same_as<typename V::Bits>;
      { V::largest_size(bits) } -> std::same_as<float>;
      { V::join_whole(bits, x) } -> std::same_as<typename V::Bits>;  // bits or'ed with whole numbers
      { V::join(bits) } -> std::same_as<uint32_t>;
      { V::largest(x) } -> std::same_as<float>;
      { V::nearest_bf16(x) } -> std::same_as<typename V::Float>;
      V::store_int8(codes, x);  // rounded, in the range of int8
    };

// What measuring the machine takes: memory read into sums, and enough chains of products to hide their
// latency.
template <class V>
concept Measures = requires(typename V::Sum& sum, const std::byte* p) {
  { V::kPeakChains } -> std::convertible_to<int>;
  V::add_to(sum, p);
};

template <class V>
concept VectorPolicy = Bf16Dots<V> && CodeLookups<V> && IntegerDots<V> && PairDots<V> && FloatLanes<V> &&
                       Quantizes<V> && Measures<V>;

// What tile targets ask for beside.
template <class V>
concept TileVectorPolicy =
    VectorPolicy<V> && requires(const typename V::Float& x, const std::byte* p, float* f, bf16* b) {
      { V::load_even(p) } -> std::same_as<typename V::Float>;  // every second of 2 kWidth bf16
      { V::load_odd(p) } -> std::same_as<typename V::Float>;
      { V::load_ints(f) } -> std::same_as<typename V::Float>;  // int32 in the memory of floats
      V::store_bf16_pairs(b, x, x);                            // b[2 i] = even[i], b[2 i + 1] = odd[i]
    };

}  // namespace ktmoe::kernels
