// The reduction on a GPU for callers whose results belong on the host: device, output buffer, launch, copy and wait.
#include "guidance_stats.h"
#include "on_device.h"

namespace memedge {

const char* cuda_guidance_stats_to_host(GuidanceStats task, int device, void* stream_handle, void* uncond_stream) {
  double* const host_out = task.out;
  const std::size_t bytes = 3 * task.rows * sizeof(double);
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const OnDevice current(device);
  cudaError_t error = current.error;
  if (error == cudaSuccess && uncond_stream != stream_handle) {  // rare, and this function waits anyway
    error = cudaStreamSynchronize(static_cast<cudaStream_t>(uncond_stream));
  }
  void* out = nullptr;
  if (error == cudaSuccess) error = cudaMallocAsync(&out, bytes, stream);
  if (error != cudaSuccess) return cudaGetErrorString(error);

  task.out = static_cast<double*>(out);
  const char* problem = cuda_guidance_stats(task, stream_handle);
  const auto check = [&problem](cudaError_t result) {
    if (!problem && result != cudaSuccess) problem = cudaGetErrorString(result);
  };
  if (!problem) check(cudaMemcpyAsync(host_out, out, bytes, cudaMemcpyDeviceToHost, stream));
  check(cudaFreeAsync(out, stream));
  check(cudaStreamSynchronize(stream));  // after an error too: the copy may be under way
  return problem;
}

const char* cuda_device_of(const void* pointer, int* device) {
  cudaPointerAttributes attributes;
  const cudaError_t error = cudaPointerGetAttributes(&attributes, pointer);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (attributes.type == cudaMemoryTypeUnregistered) return "the address is not in memory that CUDA knows";
  *device = attributes.device;
  return nullptr;
}

}  // namespace memedge
