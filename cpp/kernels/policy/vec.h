// What kernels require of vectors: the concept that `Vec` of every instruction set models. Kernels and
// formats use nothing else; what a policy has besides is for code of its own instruction set (bytes_*.h,
// nibbles_*.h, formats/*/*-inl.h).
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>

#include "core/types.h"

namespace ktmoe::kernels {

// bf16 dot products. A step is kStep elements of K; a register tile is kRowTile weight rows by kTokenTile
// rows of activations, with one vector accumulator per output.
template <class V>
concept Bf16Dots =
    requires(typename V::Acc& acc, const typename V::Segment& s, std::byte* p, size_t count,
             const typename V::Acc (&one)[1], const typename V::Acc (&rows)[V::kRowTile], float* out) {
      { V::kStep } -> std::convertible_to<size_t>;
      { V::kRowTile } -> std::convertible_to<int>;
      { V::kTokenTile } -> std::convertible_to<int>;
      { V::zero_acc() } -> std::same_as<typename V::Acc>;
      { V::load(p) } -> std::same_as<typename V::Segment>;                 // kStep bf16, unaligned
      { V::load_partial(p, count) } -> std::same_as<typename V::Segment>;  // fewer, then zeros
      V::store(p, s);       // exact: a segment's values are bf16
      V::dot(acc, s, s);    // acc += weights * activations, lane by lane
      V::reduce(one, out);  // the sum of an accumulator's lanes, always by the same tree
      V::reduce(rows, out);
    };

// Codes of int8, lookups by nibbles, and the segments that codes stand for: bf(code scale), rounded once.
template <class V>
concept CodeLookups =
    requires(const typename V::Codes& codes, const typename V::Segment& s, const std::byte* p, size_t count,
             const int8_t* table, const typename V::Numbers& numbers, typename V::Numbers& filled, int nibble,
             uint16_t bf16_bits, float scale) {
      { V::no_codes() } -> std::same_as<typename V::Codes>;
      { V::load_codes(p) } -> std::same_as<typename V::Codes>;  // kStep
      { V::load_codes_partial(p, count) } -> std::same_as<typename V::Codes>;
      { V::look_up(p, table) } -> std::same_as<typename V::Codes>;  // table[nibble], low nibbles first
      {
        V::look_up(p, table, table)
      } -> std::same_as<typename V::Bytes>;  // of 2 kStep nibbles, one table for each half
      // The same as bf16: from the codes in `table`, or from `numbers`, which holds the same table as bf16.
      filled.set(nibble, bf16_bits);
      { V::look_up_segment(p, table, numbers) } -> std::same_as<typename V::Segment>;
      // Whether looking up numbers that are scaled already is faster than scaling codes: LooksUpScaled.
      { V::kLooksUpScaled } -> std::convertible_to<bool>;
      { V::to_segment(codes) } -> std::same_as<typename V::Segment>;
      { V::to_segment(codes, scale) } -> std::same_as<typename V::Segment>;
      { V::times(s, scale) } -> std::same_as<typename V::Segment>;  // bf(x scale) of each element
    };

// Codes with one scale for each half: of policies whose steps are longer than the shortest group of a format.
template <class V>
concept ScalesHalves = requires(const typename V::Codes& codes, float scale) {
  { V::to_segment(codes, scale, scale) } -> std::same_as<typename V::Segment>;
};

// More lookups by nibbles, of policies with kLooksUpScaled.
template <class V>
concept LooksUpScaled = requires(const typename V::Float (&numbers)[16 / V::kWidth], const std::byte* p) {
  // bf(numbers[nibble]) of scaled numbers.
  { V::look_up_floats(p, numbers) } -> std::same_as<typename V::Segment>;
};

// Two segments at once by one table, where that is cheaper.
template <class V>
concept LooksUpTwo = requires(const typename V::Float (&numbers)[16 / V::kWidth], const std::byte* p,
                              const typename V::Numbers& table, typename V::Segment (&to)[2]) {
  V::look_up_two(p, V::table_of(numbers), to);
  V::look_up_two(p, V::table_of(table), to);
};

// int8 dot products, accumulated in int32; a step is 2 kStep elements.
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

// Products that sum over rows, two rows at a time: acc += a pair of the lhs, broadcast, * pairs of the rhs. A
// register tile is kPairRows rows of the lhs by kPairGroups groups of 16 columns.
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
      { V::half(p) } -> std::same_as<typename V::Float>;            // a float16, broadcast
      { V::load_half_at(p) } -> std::same_as<typename V::Float>;    // kWidth float16
      { V::int8_of(words, i) } -> std::same_as<typename V::Float>;  // int8 from the i-th on, eight per word
      V::to_floats(codes, parts);                                   // in order
      V::store_f(f, x);
      V::store_bf16(b, x);
      V::store_rounded(to, parts);  // kStep bf16
      // The same of codes times scales that went through without_payload: NaN are then rounded as numbers
      // are.
      V::store_scaled(to, parts);
      { V::without_payload(x) } -> std::same_as<typename V::Float>;
      { V::sum(x) } -> std::same_as<float>;  // of all lanes, by the tree of reduce
      { V::add(x, x) } -> std::same_as<typename V::Float>;
      { V::sub(x, x) } -> std::same_as<typename V::Float>;
      { V::mul(x, x) } -> std::same_as<typename V::Float>;
      { V::div(x, x) } -> std::same_as<typename V::Float>;
      { V::kFusesFma } -> std::convertible_to<bool>;  // fma rounds once
      { V::fma(x, x, x) } -> std::same_as<typename V::Float>;
      { V::clamp_above(x, x) } -> std::same_as<typename V::Float>;  // min(x, limit); a NaN in x is kept
      { V::clamp_below(x, x) } -> std::same_as<typename V::Float>;
      { V::abs(x) } -> std::same_as<typename V::Float>;
      { V::less(x, x) } -> std::same_as<typename V::Mask>;
      { V::select(mask, x, x) } -> std::same_as<typename V::Float>;
      { V::round(x) } -> std::same_as<typename V::Float>;     // to the nearest integer, ties to even
      { V::scale(x, x) } -> std::same_as<typename V::Float>;  // x 2^n for an integral n, rounded once
    };

