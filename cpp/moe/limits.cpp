#include "moe/limits.h"

#include <atomic>
#include <chrono>
#include <cstring>
#include <vector>

#include "core/aligned_buffer.h"

namespace ktmoe {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The sum over all threads of what `work` reports per second. The threads start together (or after a short
// wait when one is not scheduled), and each repeats its work until the time is over.
double total_rate(WorkerPool& pool, double seconds, FunctionRef<double(uint32_t)> work) {
  const uint32_t threads = static_cast<uint32_t>(pool.num_threads());
  std::atomic<uint32_t> ready{0};
  std::vector<double> rate(threads);
  pool.run(threads, [&](const Worker&, int, uint32_t i) {
    ready.fetch_add(1);
    const auto asked = Clock::now();
    while (ready.load() < threads && seconds_since(asked) < 0.1) {
    }
    const auto start = Clock::now();
    double done = 0;
    while (seconds_since(start) < seconds) done += work(i);
    rate[i] = done / seconds_since(start);
  });
  double sum = 0;
  for (double r : rate) sum += r;
  return sum;
}

}  // namespace

MachineLimits measure_limits(WorkerPool& pool, const kernels::KernelTable& table, double seconds,
                             bool is_integer) {
  constexpr size_t kBytes = size_t{128} << 20;  // of each thread, beyond any cache
  constexpr uint64_t kIterations = 2000;
  constexpr size_t kCachedBytes = 32 << 10;
  const uint32_t threads = static_cast<uint32_t>(pool.num_threads());

  std::vector<AlignedBuffer> memory(threads), cached(threads);
  pool.run(threads, [&](const Worker&, int, uint32_t i) {
    memory[i].reserve(kBytes);
    std::memset(memory[i].data(), 1, kBytes);
    cached[i].reserve(kCachedBytes);
    std::memset(cached[i].data(), 1, kCachedBytes);
  });

  MachineLimits limits;
  limits.read_bytes_per_s = total_rate(pool, seconds, [&](uint32_t i) {
    return static_cast<double>(table.limits.read(memory[i].data(), kBytes));
  });
  const auto& product = is_integer ? table.limits.int8 : table.limits.bf16;
  limits.dot_flop_per_s = total_rate(pool, seconds, [&](uint32_t) { return product.dot(kIterations); });
  limits.step_flop_per_s =
      total_rate(pool, seconds, [&](uint32_t i) { return product.step(kIterations, cached[i].data()); });
  return limits;
}

}  // namespace ktmoe
