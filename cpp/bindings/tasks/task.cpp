#include "bindings/tasks/task.h"

namespace ktmoe::bindings {

int PythonTask::traverse(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  if (!nb::inst_ready(self)) return 0;
  const auto& arrays = nb::inst_ptr<PythonTask>(self)->arrays_;
  return arrays == nullptr ? 0 : visit_arrays(*arrays, visit, arg);
}

int PythonTask::clear(PyObject* self) {
  PythonTask& task = *nb::inst_ptr<PythonTask>(self);
  task.arrays_.reset();
  task.task_.reset();
  return 0;
}

PyType_Slot PythonTask::slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(&PythonTask::traverse)},
                                   {Py_tp_clear, reinterpret_cast<void*>(&PythonTask::clear)},
                                   {0, nullptr}};

}  // namespace ktmoe::bindings