// Quantizing. Magnitudes are compared as bits, so infinities and NaN are larger than any finite number.
template <class V>
concept Quantizes =
    requires(const typename V::Float& x, const typename V::Bits& bits, const std::byte* p, int8_t* codes) {
      { V::load_f_at(p) } -> std::same_as<typename V::Float>;
      { V::load_bf16_at(p) } -> std::same_as<typename V::Float>;
      { V::zero_bits() } -> std::same_as<typename V::Bits>;
      { V::larger_size(bits, x) } -> std::same_as<typename V::Bits>;
      { V::largest_size(bits) } -> std::same_as<float>;
      { V::join_whole(bits, x) } -> std::same_as<typename V::Bits>;  // bits or'ed with x as integers
      { V::join(bits) } -> std::same_as<uint32_t>;
      { V::largest(x) } -> std::same_as<float>;                   // x is not NaN
      { V::nearest_bf16(x) } -> std::same_as<typename V::Float>;  // x is not NaN
      V::store_int8(codes, x);  // rounded to integers; x lies in the range of int8
    };

// What measuring the machine's limits takes: memory is read into sums, and kPeakChains independent chains of
// products hide the latency of each.
template <class V>
concept Measures = requires(typename V::Sum& sum, const std::byte* p) {
  { V::kPeakChains } -> std::convertible_to<int>;
  V::add_to(sum, p);
};

template <class V>
concept VectorPolicy = Bf16Dots<V> && CodeLookups<V> && IntegerDots<V> && PairDots<V> && FloatLanes<V> &&
                       Quantizes<V> && Measures<V>;

// What targets with tiles require besides.
template <class V>
concept TileVectorPolicy =
    VectorPolicy<V> && requires(const typename V::Float& x, const std::byte* p, float* f, bf16* b) {
      { V::load_even(p) } -> std::same_as<typename V::Float>;  // the even ones of 2 kWidth bf16
      { V::load_odd(p) } -> std::same_as<typename V::Float>;
      { V::load_ints(f) } -> std::same_as<typename V::Float>;  // int32 values stored in a float array
      V::store_bf16_pairs(b, x, x);                            // b[2 i] = even[i], b[2 i + 1] = odd[i]
    };

}  // namespace ktmoe::kernels
