// Which rows each expert computes: the routing of a batch, inverted from tokens to experts, and within an
// expert by the adapters of the tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace ktmoe {

// The adapter of each token of a batch, by number; negative: none.
struct TokenAdapters {
  const int32_t* number = nullptr;  // [T], or null: no token has one
  std::span<const uint8_t> exists;  // by number: whether there is such an adapter
};

struct RoutingPlan {
  // The rows [begin, begin + rows) belong to `expert`.
  struct ExpertRows {
    uint32_t expert;
    uint32_t begin;
    uint32_t rows;
  };
  // The rows [begin, begin + rows) of an expert belong to tokens with this adapter; negative: with none.
  struct AdapterRows {
    uint32_t begin;
    uint32_t rows;
    int32_t adapter;
  };

  std::vector<ExpertRows> active;    // experts with rows, ascending
  std::vector<AdapterRows> adapted;  // all rows, ascending; empty where tokens have no adapters
  std::vector<int32_t> token;        // row -> token, ascending within an expert and adapter
  std::vector<int32_t> row;          // [T, P]: slot -> row, or -1 for a slot that is skipped
  // [E]: slots with that id, also those that `skip` skips; of plans that are asked to count them.
  bool counts_slots = false;
  std::vector<uint32_t> expert_slots;

  uint32_t num_rows() const { return static_cast<uint32_t>(token.size()); }
  // The part of `adapted` that a row is in.
  const AdapterRows& adapted_at(size_t row) const;

  // Skips negative ids and experts set in `skip` (null: none). Throws std::out_of_range for ids >=
  // num_experts and for adapters that do not exist. Every id is read once, so the plan is consistent even if
  // another thread writes to `ids` or the adapters' numbers.
  void build(const int64_t* ids, uint32_t num_tokens, uint32_t num_slots, uint32_t num_experts,
             const uint8_t* skip, const TokenAdapters& adapters = {});

 private:
  void add_rows(uint32_t expert, uint32_t begin, uint32_t rows, int32_t adapter);
  void group_tokens(const TokenAdapters& adapters, uint32_t num_tokens);

  // Scratch. Tokens with one adapter are a group; group 0 has none.
  std::vector<int32_t> adapter_of_group_;
  std::vector<int32_t> group_of_adapter_;  // of all that exist
  std::vector<int32_t> group_;             // of each token
  std::vector<uint32_t> next_row_;         // [E, groups]
};

// Reads a value that another thread may write to. The compiler must not read it a second time after a check.
template <class T>
T read_once(const T* at) {
  return __atomic_load_n(at, __ATOMIC_RELAXED);
}

// Id i of a batch, read once. Throws std::out_of_range for num_experts or above.
int64_t read_expert_id(const int64_t* ids, size_t i, uint32_t num_slots, uint32_t num_experts);
[[noreturn]] void throw_wrong_expert(int64_t id, size_t i, uint32_t num_slots, uint32_t num_experts);

// Throws std::out_of_range, naming the first id of num_experts or above. This reports a mistake early; code
// that computes with the ids reads them again and has to check them again.
template <class Id>
void check_expert_ids(const Id* ids, uint32_t num_tokens, uint32_t num_slots, uint32_t num_experts) {
  const size_t num_ids = size_t{num_tokens} * num_slots;
  for (size_t i = 0; i < num_ids; ++i) {
    const int64_t id = read_once(ids + i);
    if (id >= num_experts) throw_wrong_expert(id, i, num_slots, num_experts);
  }
}

}  // namespace ktmoe
