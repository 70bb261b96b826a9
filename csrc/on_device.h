// What needs a device to be current for a while: calls of CUDA, and a kernel whose result belongs on the host.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime_api.h>
#endif

#include <cstddef>
#include <vector>

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

// Fills host_out with what launch(out, stream) enqueues on the first of the streams for `out` in the device's memory;
// launch returns null or why it enqueued nothing. What is enqueued on any of the streams by now is done before. Waits
// for the result. Returns null, what launch returned, or CUDA's words.
template <class Launch>
const char* to_host(double* host_out, std::size_t bytes, int device, const std::vector<void*>& streams, Launch launch) {
  const auto stream = static_cast<cudaStream_t>(streams[0]);
  const OnDevice current(device);
  cudaError_t error = current.error;
  for (std::size_t i = 1; i < streams.size() && error == cudaSuccess; ++i) {  // rare, and this function waits anyway
    if (streams[i] != streams[0]) error = cudaStreamSynchronize(static_cast<cudaStream_t>(streams[i]));
  }
  void* out = nullptr;
  if (error == cudaSuccess) error = cudaMallocAsync(&out, bytes, stream);
  if (error != cudaSuccess) return cudaGetErrorString(error);

  const char* problem = launch(static_cast<double*>(out), stream);
  const auto check = [&problem](cudaError_t result) {
    if (!problem && result != cudaSuccess) problem = cudaGetErrorString(result);
  };
  if (!problem) check(cudaMemcpyAsync(host_out, out, bytes, cudaMemcpyDeviceToHost, stream));
  check(cudaFreeAsync(out, stream));
  check(cudaStreamSynchronize(stream));  // after an error too: the copy may be under way
  return problem;
}

}  // namespace
}  // namespace memedge
