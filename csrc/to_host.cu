// The reduction on a GPU for callers whose results belong on the host, and which GPU an address belongs to.
#include "guidance_stats.h"
#include "on_device.h"

namespace memedge {

const char* cuda_guidance_stats_to_host(GuidanceStats task, int device, void* stream, void* uncond_stream) {
  return to_host(task.out, 3 * task.rows * sizeof(double), device, {stream, uncond_stream},
                 [&task](double* out, cudaStream_t on) {
                   task.out = out;
                   return cuda_guidance_stats(task, on);
                 });
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
