#include "moe/weights/expert_slices.h"

#include <algorithm>
#include <cstring>

#include "core/aligned_buffer.h"
#include "core/error.h"
#include "formats/registry.h"

namespace ktmoe {
namespace {

// A strided copy: lines of bytes with one row stride to lines with another.
struct LinesCopy {
  const std::byte* from;
  ptrdiff_t from_stride;
  std::byte* to;
  size_t to_stride, bytes;  // of a line
  uint32_t num_lines;

  void run(uint32_t begin, uint32_t end) const {
    const std::byte* source = from + static_cast<ptrdiff_t>(begin) * from_stride;
    std::byte* target = to + begin * to_stride;
    if (from_stride == static_cast<ptrdiff_t>(bytes) && to_stride == bytes) {
      std::memcpy(target, source, (end - begin) * bytes);
      return;
    }
    for (uint32_t i = begin; i < end; ++i, source += from_stride, target += to_stride)
      std::memcpy(target, source, bytes);
  }
};

// Rows and columns of a matrix, and the row of the slice's arrays that the first of them becomes.
struct Cut {
  Span rows, columns;
  uint32_t to_row, to_scale_row;
};

class Copies {
 public:
  void add(const std::vector<RowsAt>& source, const Cut& cut, const SliceArrays& to) {
    for (const RowsAt& some : source) {
      const Span rows{std::max(some.rows.begin, cut.rows.begin), std::min(some.rows.end, cut.rows.end)};
      if (rows.begin >= rows.end) continue;
      add_rows(some.matrix, rows, cut, to.weights);
      if (to.channel_scale != nullptr) add_channel_scale(some.matrix, rows, cut, to.channel_scale);
      if (to.scales != nullptr) add_scales_apart(some.matrix, rows, cut, to.scales);
    }
  }

  void run(WorkerPool& pool) const {
    constexpr size_t kTaskBytes = 128 << 10;  // copying about this many takes as long as waking a thread
    struct Task {
      const LinesCopy* copy;
      uint32_t begin, end;
    };
    std::vector<Task> tasks;
    for (const LinesCopy& copy : copies_) {
      const auto most = static_cast<uint32_t>(std::clamp<size_t>(kTaskBytes / copy.bytes, 1, copy.num_lines));
      for (uint32_t begin = 0; begin < copy.num_lines; begin += most)
        tasks.push_back({&copy, begin, std::min(begin + most, copy.num_lines)});
    }
    pool.run(static_cast<uint32_t>(tasks.size()),
             [&](const Worker&, int, uint32_t i) { tasks[i].copy->run(tasks[i].begin, tasks[i].end); });
  }

 private:
  // A row has its codes first and then, in some formats, the scales of its groups.
  void add_rows(const WeightView& matrix, Span rows, const Cut& cut, std::byte* to) {
    const FormatId format = matrix.format;
    const uint32_t begin = cut.columns.begin, end = cut.columns.end;
    const auto values = [&](size_t k) { return format_code_bytes(format, k); };
    const auto scales = [&](size_t k) { return format_row_bytes(format, k) - values(k); };
    const size_t row_bytes = format_row_bytes(format, cut.columns.size());
    const std::byte* from = matrix.row(rows.begin);
    to += (cut.to_row + rows.begin - cut.rows.begin) * row_bytes;
    const auto add_part = [&](size_t offset, size_t bytes, size_t to_offset) {
      if (bytes == 0) return;
      copies_.push_back(
          {from + offset, matrix.row_stride_bytes, to + to_offset, row_bytes, bytes, rows.size()});
    };
    if (cut.columns.size() == matrix.k) return add_part(0, row_bytes, 0);
    add_part(values(begin), values(end) - values(begin), 0);
    add_part(values(matrix.k) + scales(begin), scales(end) - scales(begin), values(cut.columns.size()));
  }

  void add_channel_scale(const WeightView& matrix, Span rows, const Cut& cut, std::byte* to) {
    constexpr size_t kBytes = sizeof(float);
    const auto* from = reinterpret_cast<const std::byte*>(matrix.channel_scale + rows.begin);
    to += (cut.to_row + rows.begin - cut.rows.begin) * kBytes;
    copies_.push_back({from, kBytes, to, kBytes, kBytes, rows.size()});
  }

