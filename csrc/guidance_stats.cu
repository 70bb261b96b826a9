// Checks shapes, chooses the kernel and enqueues it.
#include "guidance_stats.cuh"

#include <climits>

namespace memedge {
namespace {

template <class T, Operands kOperands>
cudaError_t launch(unsigned count, DeviceRows rows, bool vector, cudaStream_t stream) {
  void* arguments[] = {&rows};
  const auto kernel =
      vector ? guidance_stats_kernel<T, kOperands, kPixelsPerLoad<T>> : guidance_stats_kernel<T, kOperands, 1>;
  return cudaLaunchKernel(kernel, dim3(count), dim3(kThreads), arguments, 0, stream);
}

template <class T>
const char* launch(const GuidanceStats& task, cudaStream_t stream) {
  const auto both = reinterpret_cast<std::uintptr_t>(task.cond) | reinterpret_cast<std::uintptr_t>(task.uncond);
  if (both % sizeof(T)) return "cond or uncond does not start at a multiple of its items' size";
  const bool vector = both % 16 == 0 && task.pixels % kPixelsPerLoad<T> == 0;
  const auto count = static_cast<unsigned>(task.rows);
  const DeviceRows rows{task.cond,     task.uncond, task.row, task.out,
                        task.channels, task.pixels, static_cast<unsigned>(task.uncond_rows)};
  cudaError_t error;
  switch (task.operands) {
    case Operands::cond_uncond:
      error = launch<T, Operands::cond_uncond>(count, rows, vector, stream);
      break;
    case Operands::cond_delta:
      error = launch<T, Operands::cond_delta>(count, rows, vector, stream);
      break;
    default:
      error = launch<T, Operands::uncond_delta>(count, rows, vector, stream);
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* cuda_guidance_stats(const GuidanceStats& task, void* stream_handle) {
  if (task.rows > INT_MAX || task.uncond_rows > INT_MAX) return "there are more rows than a launch has blocks for";
  const auto both = reinterpret_cast<std::uintptr_t>(task.out) | reinterpret_cast<std::uintptr_t>(task.row);
  if (both % alignof(double)) return "out or row does not start at a multiple of 8";
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  switch (task.dtype) {
    case DType::float16:
      return launch<Half>(task, stream);
    case DType::bfloat16:
      return launch<Bfloat16>(task, stream);
    default:
      return launch<float>(task, stream);
  }
}

}  // namespace memedge
