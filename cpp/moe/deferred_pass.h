// Passes of layers that defer experts: of each token the experts with the smallest weights are computed while
// the caller already continues, and the next layer's output begins with their sum.
//
// A pass is a round of steps, in this order, each of them a task of the engine or part of one. A pass of a
// CUDA stream is created once and runs any number of rounds.
//
//   step             what it does
//   ---------------  -----------------------------------------------------------------------------------
//   split            reads ids, weights and the number of tokens, once; divides the experts of each token
//   immediate chunk  out = deferred output of the previous layer + immediate experts, of a chunk of tokens
//   deferred chunk   deferred output = deferred experts, of a chunk of tokens
//
//   state     entered by                              immediate chunk         deferred chunk
//   --------  --------------------------------------  ----------------------  -----------------------
//   unsplit   construction                            throws                  throws
//   separate  split                                   immediate experts       deferred experts
//   joint     split: the two parts share experts,     both, to two sums: the  nothing is left to do
//             whose weights would be read twice       weights are read once
//   failed    an exception of any step, which that    nothing                 nothing
//             step throws
//
// Split begins a new round from every state. The deferred output is ready behind the last deferred chunk, or
// when joint behind the last immediate one, or when the round fails: then it is NaN and has the round's
// error, with which the pass that receives it fails in turn.
//
//   user                   runs                        waits for         passes the deferred output on by
//   ---------------------  --------------------------  ----------------  -----------------------------------
//   host (passes/host)     all steps as tasks          split, immediate  a chain of layers, for each thread
//   or
//                                                                        pass; an interrupt puts back what
//                                                                        the pass received, steps that are
//                                                                        queued run all the same
//   CUDA stream            all steps as tasks that     split, immediate  a chain of layers, for each stream;
//   (passes/stream_runner) the stream starts           (the stream does) failed: results are NaN
//   XLA (xla/deferred)     split in the call, the      split, immediate  a number that the program has; a
//                          others as tasks                               split that fails leaves it unused
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <vector>

#include "core/function_ref.h"
#include "moe/chunked_pass.h"
#include "moe/layer/interface.h"
#include "moe/plan/split_slots.h"

namespace ktmoe {

// A layer's output for the next one: its deferred experts, weighted and summed. The creator of the pass owns
// the memory.
class DeferredOutput {
 public:
  DeferredOutput(float* sums, const GeneralMOEConfig& config, uint32_t num_tokens)
      : sums_(sums),
        layer_idx_(config.layer_idx),
        hidden_size_(config.hidden_size),
        num_tokens_(num_tokens) {}

  float* sums() const { return sums_; }  // [T, H]
  int64_t layer_idx() const { return layer_idx_; }
  int64_t hidden_size() const { return hidden_size_; }
  uint32_t num_tokens() const { return num_tokens_; }

  // Throws std::invalid_argument when it is of other sizes.
  void check_shape(uint32_t num_tokens, int64_t hidden_size) const;

  // Sleeps until it is ready. Not needed after waiting by the engine's tickets.
  void wait_until_ready() const { is_ready_.wait(false); }

  // When it is ready: throws the exception of the pass that failed.
  void rethrow() const;
  void round_to(bf16* out) const;  // [T, H], the end of a chain

 private:
  friend class DeferredPass;
  void begin();
  void finish();
  void fail(std::exception_ptr error);

  float* sums_;
  int64_t layer_idx_, hidden_size_;
  uint32_t num_tokens_;
  std::exception_ptr error_;
  std::atomic<bool> is_ready_{false};
};

// The arrays of a pass, all of them the caller's.
struct DeferringBatch {
  ForwardArgs args;                  // without ids
  Integers ids;                      // [T, P]
  Integers num_used_tokens;          // one number, or null: tokens from it on are computed with no expert
  uint32_t num_deferred = 0;         // experts of each token
  uint32_t chunk_size = 0;           // tokens, as of cut_tokens
  int64_t* immediate_ids = nullptr;  // [T, P], scratch of the pass
  int64_t* deferred_ids = nullptr;   // the same; null when no expert is deferred
  // [T, H] and [T, P]: where hidden states and weights are copied to for the deferred part. Null: these stay
  // as they are until that has run.
  bf16* copied_hidden_states = nullptr;
  float* copied_weights = nullptr;
};

class DeferredPass {
 public:
  // `received`: the deferred output of the previous layer, or null. `output`: where to write that of this
  // layer; null when no expert is deferred. Throws std::invalid_argument when `received` has other
  // sizes than the batch.
  DeferredPass(std::shared_ptr<MoE_Interface> layer, const DeferringBatch& batch,
               std::shared_ptr<const DeferredOutput> received, std::shared_ptr<DeferredOutput> output);

  size_t num_chunks() const { return chunks_.size(); }
  const std::shared_ptr<DeferredOutput>& output() const { return output_; }

  // Throws std::out_of_range for a wrong id now, before anything is queued. Split checks again the ids that
  // it reads.
  void check_ids() const;

  // The steps. Throws as SlotSplit::run and MoE_Interface::forward do, and the error of `received`;
  // std::runtime_error for a part before the first split.
  void split();
  void compute_immediate(size_t chunk);
  void compute_deferred(size_t chunk);

  bool is_joint() const { return state_.load() == State::kJoint; }

 private:
  enum class State : uint8_t { kUnsplit, kSeparate, kJoint, kFailed };

  SlotSplit make_split() const;
  void do_step(FunctionRef<void()> step);
  bool can_compute() const;
  void copy_inputs() const;
  bool is_last(size_t chunk) const { return chunk + 1 == chunks_.size(); }

  const std::shared_ptr<MoE_Interface> layer_;
  const DeferringBatch batch_;
  const std::shared_ptr<const DeferredOutput> received_;
  const std::shared_ptr<DeferredOutput> output_;
  const std::vector<TokenRange> chunks_;
  std::mutex mutex_;  // a pass does one step at a time, should two engines be given tasks of it
  std::atomic<State> state_{State::kUnsplit};
};

}  // namespace ktmoe
