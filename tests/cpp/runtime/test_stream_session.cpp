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

using Destroyer = StreamSession::Destroyer;

StreamTask task(std::function<void()> work) { return {std::make_shared<FunctionTask>(std::move(work)), {}}; }

struct Fixture {
  StreamSession session;
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
    session.release_done(Destroyer::kLockHolder);
  }
};

}  // namespace

TEST_CASE_FIXTURE(Fixture, "stream session: a pass is waited for, what it defers is not") {
  session.run(stream, engine, {now()}, {later()});
  synchronize();
  CHECK(was_now);
  CHECK(!was_later);
  finish();
  CHECK(was_later);
}

TEST_CASE_FIXTURE(Fixture, "stream session: a sync that allows one task to be pending") {
  session.submit(stream, engine, {now(), later()});
  session.sync(stream, engine, 1);
  synchronize();
  CHECK(was_now);
  CHECK(!was_later);
  finish();
  CHECK(was_later);
}

TEST_CASE_FIXTURE(Fixture, "stream session: a sync that allows none") {
  session.submit(stream, engine, {now(), later()});
  session.sync(stream, engine, 0);
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
                  "stream session: what a task throws waits for who asks, and its result is all ones") {
  std::array<std::byte, 8> result{};
  StreamTask wrong = task([] { throw std::out_of_range("wrong"); });
  wrong.result = result;
  session.run(stream, engine, {wrong, now()}, {});
  synchronize();
  CHECK(was_now);
  for (const std::byte b : result) CHECK(b == std::byte{0xff});
  CHECK_THROWS_WITH_AS(session.rethrow(), "wrong", std::out_of_range);
  session.rethrow();
  finish();
}

TEST_CASE_FIXTURE(Fixture, "stream session: an object lives until the stream has reached it") {
  auto kept = std::make_shared<int>(1);
  fake_cuda().stall(stream, 100);
  session.keep_alive(stream, kept, Destroyer::kLockHolder);
  session.release_done(Destroyer::kLockHolder);
  CHECK(kept.use_count() == 2);
  synchronize();
  session.release_done(Destroyer::kAnyThread);
  CHECK(kept.use_count() == 2);  // needs the lock of its owner
  session.release_done(Destroyer::kLockHolder);
  CHECK(kept.use_count() == 1);
  fake_cuda().capture(stream, true);
  session.keep_alive(stream, kept, Destroyer::kAnyThread);
  fake_cuda().capture(stream, false);
  session.release_done(Destroyer::kLockHolder);
  CHECK(kept.use_count() == 2);  // a graph may reach it at any time
  finish();
}

TEST_CASE_FIXTURE(Fixture, "stream session: what a callback refers to is destroyed by who may do so") {
  auto python = std::make_shared<int>(1), other = std::make_shared<int>(2);
  session.call(stream, [python] {}, {}, Destroyer::kLockHolder);
  session.call(stream, [other] { throw std::runtime_error("wrong"); }, {}, Destroyer::kAnyThread);
  synchronize();
  session.release_done(Destroyer::kAnyThread);
  CHECK(python.use_count() == 2);
  CHECK(other.use_count() == 1);
  session.release_done(Destroyer::kLockHolder);
  CHECK(python.use_count() == 1);
  CHECK_THROWS_WITH_AS(session.rethrow(), "wrong", std::runtime_error);
}

TEST_CASE_FIXTURE(Fixture,
                  "stream session: staging memory grows and stays until the stream is done with it") {
  std::byte* small = session.lease_staging(stream, 1).data();
  CHECK(session.lease_staging(stream, 100).data() == small);
  fake_cuda().stall(stream, 50);
  session.call(stream, [small] { small[0] = std::byte{1}; }, {}, Destroyer::kAnyThread);
  const size_t large = size_t{5} << 20;
  std::byte* grown = session.lease_staging(stream, large).data();
  grown[large - 1] = std::byte{2};
  session.release_done(Destroyer::kAnyThread);
  synchronize();
  session.release_done(Destroyer::kAnyThread);
  CHECK(session.lease_staging(stream, 1).data() == grown);
  void* another = fake_cuda().create_stream();
  CHECK(session.lease_staging(another, 1).data() != grown);
}
