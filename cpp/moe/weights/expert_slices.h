// An expert's weights for tensor parallelism: cut along the intermediate size into slices, one per device,
// each with its rows of gate and up and its columns of down, in the layer's encoding.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "formats/format.h"
#include "moe/layer/config.h"
#include "moe/plan/block_tasks.h"
#include "runtime/worker_pool.h"

namespace ktmoe {

// The formats of a layer's projections; without a gate, `up` equals `gate`.
struct alignas(4) ProjectionFormats {
  FormatId gate = FormatId::kBf16, up = FormatId::kBf16, down = FormatId::kBf16;
  bool operator==(const ProjectionFormats&) const = default;
};

// Sizes of the arrays that are a slice of gate and up, or of down.
struct SliceShape {
  FormatId format;
  uint32_t num_rows;
  size_t row_bytes;
  uint32_t num_scale_rows;  // rows of separate block scales; 0: none
  size_t scale_bytes;       // of one such row
  bool has_channel_scale;   // one float32 per row
};

// w13: gate and up in one array, gate first. w2: down.
struct SliceShapes {
  SliceShape w13, w2;
};

// Throws std::invalid_argument when the intermediate size cannot be cut into `num_slices` (named
// gpu_tp_count in the message), and when the formats of gate and up differ.
SliceShapes shapes_of_slices(const GeneralMOEConfig& config, const ProjectionFormats& formats,
                             int64_t num_slices);

// Where a slice is written; null: no such array.
struct SliceArrays {
  std::byte *weights = nullptr, *scales = nullptr, *channel_scale = nullptr;
};

// All slices of one expert.
struct ExpertSlices {
  uint32_t expert = 0;
  ProjectionFormats formats;
  std::vector<SliceArrays> w13, w2;  // one per slice
};

// Rows of a matrix, and a view that is valid for them at their original indices.
struct RowsAt {
  Span rows;
  WeightView matrix;
};

// All rows of an expert, each once. Without a gate, up has none.
struct ExpertRows {
  std::vector<RowsAt> gate, up, down;
};

// Writes the slices with all threads of the pool.
void write_slices(const GeneralMOEConfig& config, const ExpertRows& source, const ExpertSlices& slices,
                  WorkerPool& pool);

}  // namespace ktmoe
