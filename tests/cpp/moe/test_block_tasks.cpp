// Is the work of a layer cut into blocks that cover it exactly once, and that the kernels may be given?
#include "moe/plan/block_tasks.h"

#include <doctest/doctest.h>

#include <random>
#include <vector>

#include "kernels/contract.h"

using namespace ktmoe;
using kernels::kMaxCallOutputs;
using kernels::kMaxCallRows;
using kernels::kOutputBlock;

namespace {

RoutingPlan plan_of(const std::vector<uint32_t>& rows_of_experts) {
  RoutingPlan plan;
  uint32_t begin = 0;
  for (uint32_t e = 0; e < rows_of_experts.size(); ++e) {
    if (rows_of_experts[e] == 0) continue;
    plan.active.push_back({e, begin, rows_of_experts[e]});
    begin += rows_of_experts[e];
  }
  plan.token.resize(begin);
  return plan;
}

// How often each (row of expert, output) is covered: all once, none beyond.
void check_cover(const RoutingPlan& plan, Span outputs, const std::vector<BlockTask>& tasks) {
  std::vector<std::vector<uint8_t>> times;
  for (const auto& expert : plan.active) times.emplace_back(size_t{expert.rows} * outputs.size());
  int outside = 0;
  for (const BlockTask& t : tasks) {
    REQUIRE(t.active < plan.active.size());
    for (uint32_t m = t.m0; m < t.m1; ++m) {
      for (uint32_t n = t.n0; n < t.n1; ++n) {
        const bool inside = m < plan.active[t.active].rows && n >= outputs.begin && n < outputs.end;
        if (inside)
          ++times[t.active][size_t{m} * outputs.size() + n - outputs.begin];
        else
          ++outside;
      }
    }
  }
  CHECK(outside == 0);
  size_t not_once = 0;
  for (const auto& expert : times)
    for (uint8_t n : expert) not_once += n != 1;
  CHECK(not_once == 0);
}

// The preconditions of contract.h for a block.
void check_preconditions(const std::vector<BlockTask>& tasks, const RoutingPlan& plan, uint32_t outputs_end,
                         uint32_t k, bool whole_blocks = true) {
  int wrong = 0;
  for (const BlockTask& t : tasks) {
    wrong += t.m0 >= t.m1 || t.n0 >= t.n1;
    wrong += (whole_blocks && t.m0 % kOutputBlock != 0) || t.n0 % (kOutputBlock / 2) != 0;
    wrong += t.m1 - t.m0 > std::min(kMaxCallRows, most_rows_per_block(k)) || t.n1 - t.n0 > kMaxCallOutputs;
    // A pair of outputs, or a tile of rows, is in two blocks only if it does not exist.
    wrong += t.n1 != outputs_end && t.n1 % (kOutputBlock / 2) != 0;
    wrong += whole_blocks && t.m1 != plan.active[t.active].rows && t.m1 % kOutputBlock != 0;
  }
  CHECK(wrong == 0);
}

}  // namespace

TEST_CASE("blocks: rows are a multiple of kOutputBlock and within the kernels' limit, whatever K") {
  for (uint32_t k = 1; k <= (1u << 24); k = k < 5000 ? k + 1 : k * 2 + 1) {
    const uint32_t rows = rows_per_block(k);
    CHECK(rows % kOutputBlock == 0);
    CHECK(rows >= kOutputBlock);
    CHECK(rows <= kMaxCallRows);
  }
}

TEST_CASE("blocks: every row and output once, preconditions kept, whatever the shape") {
  std::mt19937 random(3);
  const uint32_t widths[] = {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 200, 704};
  const uint32_t inputs[] = {1, 64, 704, 2048, 4096, 7168, 18432};
  std::vector<BlockTask> tasks;
  for (int i = 0; i < 400; ++i) {
    std::vector<uint32_t> rows(1 + random() % 8);
    for (uint32_t& r : rows) r = random() % 3 == 0 ? 0 : 1 + random() % (random() % 4 == 0 ? 1000 : 70);
    const RoutingPlan plan = plan_of(rows);
    const uint32_t begin = random() % 4 * kOutputBlock;
    const Span outputs{begin, begin + widths[random() % std::size(widths)]};
    const uint32_t k = inputs[random() % std::size(inputs)];
    const int threads = 1 + static_cast<int>(random() % 300);
    CAPTURE(outputs.begin);
    CAPTURE(outputs.end);
    CAPTURE(k);
    CAPTURE(threads);
    cut_blocks(plan, outputs, k, threads, tasks);
    check_cover(plan, outputs, tasks);
    check_preconditions(tasks, plan, outputs.end, k);
  }
}

