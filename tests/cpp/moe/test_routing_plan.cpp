// Does the plan give every slot the row of its expert, and no other?
#include "moe/plan/routing_plan.h"

#include <doctest/doctest.h>

#include <atomic>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "runtime_helpers.h"

using ktmoe::RoutingPlan;
using ktmoe::test::message_of;
using Ids = std::vector<int64_t>;
using Rows = std::vector<int32_t>;

namespace {

// What the plan must be, stated by its definition: rows are sorted by expert, then by slot of the batch.
void check_plan(const RoutingPlan& plan, const Ids& ids, uint32_t slots, uint32_t experts,
                const uint8_t* skip) {
  Rows token, row(ids.size(), -1);
  std::vector<RoutingPlan::ExpertRows> active;
  for (uint32_t e = 0; e < experts; ++e) {
    const uint32_t begin = static_cast<uint32_t>(token.size());
    if (skip == nullptr || !skip[e]) {
      for (size_t i = 0; i < ids.size(); ++i) {
        if (ids[i] != e) continue;
        row[i] = static_cast<int32_t>(token.size());
        token.push_back(static_cast<int32_t>(i / slots));
      }
    }
    if (token.size() > begin) active.push_back({e, begin, static_cast<uint32_t>(token.size()) - begin});
  }
  CHECK(plan.row == row);
  CHECK(plan.token == token);
  CHECK(plan.num_rows() == token.size());
  REQUIRE(plan.active.size() == active.size());
  for (size_t a = 0; a < active.size(); ++a) {
    CHECK(plan.active[a].expert == active[a].expert);
    CHECK(plan.active[a].begin == active[a].begin);
    CHECK(plan.active[a].rows == active[a].rows);
  }
}

}  // namespace

TEST_CASE("routing plan: an example") {
  const Ids ids{2, 0,   // token 0
                0, 2,   // token 1
                3, 3};  // token 2: an expert may be named twice, and then counts twice
  RoutingPlan plan;
  plan.build(ids.data(), 3, 2, 4, nullptr);
  CHECK(plan.token == Rows{0, 1, 0, 1, 2, 2});
  CHECK(plan.row == Rows{2, 0, 1, 3, 4, 5});
  REQUIRE(plan.active.size() == 3);
  CHECK(plan.active[1].expert == 2);
  CHECK(plan.active[1].begin == 2);
  CHECK(plan.active[1].rows == 2);
}

TEST_CASE("routing plan: random batches, with skipped ids and experts, in one reused plan") {
  std::mt19937 random(2);
  RoutingPlan plan;
  for (int i = 0; i < 300; ++i) {
    const uint32_t tokens = random() % 20, slots = 1 + random() % 9, experts = 1 + random() % 12;
    std::vector<uint8_t> skip(experts);
    for (uint8_t& s : skip) s = random() % 3 == 0 ? static_cast<uint8_t>(1 + random() % 255) : 0;
    Ids ids(size_t{tokens} * slots);
    for (int64_t& id : ids) id = random() % 8 == 0 ? -1 - static_cast<int64_t>(random()) : random() % experts;
    const uint8_t* mask = random() % 2 ? skip.data() : nullptr;
    plan.build(ids.data(), tokens, slots, experts, mask);
    check_plan(plan, ids, slots, experts, mask);
  }
}

TEST_CASE("routing plan: an empty batch and a batch of which all is skipped have no rows") {
  RoutingPlan plan;
  plan.build(nullptr, 0, 8, 16, nullptr);
  check_plan(plan, {}, 8, 16, nullptr);
  const Ids ids{-1, -7, INT64_MIN, -1};
  plan.build(ids.data(), 2, 2, 16, nullptr);
  check_plan(plan, ids, 2, 16, nullptr);
}

TEST_CASE(
    "routing plan: an id beyond the experts is an error that says where, and a skip mask does not hide it") {
  const Ids ids{0, 1, 2, -1, 5, 0};
  const std::vector<uint8_t> skip(5, 1);
  RoutingPlan plan;
  for (const uint8_t* mask : {static_cast<const uint8_t*>(nullptr), skip.data()}) {
    CHECK(message_of<std::out_of_range>([&] { plan.build(ids.data(), 3, 2, 5, mask); }) ==
          "topk_ids: got expert 5 at [2, 0], expected ids below 5 (negative ids are skipped)");
  }
  const Ids huge{INT64_MAX};
  CHECK_THROWS_AS(plan.build(huge.data(), 1, 1, 5, nullptr), std::out_of_range);

  const Ids good{4, 0, 2, -1, 1, 0};  // the failed attempts left nothing behind
  plan.build(good.data(), 3, 2, 5, nullptr);
  check_plan(plan, good, 2, 5, nullptr);
}

