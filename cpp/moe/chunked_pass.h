// A forward pass in chunks of tokens: its scratch memory is that of one chunk, however large the batch is.
// A token's result does not depend on the others, so the bits are those of the whole batch at once.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "moe/layer/interface.h"
#include "moe/plan/integers.h"

namespace ktmoe {

struct TokenRange {
  uint32_t first = 0, num = 0;
};

// Chunks of `chunk_size` tokens, the last one of the rest; 0: all tokens at once. An empty batch has one
// empty chunk, so that its arguments are checked too.
std::vector<TokenRange> cut_tokens(uint32_t num_tokens, uint32_t chunk_size);

// The arguments for some tokens of a batch.
ForwardArgs rows_of(const ForwardArgs& batch, const GeneralMOEConfig& config, TokenRange tokens);

class ChunkedPass {
 public:
  // The arrays are the caller's; `ids` [T, P] are computed with, not those of `args`.
  ChunkedPass(std::shared_ptr<MoE_Interface> layer, const ForwardArgs& args, Integers ids,
              uint32_t chunk_size);

  size_t num_chunks() const { return chunks_.size(); }

  // Computes a chunk; the first one must be first. Throws as MoE_Interface::forward does, and
  // std::out_of_range for a wrong id of any chunk: when a part of a batch is refused, none is computed.
  void compute(size_t chunk);

 private:
  void check_all_ids();

  std::shared_ptr<MoE_Interface> layer_;
  ForwardArgs args_;
  Integers ids_;
  std::vector<TokenRange> chunks_;
  std::atomic<bool> are_ids_checked_{false};  // since the first chunk: a CUDA graph may repeat the pass
};

}  // namespace ktmoe