TEST_CASE(
    "blocks: an expert's blocks follow each other, rows first, so that packed activations are met again") {
  const RoutingPlan plan = plan_of({300, 0, 20});
  std::vector<BlockTask> tasks;
  cut_blocks(plan, {0, 160}, 2048, 2, tasks);
  for (size_t i = 1; i < tasks.size(); ++i) {
    const BlockTask &a = tasks[i - 1], &b = tasks[i];
    const bool in_order =
        a.active < b.active || (a.active == b.active && (a.m0 < b.m0 || (a.m0 == b.m0 && a.n0 < b.n0)));
    CHECK(in_order);
  }
}

TEST_CASE("blocks: more threads get more, narrower blocks") {
  const RoutingPlan plan = plan_of({4});
  std::vector<BlockTask> few, many;
  cut_blocks(plan, {0, 768}, 2048, 1, few);
  cut_blocks(plan, {0, 768}, 2048, 64, many);
  CHECK(few.front().n1 == kOutputBlock);
  CHECK(many.front().n1 == kOutputBlock / 2);
}

TEST_CASE("blocks: no rows or no outputs give no blocks, and old ones go") {
  std::vector<BlockTask> tasks{{0, 0, 1, 0, 1}};
  cut_blocks(plan_of({}), {0, 64}, 64, 4, tasks);
  CHECK(tasks.empty());
  tasks.resize(1);
  cut_blocks(plan_of({5}), {64, 64}, 64, 4, tasks);
  CHECK(tasks.empty());
  tasks.resize(1);
  cut_tokens(0, {0, 64}, 4, tasks);
  CHECK(tasks.empty());
}

TEST_CASE("tokens: every token and column once") {
  std::vector<BlockTask> tasks;
  for (uint32_t tokens : {1u, 2u, 7u, 8u, 9u, 64u, 100u, 700u}) {
    for (uint32_t width : {1u, 32u, 511u, 512u, 513u, 1500u}) {
      for (int threads : {1, 2, 16, 300}) {
        const Span columns{64, 64 + width};
        cut_tokens(tokens, columns, threads, tasks);
        check_cover(plan_of({tokens}), columns, tasks);
      }
    }
  }
}

TEST_CASE("shares: they follow each other, cover all, are cut at multiples and are nearly equal") {
  for (uint32_t total : {0u, 1u, 31u, 32u, 33u, 64u, 704u, 2048u, 18433u}) {
    for (uint32_t multiple : {1u, 16u, 32u}) {
      for (uint32_t parts : {1u, 2u, 3u, 8u, 64u}) {
        uint32_t end = 0, least = UINT32_MAX, most = 0;
        for (uint32_t i = 0; i < parts; ++i) {
          const Span share = share_of(total, multiple, i, parts);
          CHECK(share.begin == end);
          CHECK((share.begin % multiple == 0 || share.begin == total));
          CHECK(share.end >= share.begin);
          end = share.end;
          least = std::min(least, share.size()), most = std::max(most, share.size());
        }
        CHECK(end == total);
        CHECK(most - least <= 2 * multiple);  // the last one may end early
      }
    }
  }
}

TEST_CASE("blocks with one adapter each take the weights of an expert one after the other") {
  RoutingPlan plan = plan_of({3, 75, 5});
  plan.adapted = {{0, 3, -1}, {3, 70, -1}, {73, 5, 0}, {78, 1, -1}, {79, 2, 0}, {81, 2, 3}};
  std::vector<BlockTask> tasks, of_any;
  cut_blocks(plan, {0, 200}, 64, 1, tasks, {}, BlockAdapters::kOne);
  check_cover(plan, {0, 200}, tasks);
  check_preconditions(tasks, plan, 200, 64, /*whole_blocks=*/false);
  for (const BlockTask& task : tasks) {
    const uint32_t begin = plan.active[task.active].begin;
    CHECK(&plan.adapted_at(begin + task.m0) == &plan.adapted_at(begin + task.m1 - 1));
  }
  for (size_t i = 1; i < tasks.size(); ++i) {
    CHECK(tasks[i - 1].active <= tasks[i].active);
    if (tasks[i - 1].active == tasks[i].active) CHECK(tasks[i - 1].n0 <= tasks[i].n0);
  }
  cut_blocks(plan, {0, 200}, 64, 1, of_any);
  check_cover(plan, {0, 200}, of_any);
  CHECK(of_any.size() < tasks.size());
}
