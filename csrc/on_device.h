// Makes a device current for a while.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime_api.h>
#endif

namespace memedge {
namespace {

// Makes a device current for as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error = cudaGetDevice(&before_);
    if (error != cudaSuccess || before_ == device) return;
    error = cudaSetDevice(device);
    changed_ = true;
  }
  OnDevice(const OnDevice&) = delete;
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }

  cudaError_t error = cudaSuccess;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace
}  // namespace memedge
