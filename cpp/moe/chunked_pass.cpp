#include "moe/chunked_pass.h"

#include <algorithm>
#include <cstddef>

#include "moe/plan/routing_plan.h"

namespace ktmoe {
namespace {

size_t bytes_of(kernels::FloatType type) {
  return type == kernels::FloatType::kBf16 ? sizeof(bf16) : sizeof(float);
}

template <class T>
T* moved(T* base, size_t elements) {
  return base == nullptr ? nullptr : base + elements;
}

}  // namespace

std::vector<TokenRange> cut_tokens(uint32_t num_tokens, uint32_t chunk_size) {
  if (chunk_size == 0 || chunk_size >= num_tokens) return {{0, num_tokens}};
  std::vector<TokenRange> chunks;
  for (uint32_t first = 0; first < num_tokens; first += std::min(chunk_size, num_tokens - first))
    chunks.push_back({first, std::min(chunk_size, num_tokens - first)});
  return chunks;
}

ForwardArgs rows_of(const ForwardArgs& batch, const GeneralMOEConfig& config, TokenRange tokens) {
  const size_t rows = size_t{tokens.first} * static_cast<size_t>(config.hidden_size);
  const size_t routes = size_t{tokens.first} * static_cast<size_t>(config.num_experts_per_tok);
  ForwardArgs args = batch;
  args.num_tokens = tokens.num;
  args.is_later_chunk = batch.is_later_chunk || tokens.first != 0;
  args.hidden_states = moved(batch.hidden_states, rows);
  args.topk_ids = moved(batch.topk_ids, routes);
  args.topk_weights = moved(batch.topk_weights, routes);
  args.adapters = moved(batch.adapters, tokens.first);
  args.base = moved(static_cast<const std::byte*>(batch.base), rows * bytes_of(batch.base_type));
  args.out = moved(static_cast<std::byte*>(batch.out), rows * bytes_of(batch.out_type));
  args.deferred_ids = moved(batch.deferred_ids, routes);
  args.deferred_out = moved(batch.deferred_out, rows);
  return args;
}

ChunkedPass::ChunkedPass(std::shared_ptr<MoE_Interface> layer, const ForwardArgs& args, Integers ids,
                         uint32_t chunk_size)
    : layer_(std::move(layer)), args_(args), ids_(ids), chunks_(cut_tokens(args.num_tokens, chunk_size)) {}

void ChunkedPass::compute(size_t chunk) {
  const GeneralMOEConfig& config = layer_->config();
  if (chunk == 0) are_ids_checked_.store(false);
  if (!are_ids_checked_.load()) check_all_ids();
  const TokenRange tokens = chunks_[chunk];
  ForwardArgs args = rows_of(args_, config, tokens);
  const auto slots = static_cast<size_t>(config.num_experts_per_tok);
  std::vector<int64_t> converted;
  if (const auto* narrow = std::get_if<const int32_t*>(&ids_)) {
    const int32_t* begin = *narrow + tokens.first * slots;
    converted.assign(begin, begin + tokens.num * slots);
    args.topk_ids = converted.data();
  } else {
    args.topk_ids = std::get<const int64_t*>(ids_) + tokens.first * slots;
  }
  layer_->forward(args);
}

// A single chunk is checked by its own plan.
void ChunkedPass::check_all_ids() {
  const GeneralMOEConfig& config = layer_->config();
  const auto slots = static_cast<uint32_t>(config.num_experts_per_tok);
  const auto experts = static_cast<uint32_t>(config.expert_num);
  if (chunks_.size() > 1)
    std::visit([&](const auto* ids) { check_expert_ids(ids, args_.num_tokens, slots, experts); }, ids_);
  are_ids_checked_.store(true);
}

}  // namespace ktmoe
