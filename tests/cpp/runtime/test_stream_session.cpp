// What a CUDA stream waits for and what not, by a driver that needs no GPU.
#include "runtime/stream_session.h"

#include <array>
#include <atomic>
#include <functional>
#include <memory>
#include <stdexcept>
#include <thread>
#include <utility>

#include "fake_cuda.h"
#include "runtime/function_task.h"
#include "runtime_helpers.h"

using namespace ktmoe;
using namespace ktmoe::test;

namespace {

StreamTask task(std::function<void()> work) { return {std::make_shared<FunctionTask>(std::move(work)), {}}; }

struct Fixture {
  StreamCalls calls;
  std::shared_ptr<CPUInfer> engine = std::make_shared<CPUInfer>(2);
  void* stream = fake_cuda().create_stream();
  std::atomic<bool> is_open{false}, was_now{false}, was_later{false};

  StreamTask now() {
    return task([this] { was_now.store(true); });
  }
  // Is done when the gate is opened.
  StreamTask later() {
    return task([this] {
      becomes_true([this] { return is_open.load(); });
      was_later.store(true);
    });
  }
  void synchronize() { fake_cuda().synchronize(stream); }
  void finish() {
    is_open.store(true);
    engine->sync();
    calls.forget_happened();
  }
};

}  // namespace

TEST_CASE_FIXTURE(Fixture, "stream calls: a pass is waited for, what it defers is not") {
  calls.run(stream, engine, {now()}, {later()});
  synchronize();
  CHECK(was_now);
  CHECK(!was_later);
  finish();
  CHECK(was_later);
}

TEST_CASE_FIXTURE(Fixture, "stream calls: a sync that allows one task to be pending") {
  calls.submit(stream, engine, {now(), later()});
  calls.sync(stream, engine, 1);
  synchronize();
  CHECK(was_now);
  CHECK(!was_later);
  finish();
  CHECK(was_later);
}

TEST_CASE_FIXTURE(Fixture, "stream calls: a sync that allows none") {
  calls.submit(stream, engine, {now(), later()});
  calls.sync(stream, engine, 0);
  std::thread opens([this] {
    std::this_thread::sleep_for(milliseconds(50));
    is_open.store(true);
  });
  synchronize();
  CHECK(was_later);
  opens.join();
  finish();
}

TEST_CASE_FIXTURE(Fixture,
                  "stream calls: what a task throws waits for who asks, and its result is all ones") {
  std::array<std::byte, 8> result{};
  StreamTask wrong = task([] { throw std::out_of_range("wrong"); });
  wrong.result = result;
  calls.run(stream, engine, {wrong, now()}, {});
  synchronize();
  CHECK(was_now);
  for (const std::byte b : result) CHECK(b == std::byte{0xff});
  CHECK_THROWS_WITH_AS(calls.rethrow(), "wrong", std::out_of_range);
  calls.rethrow();
  finish();
}

TEST_CASE_FIXTURE(Fixture, "stream calls: what is held is let go when the stream has come there") {
  auto held = std::make_shared<int>(1);
  fake_cuda().stall(stream, 100);
  calls.hold(stream, held);
  calls.forget_happened();
  CHECK(held.use_count() == 2);
  synchronize();
  calls.forget_happened();
  CHECK(held.use_count() == 1);
  fake_cuda().capture(stream, true);
  calls.hold(stream, held);
  fake_cuda().capture(stream, false);
  calls.forget_happened();
  CHECK(held.use_count() == 2);  // a graph may come there at any time
  finish();
}
