// Saved forward passes, and passes that are taken back at any time.
#include "sft/cache_stack.h"

#include <doctest/doctest.h>

#include <atomic>
#include <thread>

namespace ktmoe {
namespace {

using Stack = std::shared_ptr<CacheStack>;
using Call = std::shared_ptr<TrainingCall>;

Call call_of(const Stack& stack) { return std::make_shared<TrainingCall>(stack); }

// What a forward pass does when it is done; `number` tells it from others.
void save(const Stack& stack, const Call& call, uint32_t number) {
  CacheStack::Cache cache = stack->take_spare();
  cache->caller_id = number;
  cache->step = stack->step();
  stack->push(std::move(cache), call.get());
}

// And a backward pass: the number of the forward that it takes, 0 for none.
uint32_t use(const Stack& stack, const Call& call) {
  CacheStack::Cache cache = stack->take_last();
  if (cache == nullptr) return 0;
  const uint32_t number = cache->caller_id;
  stack->use_up(std::move(cache), call.get());
  return number;
}

TEST_CASE("cache stack: a forward pass that is taken back was never saved") {
  const auto stack = std::make_shared<CacheStack>(4);
  const Call before = call_of(stack), after = call_of(stack);
  save(stack, before, 1);
  CHECK(stack->step() == 1);
  after->revoke();
  CHECK(stack->step() == 1);
  before->revoke();
  CHECK(stack->size() == 0);
  CHECK(stack->step() == 0);

  CHECK(stack->is_revoked(after.get()));
  save(stack, after, 2);
  CHECK(stack->size() == 0);
  CHECK(stack->step() == 0);
  CHECK_FALSE(stack->is_revoked(nullptr));
}

TEST_CASE("cache stack: memory serves the next pass when no call can take the last one back") {
  const auto stack = std::make_shared<CacheStack>(1);
  for (const bool is_early : {true, false}) {
    const Call forward = call_of(stack), backward = call_of(stack);
    save(stack, forward, 1);
    const auto cache_of = [&] {
      CacheStack::Cache cache = stack->take_spare();
      const ForwardCache* address = cache.get();
      stack->give_back(std::move(cache));
      return address;
    };
    if (is_early) backward->finish();
    CHECK(use(stack, backward) == 1);
    backward->finish();
    CHECK(cache_of() == cache_of());
    backward->revoke();  // of no effect any more
    CHECK(stack->size() == 0);
  }
}

TEST_CASE("cache stack: others keep their order and their steps") {
  const auto stack = std::make_shared<CacheStack>(4);
  const Call calls[] = {call_of(stack), call_of(stack), call_of(stack)};
  for (uint32_t i = 0; i < 3; ++i) save(stack, calls[i], i + 1);
  calls[1]->revoke();
  CHECK(stack->step() == 3);
  const Call backward = call_of(stack), second = call_of(stack);
  CHECK(use(stack, backward) == 3);
  CHECK(use(stack, second) == 1);
  calls[0]->revoke();  // it was used: nothing is left to take back
  CHECK(stack->size() == 0);
  second->revoke();
  backward->revoke();
  CHECK(use(stack, nullptr) == 3);
  CHECK(use(stack, nullptr) == 1);
}

TEST_CASE("cache stack: a backward pass that is taken back while it runs") {
  const auto stack = std::make_shared<CacheStack>(4);
  save(stack, nullptr, 1);
  const Call call = call_of(stack);
  CacheStack::Cache cache = stack->take_last();
  CHECK(stack->size() == 1);  // it is not used up yet
  call->revoke();
  stack->use_up(std::move(cache), call.get());
  CHECK(stack->size() == 1);
  CHECK(use(stack, nullptr) == 1);
}

TEST_CASE("cache stack: memory that a call holds is spare when the call is gone") {
  const auto stack = std::make_shared<CacheStack>(1);
  CacheStack::Cache filled = stack->take_spare();
  const ForwardCache* const address = filled.get();
  stack->push(std::move(filled), nullptr);
  Call call = call_of(stack);
  use(stack, call);
  CHECK(stack->take_spare().get() != address);
  call.reset();
  CHECK(stack->take_spare().get() == address);
}

TEST_CASE("cache stack: what was used before all were forgotten does not come back") {
  const auto stack = std::make_shared<CacheStack>(2);
  for (const bool clears : {false, true}) {
    save(stack, nullptr, 1);
    const Call call = call_of(stack);
    use(stack, call);
    clears ? stack->clear() : stack->drop_waiting();
    call->revoke();
    CHECK(stack->size() == 0);
  }
}

TEST_CASE("cache stack: calls that another thread takes back meanwhile") {
  const auto stack = std::make_shared<CacheStack>(4);
  save(stack, nullptr, 1);
  for (int i = 0; i < 500; ++i) {
    const Call forward = call_of(stack), backward = call_of(stack);
    std::atomic<bool> starts{false};
    std::thread other([&] {
      starts = true;
      forward->revoke();
      backward->revoke();
    });
    while (!starts) {
    }
    if (!stack->is_revoked(forward.get())) save(stack, forward, 2);
    if (!stack->is_revoked(backward.get())) use(stack, backward);
    other.join();
    // The backward pass may have taken the other forward, or this one before it was taken back.
    CHECK(stack->size() >= 1);
    CHECK(stack->size() <= 2);
    while (stack->size() > 0) use(stack, nullptr);
    save(stack, nullptr, 1);
  }
}

}  // namespace
}  // namespace ktmoe
