// The driver of tests/fake_cuda.cpp, which needs no GPU, as the process's driver.
#pragma once

#include <doctest/doctest.h>
#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <string>

namespace ktmoe::test {

class FakeCuda {
 public:
  // Loads it from where the tests are. Before any use of the driver in this process.
  FakeCuda() {
    const auto library = std::filesystem::read_symlink("/proc/self/exe").parent_path() / "libfake_cuda.so";
    setenv("KTMOE_CUDA_DRIVER", library.c_str(), 1);
    handle_ = dlopen(library.c_str(), RTLD_NOW);
    REQUIRE_MESSAGE(handle_ != nullptr, library.string());
    create_ = find<void*()>("fake_stream_create");
    synchronize_ = find<void(void*)>("fake_stream_synchronize");
    stall_ = find<void(void*, int)>("fake_stall");
    capture_ = find<void(void*, int)>("fake_capture");
  }

  void* create_stream() const { return create_(); }
  void synchronize(void* stream) const { synchronize_(stream); }
  void stall(void* stream, int milliseconds) const { stall_(stream, milliseconds); }
  void capture(void* stream, bool begin) const { capture_(stream, begin ? 1 : 0); }

 private:
  template <class Function>
  Function* find(const char* name) const {
    return reinterpret_cast<Function*>(dlsym(handle_, name));
  }

  void* handle_;
  void* (*create_)();
  void (*synchronize_)(void*);
  void (*stall_)(void*, int);
  void (*capture_)(void*, int);
};

inline const FakeCuda& fake_cuda() {
  static const FakeCuda fake;
  return fake;
}

}  // namespace ktmoe::test
