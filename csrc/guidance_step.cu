// The step on a GPU: one block per row.
#include "guidance_step.h"

#include <climits>

#include "block_sums.cuh"
#include "on_device.h"

namespace memedge {
namespace {

constexpr int kStepSums = 3;  // squared: norm, change, move

template <class T>
__global__ void __launch_bounds__(kThreads) guidance_step_kernel(const GuidanceStep step) {
  const std::size_t row = blockIdx.x, first = row * step.channels * step.pixels;
  const T* const x = static_cast<const T*>(step.x) + first;
  const T* const cond = static_cast<const T*>(step.cond) + first;
  const T* const uncond = static_cast<const T*>(step.uncond) + first;
  float* const last_x = step.last_x + first;
  float* const last_eps = step.last_eps + first;
  CarriedSum carried[kStepSums];

  for (std::size_t p = threadIdx.x; p < step.pixels; p += kThreads) {
    float norm = 0, change = 0, move = 0;
    for (std::size_t k = 0, i = p; k < step.channels; ++k, i += step.pixels) {
      const float own = to_float(x[i]), c = to_float(cond[i]);
      const float eps = step.shift == 0 ? step.scale * c : fmaf(step.scale, c, step.shift * own);
      const float delta = step.scale * (c - to_float(uncond[i]));
      norm = fmaf(delta, delta, norm);
      if (!step.first) {
        const float by = eps - last_eps[i], moved = own - last_x[i];
        change = fmaf(by, by, change);
        move = fmaf(moved, moved, move);
      }
      last_x[i] = own;
      last_eps[i] = eps;
    }
    step.map[row * step.pixels + p] = norm;
    carried[0].add(norm);
    carried[1].add(change);
    carried[2].add(move);
  }

  float sums[kStepSums];
  block_sums(carried, sums);
  if (threadIdx.x) return;
  const bool finite = isfinite(sums[0]) && isfinite(sums[1]) && isfinite(sums[2]);
  for (int k = 0; k < kStepSums; ++k) {
    step.out[k * step.rows + row] = finite ? sqrt(static_cast<double>(sums[k])) : static_cast<double>(NAN);
  }
}

template <class T>
cudaError_t launch(GuidanceStep step, cudaStream_t stream) {
  void* arguments[] = {&step};
  return cudaLaunchKernel(guidance_step_kernel<T>, dim3(static_cast<unsigned>(step.rows)), dim3(kThreads), arguments, 0,
                          stream);
}

cudaError_t launch(const GuidanceStep& step, cudaStream_t stream) {
  switch (step.dtype) {
    case DType::float16:
      return launch<Half>(step, stream);
    case DType::bfloat16:
      return launch<Bfloat16>(step, stream);
    default:
      return launch<float>(step, stream);
  }
}

const char* words(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

const char* cuda_guidance_step(GuidanceStep step, int device, const std::vector<void*>& streams) {
  if (step.rows > INT_MAX) return "there are more rows than a launch has blocks for";
  return to_host(step.out, kStepSums * step.rows * sizeof(double), device, streams,
                 [&step](double* out, cudaStream_t stream) {
                   step.out = out;
                   return words(launch(step, stream));
                 });
}

const char* cuda_allocate(std::size_t bytes, int device, void** memory) {
  const OnDevice current(device);
  if (current.error != cudaSuccess) return cudaGetErrorString(current.error);
  return words(cudaMalloc(memory, bytes));
}

const char* cuda_download(void* host, const void* memory, std::size_t bytes, int device) {
  const OnDevice current(device);
  if (current.error != cudaSuccess) return cudaGetErrorString(current.error);
  return words(cudaMemcpy(host, memory, bytes, cudaMemcpyDeviceToHost));
}

void cuda_release(void* memory, int device) {
  const OnDevice current(device);
  if (current.error == cudaSuccess) cudaFree(memory);
}

}  // namespace memedge
