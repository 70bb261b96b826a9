// What the CUDA kernels share: halves as floats, and sums over a block of threads in a fixed order.
#pragma once

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

#include "guidance_stats.h"

namespace memedge {
namespace {

constexpr unsigned kThreads = 512;  // times the 8 pixels of a load of halves: a 64x64 latent in one step
constexpr unsigned kWarp = 32;
constexpr unsigned kWarps = kThreads / kWarp;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ inline float to_float(Bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

// A float32 sum and the rounding errors it made (Knuth's two-sum).
struct CarriedSum {
  float sum = 0, lost = 0;

  __device__ void add(float x) {
    const float next = sum + x;
    const float added = next - sum;
    lost += (sum - (next - added)) + (x - added);
    sum = next;
  }
};

// In every lane, the sum over the warp.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (unsigned distance = kWarp / 2; distance; distance /= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
  return x;
}

// In the block's first thread, sums over all its threads; what the others get means nothing.
template <int kCount>
__device__ void block_sums(const CarriedSum (&carried)[kCount], float (&sums)[kCount]) {
  __shared__ float of_warp[kCount][kWarps];
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    const float sum = warp_sum(carried[k].sum + carried[k].lost);
    if (lane == 0) of_warp[k][warp] = sum;
  }
  __syncthreads();
  if (warp) return;
#pragma unroll
  for (int k = 0; k < kCount; ++k) sums[k] = warp_sum(lane < kWarps ? of_warp[k][lane] : 0.0f);
}

}  // namespace
}  // namespace memedge