  // A row of block scales serves several rows of the matrix. It is copied with the first of them.
  void add_scales_apart(const WeightView& matrix, Span rows, const Cut& cut, std::byte* to) {
    const size_t serves = format_scale_rows(matrix.format);
    const auto first = static_cast<uint32_t>(div_up(rows.begin, serves));
    const auto behind = static_cast<uint32_t>(div_up(rows.end, serves));
    if (first >= behind) return;
    const auto bytes = [&](size_t k) { return format_scale_bytes(matrix.format, k); };
    const size_t line = bytes(cut.columns.size());
    to += (cut.to_scale_row + first - cut.rows.begin / serves) * line;
    const std::byte* from = matrix.block_scales_of(first * serves, static_cast<uint32_t>(serves));
    copies_.push_back({from + bytes(cut.columns.begin), matrix.block_scales_stride_bytes, to, line,
                       bytes(cut.columns.end) - bytes(cut.columns.begin), behind - first});
  }

  std::vector<LinesCopy> copies_;
};

uint32_t num_scale_rows(FormatId format, uint32_t num_rows) {
  const size_t serves = format_scale_rows(format);
  return serves == 0 ? 0 : static_cast<uint32_t>(div_up(num_rows, serves));
}

SliceShape shape_of(FormatId format, uint32_t num_rows, uint32_t num_columns, uint32_t num_matrices) {
  return {format,
          num_matrices * num_rows,
          format_row_bytes(format, num_columns),
          num_matrices * num_scale_rows(format, num_rows),
          format_scale_bytes(format, num_columns),
          format_has_channel_scale(format)};
}

}  // namespace

SliceShapes shapes_of_slices(const GeneralMOEConfig& config, const ProjectionFormats& formats,
                             int64_t num_slices) {
  const int64_t whole = config.intermediate_size;
  if (num_slices < 1 || whole % num_slices != 0)
    throw_invalid("gpu_tp_count: got ", num_slices, ", expected a divisor of ", whole,
                  ", the intermediate size");
  if (formats.gate != formats.up)
    throw_invalid("gate_proj: got ", format_name(formats.gate), ", expected ", format_name(formats.up),
                  " as up_proj: both are written to one buffer");
  const int64_t size = whole / num_slices;
  const auto check_cut = [&](FormatId format, size_t unit) {
    if (num_slices != 1 && size % static_cast<int64_t>(unit) != 0)
      throw_invalid("gpu_tp_count: got ", num_slices, ", which cuts the intermediate size in slices of ",
                    size, ", expected multiples of ", unit, " with ", format_name(format));
  };
  check_cut(formats.gate, std::max<size_t>(format_scale_rows(formats.gate), 1));
  check_cut(formats.down, format_unit(formats.down));
  const auto width = static_cast<uint32_t>(size), hidden = static_cast<uint32_t>(config.hidden_size);
  return {shape_of(formats.gate, width, hidden, config.activation.gated ? 2 : 1),
          shape_of(formats.down, hidden, width, 1)};
}

void write_slices(const GeneralMOEConfig& config, const ExpertRows& source, const ExpertSlices& slices,
                  WorkerPool& pool) {
  const auto num_slices = static_cast<uint32_t>(slices.w13.size());
  const auto hidden = static_cast<uint32_t>(config.hidden_size);
  const uint32_t width = static_cast<uint32_t>(config.intermediate_size) / num_slices;
  const uint32_t scale_rows = num_scale_rows(slices.formats.gate, width);
  Copies copies;
  for (uint32_t i = 0; i < num_slices; ++i) {
    const Span part{i * width, (i + 1) * width}, all{0, hidden};
    copies.add(source.gate, {part, all, 0, 0}, slices.w13[i]);
    copies.add(source.up, {part, all, width, scale_rows}, slices.w13[i]);
    copies.add(source.down, {all, part, 0, 0}, slices.w2[i]);
  }
  copies.run(pool);
}

}  // namespace ktmoe
