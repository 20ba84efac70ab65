// An expert's weights as devices take them that share its intermediate size: cut in slices of that size, each
// with its rows of gate and up and its columns of down, in the encoding that the layer holds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "formats/format.h"
#include "moe/layer/config.h"
#include "moe/plan/panel_tasks.h"
#include "runtime/worker_pool.h"

namespace ktmoe {

// What the projections of a layer are encoded as; without a gate, up is as gate is.
struct alignas(4) ProjectionFormats {
  FormatId gate = FormatId::kBf16, up = FormatId::kBf16, down = FormatId::kBf16;
  bool operator==(const ProjectionFormats&) const = default;
};

// Sizes of the arrays that are a slice of gate and up, or of down.
struct SliceShape {
  FormatId format;
  uint32_t num_rows;
  size_t row_bytes;
  uint32_t num_scale_rows;  // of scales that lie apart; 0: there are none
  size_t scale_bytes;       // of a row of those
  bool has_row_scale;       // a float32 a row
};

// Gate and up in one, the former first, and down.
struct SliceShapes {
  SliceShape w13, w2;
};

// Throws std::invalid_argument, which names `gpu_tp_count`, when the intermediate size has no such slices,
// and when gate and up differ in their format.
SliceShapes shapes_of_slices(const GeneralMOEConfig& config, const ProjectionFormats& formats,
                             int64_t num_slices);

// Where a slice goes; null: there is no such array.
struct SliceArrays {
  std::byte *weights = nullptr, *scales = nullptr, *row_scale = nullptr;
};

// All slices of one expert.
struct ExpertSlices {
  uint32_t expert = 0;
  ProjectionFormats formats;
  std::vector<SliceArrays> w13, w2;  // one a slice
};

// Rows of a matrix, where they are: a matrix that is valid for them, at their own numbers.
struct RowsAt {
  Span rows;
  WeightView matrix;
};

// All rows of an expert, each once. Without a gate, up has none.
struct ExpertRows {
  std::vector<RowsAt> gate, up, down;
};

// Writes the slices, by all threads of the pool.
void write_slices(const GeneralMOEConfig& config, const ExpertRows& source, const ExpertSlices& slices,
                  WorkerPool& pool);

}  // namespace ktmoe
