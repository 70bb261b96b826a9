// One step of a generation with classifier-free guidance, against the step before it: what a Monitor is fed with
// (memedge/monitor/monitor.py).
//
// For the latents x, the conditional prediction cond and the unconditional one uncond, all [rows, C, P] and contiguous
// (P = H * W), eps_c = scale * cond + shift * x is the noise that the model predicts (scale 1 and shift 0 where it
// predicts noise). With last_x and last_eps as the step before left them, one pass over the data gives per row
//
//   norm    |scale| * ||cond - uncond||_2
//   change  ||eps_c - last_eps||_2, of which DSM is the square
//   move    ||x - last_x||_2, how far the sampler went
//   map     per pixel, scale^2 * the sum over channels of (cond - uncond)^2
//
// and leaves x and eps_c in last_x and last_eps. At the first step change and move are 0.
//
// Rules, the same on every path: halves are widened to float32 first, differences are float32, sums over a row are
// float64 on a CPU and carried float32 on a GPU. A row whose three are not all finite gives three NaNs. The result of a
// row doesn't depend on the other rows.
//
// No instruction set has a path of its own: the compiler makes vectors of the loop, and it takes less than a thousandth
// of the UNet's time.
#pragma once

#include "guidance_stats.h"

namespace memedge {

struct GuidanceStep {
  const void* x;
  const void* cond;
  const void* uncond;
  float* last_x;    // [rows, C, P], read unless it is the first step, then written
  float* last_eps;  // likewise
  float* map;       // [rows, P], written
  double* out;      // [3, rows]: norm, change, move
  DType dtype;      // of x, cond and uncond
  bool first;
  float scale, shift;
  std::size_t rows, channels, pixels;  // all at least 1
};

// Returns the number of rows that are not finite.
std::size_t guidance_step(const GuidanceStep& step);

// The same on a GPU (guidance_step.cu), with last_x, last_eps and map in memory of that device and out in host memory:
// waits for the stream, and so for the result. What is enqueued on the other streams by now is done before. Returns
// null, or CUDA's words.
const char* cuda_guidance_step(GuidanceStep step, int device, const std::vector<void*>& streams);

// Memory of a GPU, and its values in host memory once all that is enqueued on the default stream is done. Both return
// null, or CUDA's words.
const char* cuda_allocate(std::size_t bytes, int device, void** memory);
const char* cuda_download(void* host, const void* memory, std::size_t bytes, int device);
void cuda_release(void* memory, int device);

}  // namespace memedge
