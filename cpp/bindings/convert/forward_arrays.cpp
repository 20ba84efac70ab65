#include "bindings/convert/forward_arrays.h"

#include "core/error.h"

namespace ktmoe::bindings {
namespace {

// The elements of row `first` on.
template <class T>
T* from_row(T* base, const Array& a, int64_t first) {
  using Byte = std::conditional_t<std::is_const_v<T>, const std::byte, std::byte>;
  const size_t row_bytes = static_cast<size_t>(a.shape(1)) * a.item_bytes();
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(base) + static_cast<size_t>(first) * row_bytes);
}

}  // namespace

ForwardArrays::ForwardArrays(const GeneralMOEConfig& c, nb::handle hidden_states, nb::handle topk_ids,
                             nb::handle topk_weights, nb::handle out, nb::handle skip_experts)
    : arrays_(std::make_shared<Arrays>()) {
  arrays_->reserve(7);
  const Array& x = arrays_->emplace_back(Array::read(hidden_states, "hidden_states"));
  x.expect({DType::kBf16}, {"T", c.hidden_size}).expect_contiguous();
  const int64_t batch = x.shape(0);
  const Array& ids = arrays_->emplace_back(Array::read(topk_ids, "topk_ids"));
  ids.expect({DType::kInt64}, {batch, c.num_experts_per_tok}).expect_contiguous();
  const Array& w = arrays_->emplace_back(Array::read(topk_weights, "topk_weights"));
  w.expect({DType::kFloat32}, {batch, c.num_experts_per_tok}).expect_contiguous();
  const Array& y = arrays_->emplace_back(Array::write(out, "out"));
  y.expect({DType::kBf16, DType::kFloat32}, {batch, c.hidden_size}).expect_contiguous();
  for (const Array* other : {&x, &ids, &w}) y.expect_disjoint(*other);
  if (batch * c.num_experts_per_tok > INT32_MAX)
    throw_invalid("hidden_states: got ", batch, " tokens, expected fewer in one call");

  args_.num_tokens = static_cast<uint32_t>(batch);
  args_.hidden_states = x.as<bf16>();
  args_.topk_ids = ids.as<int64_t>();
  args_.topk_weights = w.as<float>();
  args_.out = y.as<void>(), args_.out_type = float_type(y);
  if (!skip_experts.is_none()) {
    const Array& skip = arrays_->emplace_back(Array::read(skip_experts, "skip_experts"));
    // Libraries that know no bool export masks as uint8.
    const DType mask = skip.dtype() == DType::kUint8 ? DType::kUint8 : DType::kBool;
    skip.expect({mask}, {c.expert_num}).expect_contiguous();
    args_.skip_experts = skip.as<uint8_t>();
  }
}

void ForwardArrays::expect_disjoint_from(const Array& other) const {
  for (size_t i = 0; i < 4; ++i) other.expect_disjoint(array(i));
}

void ForwardArrays::add_to_out() { args_.base = args_.out, args_.base_type = args_.out_type; }

void ForwardArrays::add_to(nb::handle base) {
  const Array& b = arrays_->emplace_back(Array::read(base, "base"));
  b.expect({DType::kBf16, DType::kFloat32}, {out().shape(0), out().shape(1)}).expect_contiguous();
  out().expect_disjoint(b);
  args_.base = b.as<void>(), args_.base_type = float_type(b);
  base_row_bytes_ = static_cast<size_t>(b.shape(1)) * b.item_bytes();
}

void ForwardArrays::take_tokens(int64_t first, std::optional<int64_t> number) {
  const int64_t batch = args_.num_tokens;
  if (first < 0 || first > batch) throw_invalid("first_token: got ", first, ", expected 0 to ", batch);
  const int64_t tokens = number.value_or(batch - first);
  if (tokens < 0 || tokens > batch - first)
    throw_invalid("num_tokens: got ", tokens, ", expected 0 to ", batch - first);
  args_.num_tokens = static_cast<uint32_t>(tokens);
  args_.hidden_states = from_row(args_.hidden_states, array(0), first);
  args_.topk_ids = from_row(args_.topk_ids, array(1), first);
  args_.topk_weights = from_row(args_.topk_weights, array(2), first);
  const bool in_place = args_.base == args_.out;
  args_.out = static_cast<std::byte*>(args_.out) +
              static_cast<size_t>(first) * static_cast<size_t>(out().shape(1)) * out().item_bytes();
  if (in_place) {
    args_.base = args_.out;
  } else if (args_.base != nullptr) {
    args_.base = static_cast<const std::byte*>(args_.base) + static_cast<size_t>(first) * base_row_bytes_;
  }
}

void ForwardArrays::check_ids(const GeneralMOEConfig& c) const {
  check_expert_ids(array(1).as<int64_t>(), static_cast<uint32_t>(array(1).shape(0)),
                   static_cast<uint32_t>(c.num_experts_per_tok), static_cast<uint32_t>(c.expert_num));
}

}  // namespace ktmoe::bindings