TEST_CASE("routing plan: ids that change while it is built leave it consistent") {
  constexpr uint32_t kTokens = 64, kSlots = 8, kExperts = 32;
  Ids ids(kTokens * kSlots, 0);
  std::atomic<bool> stop{false};
  std::thread writer([&] {
    std::mt19937 random(1);
    while (!stop.load())
      std::atomic_ref(ids[random() % ids.size()])
          .store(static_cast<int64_t>(random() % (kExperts + 1)) - 1, std::memory_order_relaxed);
  });
  size_t wrong = 0;
  RoutingPlan plan;
  for (int i = 0; i < 3000; ++i) {
    plan.build(ids.data(), kTokens, kSlots, kExperts, nullptr);
    // Every row is taken by one slot, of the row's token, and the experts' rows are all rows.
    std::vector<int> taken(plan.num_rows(), 0);
    for (size_t slot = 0; slot < plan.row.size(); ++slot) {
      const int32_t row = plan.row[slot];
      if (row < 0) continue;
      const bool exists = row < static_cast<int32_t>(taken.size());
      wrong += !exists || plan.token[static_cast<size_t>(row)] != static_cast<int32_t>(slot / kSlots);
      if (exists) ++taken[static_cast<size_t>(row)];
    }
    for (int times : taken) wrong += times != 1;
    uint32_t rows = 0;
    for (const auto& expert : plan.active) rows += expert.rows;
    wrong += rows != plan.num_rows();
  }
  stop.store(true);
  writer.join();
  CHECK(wrong == 0);
}

TEST_CASE("routing plan: rows of an expert by adapter") {
  const Ids ids{1, 0,   // token 0, adapter 4
                1, 1,   // token 1, none
                0, 1,   // token 2, adapter 2
                1, -1,  // token 3, adapter 4
                1, 0};  // token 4, none: every negative number says so
  const Rows adapter{4, -1, 2, 4, -9};
  const std::vector<uint8_t> exists{0, 0, 1, 0, 1};
  RoutingPlan plan;
  plan.build(ids.data(), 5, 2, 2, nullptr, {adapter.data(), exists});
  using Parts = std::vector<std::vector<int64_t>>;
  Parts active, adapted;
  for (const auto& rows : plan.active) active.push_back({rows.expert, rows.begin, rows.rows});
  for (const auto& rows : plan.adapted) adapted.push_back({rows.adapter, rows.begin, rows.rows});
  CHECK(active == Parts{{0, 0, 3}, {1, 3, 6}});
  CHECK(adapted == Parts{{-1, 0, 1}, {2, 1, 1}, {4, 2, 1}, {-1, 3, 3}, {2, 6, 1}, {4, 7, 2}});
  for (const auto& rows : plan.adapted)
    for (uint32_t row = rows.begin; row < rows.begin + rows.rows; ++row)
      CHECK(&plan.adapted_at(row) == &rows);
  CHECK(plan.token == Rows{4, 2, 0, 1, 1, 4, 2, 0, 3});
  CHECK(plan.row == Rows{7, 2, 3, 4, 1, 6, 8, -1, 5, 0});

  // No adapter of a batch means nothing for the next one.
  plan.build(ids.data(), 5, 2, 2, nullptr);
  check_plan(plan, ids, 2, 2, nullptr);
  CHECK(plan.adapted.empty());
}

TEST_CASE("routing plan: adapters that do not exist") {
  const Ids ids{0, 0, 0};
  const std::vector<uint8_t> exists{1, 0};
  RoutingPlan plan;
  const auto message = [&](const Rows& adapter) {
    return message_of<std::out_of_range>(
        [&] { plan.build(ids.data(), 3, 1, 1, nullptr, {adapter.data(), exists}); });
  };
  CHECK(message({0, -1, 1}) ==
        "adapters: got 1 at [2], expected the number of a loaded adapter, or a negative one for none");
  CHECK(message({2, 0, 0}).find("got 2 at [0]") != std::string::npos);
  CHECK(message({0, 2147483647, 0}).find("got 2147483647 at [1]") != std::string::npos);
}
