// Which rows each expert computes: the routing of a batch, turned from tokens to experts.
#pragma once

#include <cstdint>
#include <vector>

namespace ktmoe {

struct RoutingPlan {
  // The rows [begin, begin + rows) belong to `expert`.
  struct ExpertRows {
    uint32_t expert;
    uint32_t begin;
    uint32_t rows;
  };

  std::vector<ExpertRows> active;  // experts with rows, ascending
  std::vector<int32_t> token;      // row -> token, ascending within an expert
  std::vector<int32_t> row;        // [T, P]: slot -> row, or -1 for a slot that is skipped

  uint32_t num_rows() const { return static_cast<uint32_t>(token.size()); }

  // Skips negative ids and experts set in `skip` (null: none). Throws std::out_of_range for ids >=
  // num_experts.
  void build(const int64_t* ids, uint32_t num_tokens, uint32_t num_slots, uint32_t num_experts,
             const uint8_t* skip);

 private:
  std::vector<uint32_t> next_row_;  // scratch, [E]
};

// Throws std::out_of_range, naming the first id of num_experts or above.
void check_expert_ids(const int64_t* ids, uint32_t num_tokens, uint32_t num_slots, uint32_t num_experts);

}  // namespace ktmoe
