// Guidance statistics: how far, and in which direction, a prompt moves a diffusion model's prediction.
//
// For the conditional prediction cond [rows, C, P] and the unconditional one uncond [uncond_rows, C, P] (contiguous,
// P = H * W), where row r is paired with uncond row row[r], or r % uncond_rows without an index, and
// delta = cond - uncond, one pass over the data gives per row, in float64:
//
//   norm     ||delta||_2 over all C * P values
//   channel  mean over pixels of the cosine, over channels, between the two operands a and b
//   flat     cosine between a and b, each flattened to C * P values
//
// Rules, the same on every path:
//   * halves are widened to float32 first; delta is a float32 subtraction;
//   * a cosine is a.b / (max(||a||, 1e-8) * max(||b||, 1e-8)), PyTorch's rule, so a zero vector gives 0;
//     rounding never takes it out of [-1, 1];
//   * a row that holds NaN or infinity, or whose float32 squares overflow, gives three NaNs: such a row never gets a
//     finite score. On a CPU that takes values beyond about 1e19, on a GPU, where the squares of the whole row are summed
//     in float32, beyond about 1e19 / sqrt(C * P): 1e17 for four channels of 64 x 64. No prediction comes near either;
//   * the result of a row doesn't depend on the number of threads or on the other rows.
//
// Vector paths keep a pixel's sums and up to 32 pixels per lane in float32, everything longer in float64.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace memedge {

enum class DType { float32, float16, bfloat16 };

// The cosine's pair (a, b).
enum class Operands { uncond_delta, cond_uncond, cond_delta };

enum class Isa { scalar, neon, avx2, avx512 };  // in rising order of preference

struct Half {
  std::uint16_t bits;
};
struct Bfloat16 {
  std::uint16_t bits;
};

constexpr double kMinSquaredNorm = 1e-16;  // (1e-8)^2

// What one pass over a row accumulates. Non-finite input always shows in dd: cond - uncond is finite only if both are.
struct RowSums {
  double aa = 0;      // sum of a^2
  double bb = 0;      // sum of b^2
  double ab = 0;      // sum of a * b
  double dd = 0;      // sum of delta^2
  double cosine = 0;  // sum over pixels of the cosine over channels
};

using RowKernel = RowSums (*)(const void* cond, const void* uncond, std::size_t channels, std::size_t pixels);

// One per file guidance_stats_<isa>.cc; call only what available_isas() lists.
RowKernel neon_kernel(DType dtype, Operands operands);
RowKernel avx2_kernel(DType dtype, Operands operands);
RowKernel avx512_kernel(DType dtype, Operands operands);

// What this build has and this processor can run; the last one is the fastest.
const std::vector<Isa>& available_isas();

struct GuidanceStats {
  const void* cond;
  const void* uncond;
  const std::int64_t* row;  // [rows], each in [0, uncond_rows); null: r % uncond_rows
  double* out;              // [3, rows]: norm, channel, flat
  DType dtype;
  Operands operands;
  std::size_t rows, uncond_rows, channels, pixels;  // all at least 1
};

// Fills out and returns the number of rows that are not finite, on at most so many threads (0: as many as this process
// may run on). Starts them only where the work outweighs them, and keeps none, so a process may fork between calls.
std::size_t guidance_stats(const GuidanceStats& task, std::size_t threads, Isa isa);

// The same on a GPU (guidance_stats.cu, where nvcc built it), in memory of the current CUDA device: enqueues one kernel
// on the stream, a cudaStream_t, and returns without waiting for it; all buffers must outlive it. A row whose row[r] is
// out of range is NaN too. Returns null, or why nothing was enqueued.
const char* cuda_guidance_stats(const GuidanceStats& task, void* stream);

}  // namespace memedge
