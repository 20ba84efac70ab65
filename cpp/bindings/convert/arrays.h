// Arrays from Python, viewed without a copy: NumPy (including ml_dtypes) and DLPack. Each check
// names the argument, what was given and what was expected.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace ktmoe::bindings {

namespace nb = nanobind;

enum class DType { kBf16, kFloat32, kInt64, kInt32, kUint8, kBool, kOther };

// A dimension as it is expected: a number, or a letter for any.
struct Dim {
  int64_t value = -1;
  const char* letter = nullptr;
  Dim(int64_t v) : value(v) {}             // NOLINT: lists of dimensions read as shapes
  Dim(const char* name) : letter(name) {}  // NOLINT
};
using Dims = std::vector<Dim>;

// A view of an array's memory, which stays alive as long as the view. Copied and destroyed with the GIL.
class Array {
 public:
  Array() = default;

  // Throws TypeError when `object` is no array on the CPU. Any dtype, shape and strides come through.
  static Array read(nb::handle object, const char* name);
  // The same for an array that will be written; ValueError when it is read-only.
  static Array write(nb::handle object, const char* name);

  // Checks that return the array: TypeError for the dtype or the order, ValueError for the shape.
  const Array& expect(std::initializer_list<DType> dtypes, const Dims& shape) const;
  const Array& expect_rows(int64_t num, size_t row_bytes) const;  // of any dtype and number of axes
  const Array& expect_contiguous() const;
  const Array& expect_contiguous_rows() const;  // the last axis alone
  // ValueError when the two share memory, gaps between their elements included.
  void expect_disjoint(const Array& other) const;

  nb::handle object() const { return object_; }
  const char* name() const { return name_; }
  const nb::ndarray<nb::ro>& exported() const { return handle_; }  // of an array that is not from NumPy
  DType dtype() const { return dtype_; }
  size_t ndim() const { return shape_.size(); }
  int64_t shape(size_t i) const { return shape_[i]; }
  int64_t stride_bytes(size_t i) const { return strides_[i] * static_cast<int64_t>(item_bytes_); }
  size_t size() const;
  size_t item_bytes() const { return item_bytes_; }
  size_t bytes() const { return size() * item_bytes_; }

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  template <class Handle>
  bool fill(nb::handle object, const char* name);
  std::pair<const std::byte*, const std::byte*> extent() const;  // the first byte, and behind the last
  std::string describe() const;                                  // "float32 [2, 64]"
  std::string dtype_name() const;

  const char* name_ = "";
  nb::ndarray<nb::ro> handle_;  // keeps the memory alive of arrays that are not from NumPy
  nb::object object_;           // as it was given
  void* data_ = nullptr;
  DType dtype_ = DType::kOther;
  size_t item_bytes_ = 0;
  std::vector<int64_t> shape_, strides_;
};

using Arrays = std::vector<Array>;

// What NumPy and ml_dtypes call a dtype of DLPack, "V" and the bytes where they have no name.
std::string dtype_name(const nb::dlpack::dtype& type);

// Shows the cycle collector the objects of arrays. Their owner must be the only one.
int visit_arrays(const Arrays& arrays, visitproc visit, void* arg);

// Called once, when the module is loaded.
void init_arrays();

}  // namespace ktmoe::bindings
