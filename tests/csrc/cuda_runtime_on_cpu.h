// The calls of CUDA's runtime that csrc/to_host.cu and csrc/guidance_step.cu make, on a CPU: what is enqueued happens when its stream is waited
// for, and any call can be made to fail.
#pragma once

#include <algorithm>
#include <map>

#include "cuda_on_cpu.h"

enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice, cudaMemoryTypeManaged };
struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
};

namespace cuda_on_cpu {

constexpr int kDevices = 2;
inline int device = 0;  // the current one
inline int calls = 0, failing = -1;  // how many there were, and which of them fails
inline std::map<cudaStream_t, std::vector<std::function<void()>>> enqueued;
inline std::vector<cudaStream_t> waited_for;
inline std::vector<void*> buffers;

inline cudaError_t call() { return calls++ == failing ? cudaErrorInvalidConfiguration : cudaSuccess; }

}  // namespace cuda_on_cpu

inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_on_cpu::device;
  return cuda_on_cpu::call();
}

inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= cuda_on_cpu::kDevices) return cudaErrorInvalidConfiguration;
  cuda_on_cpu::device = device;
  return cuda_on_cpu::call();
}

inline cudaError_t cudaMallocAsync(void** pointer, std::size_t bytes, cudaStream_t) {
  const cudaError_t error = cuda_on_cpu::call();
  if (error != cudaSuccess) return error;
  cuda_on_cpu::buffers.push_back(*pointer = std::malloc(bytes));
  return cudaSuccess;
}

inline cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream) {
  const cudaError_t error = cuda_on_cpu::call();
  if (error != cudaSuccess) return error;
  cuda_on_cpu::enqueued[stream].push_back([pointer] {
    auto& buffers = cuda_on_cpu::buffers;
    buffers.erase(std::find(buffers.begin(), buffers.end(), pointer));
    std::free(pointer);
  });
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  const cudaError_t error = cuda_on_cpu::call();
  if (error != cudaSuccess) return error;
  cuda_on_cpu::enqueued[stream].push_back([=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}

inline cudaError_t cudaMalloc(void** pointer, std::size_t bytes) { return cudaMallocAsync(pointer, bytes, nullptr); }

inline cudaError_t cudaFree(void* pointer) {
  auto& buffers = cuda_on_cpu::buffers;
  buffers.erase(std::find(buffers.begin(), buffers.end(), pointer));
  std::free(pointer);
  return cuda_on_cpu::call();
}

inline cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cuda_on_cpu::call();
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  cuda_on_cpu::waited_for.push_back(stream);
  for (const auto& work : cuda_on_cpu::enqueued[stream]) work();
  cuda_on_cpu::enqueued[stream].clear();
  return cuda_on_cpu::call();
}

inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  *attributes = {pointer ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered, 1};
  return cuda_on_cpu::call();
}
