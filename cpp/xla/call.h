// A call from XLA: its arguments and results, each checked when it is taken.
#pragma once

#include <cstdint>

#include "core/function_ref.h"
#include "xla/abi.h"

namespace ktmoe::xla {

// An array [.., columns], whose leading dimensions count as rows.
struct Rows {
  const Buffer* buffer = nullptr;
  int64_t num = 0;

  template <class T>
  T* as() const {
    return static_cast<T*>(buffer->data);
  }
};

// Takes arguments, then results, one after the other. Errors are std::invalid_argument that names the array.
class Call {
 public:
  explicit Call(const CallFrame& frame) : frame_(frame) {}

  int64_t num_results() const { return frame_.rets.size; }

  const Buffer& next_arg(const char* name) { return next(frame_.args, arg_++, name); }
  const Buffer& next_result(const char* name) { return next(frame_.rets, result_++, name); }

 private:
  static const Buffer& next(const Buffers& all, int64_t i, const char* name);

  const CallFrame& frame_;
  int64_t arg_ = 0, result_ = 0;
};

// The rows of an array of that dtype and width; -1: any number.
Rows rows_of(const Buffer& buffer, const char* name, DataType dtype, int64_t width, int64_t num = -1);
// An array of that dtype with as many elements.
void* elements_of(const Buffer& buffer, const char* name, DataType dtype, int64_t num);

// What a handler does.
struct Operation {
  const char* name;  // errors begin with it
  void (*work)(Call&);
};

// Answers XLA's query for metadata, or else does `work`; its exceptions become XLA errors that begin with
// `name`.
Error* answer(CallFrame* frame, const char* name, FunctionRef<void()> work);

// An operation at once, on the arrays of the call.
inline Error* handle(CallFrame* frame, const Operation& operation) {
  return answer(frame, operation.name, [&] {
    Call call(*frame);
    operation.work(call);
  });
}

}  // namespace ktmoe::xla
