// Do the threads of a pool give the rows that one thread gives, and the first row that is wrong?
#include <doctest/doctest.h>

#include <limits>
#include <stdexcept>
#include <vector>

#include "quantize_helpers.h"
#include "runtime_helpers.h"

using namespace ktmoe;
using namespace ktmoe::test;

namespace {

Rows draw_rows(uint32_t n, uint32_t k) {
  Random random(70);
  Rows rows(n, std::vector<float>(k));
  for (auto& row : rows)
    for (float& x : row) x = random.unit();
  return rows;
}

}  // namespace

TEST_CASE("quantize_rows: any number of threads gives the bytes of the kernel") {
  // Several tasks, the last one short.
  const Weights weights(draw_rows(203, 900), FloatType::kBf16, Layout::kApart);
  for (const std::vector<int>& threads : {std::vector{1}, std::vector{3}, std::vector{1, 2}}) {
    WorkerPool pool(subpools(threads));
    for (FormatId format : kQuantizedFormats) {
      Quantized expected(format, weights.args()), got(format, weights.args(), 3);
      REQUIRE(expected.run(kernels::active_table()) == 203);
      QuantizeArgs args = got.args();
      args.group = 0;  // the format says it
      quantize_rows(format, args, pool);
      int wrong = !got.gaps_are_untouched();
      for (uint32_t n = 0; n < 203; ++n) wrong += got.row(n) != expected.row(n);
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("quantize_rows: the first row that is not finite is named, and stays as it was") {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  WorkerPool pool(subpools({3}));
  for (FloatType type : {FloatType::kBf16, FloatType::kFloat32}) {
    Weights weights(draw_rows(400, 1000), type, Layout::kTight);
    for (uint32_t row : {399u, 300u, 17u, 0u}) {
      weights.set(row, row % 7, row % 2 ? nan : -inf);
      if (row == 300) weights.set(row, 999, nan);
      Quantized result(FormatId::kInt4Group32, weights.args());
      const std::string message = message_of<std::invalid_argument>(
          [&] { quantize_rows(FormatId::kInt4Group32, result.args(), pool); });
      CHECK(message == "row " + std::to_string(row) + ": got " + (row == 0 ? "inf" : "nan") +
                           ", expected finite weights");
      CHECK(result.row(row) == result.untouched_row());
    }
  }
}

TEST_CASE("quantize_rows: a format that weights are not quantized to") {
  WorkerPool pool(subpools({1}));
  const std::string message = message_of<std::invalid_argument>(
      [&] { quantize_rows(FormatId::kQ4_0, kernels::QuantizeArgs{}, pool); });
  CHECK(message == "format: got q4_0, expected one that weights are quantized to");
}

TEST_CASE("quantize_rows: no rows and no columns are no work") {
  WorkerPool pool(subpools({2}));
  Weights weights(draw_rows(2, 4), FloatType::kBf16, Layout::kTight);
  for (FormatId format : kQuantizedFormats) {
    QuantizeArgs none = weights.args(), narrow = none;
    none.n = 0, narrow.k = 0;
    Quantized of_none(format, none), of_narrow(format, narrow);
    quantize_rows(format, of_none.args(), pool);
    quantize_rows(format, of_narrow.args(), pool);
  }
}

TEST_CASE("format_row_bytes: codes, and what lies behind them") {
  using F = FormatId;
  CHECK(format_row_bytes(F::kInt8, 77) == 77);
  CHECK(format_row_bytes(F::kInt8Group32, 77) == 77 + 3 * 4);
  CHECK(format_row_bytes(F::kInt4Group32, 77) == 39 + 3);
  CHECK(format_row_bytes(F::kInt4Group64, 77) == 39 + 2);
  CHECK(format_row_bytes(F::kInt4Group128, 77) == 39 + 1);
  for (F format : kQuantizedFormats) CHECK(format_row_bytes(format, 0) == 0);
}
