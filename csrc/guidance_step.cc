// The step on a CPU: one loop over a channel of a row.
#include "guidance_step.h"

#include <cmath>
#include <limits>

#include "serial.h"

namespace memedge {
namespace {

// Sums of float32 squares of one channel of one row; long ones lose no digits, since they are cut into blocks.
constexpr std::size_t kBlock = 1024;

struct StepSums {
  double norm = 0, change = 0, move = 0;  // squared
};

template <class T>
StepSums channel_sums(const GuidanceStep& step, std::size_t at, float* map) {
  StepSums sums;
  float* const last_x = step.last_x + at;
  float* const last_eps = step.last_eps + at;
  for (std::size_t start = 0; start < step.pixels; start += kBlock) {
    const std::size_t end = start + kBlock < step.pixels ? start + kBlock : step.pixels;
    float norm = 0, change = 0, move = 0;
    for (std::size_t p = start; p < end; ++p) {
      const float x = element<T>(step.x, at + p);
      const float cond = element<T>(step.cond, at + p);
      const float eps = step.shift == 0 ? step.scale * cond : step.scale * cond + step.shift * x;
      const float delta = step.scale * (cond - element<T>(step.uncond, at + p));
      const float squared = delta * delta;
      norm += squared;
      map[p] += squared;
      if (!step.first) {
        const float by = eps - last_eps[p], moved = x - last_x[p];
        change += by * by;
        move += moved * moved;
      }
      last_x[p] = x;
      last_eps[p] = eps;
    }
    sums.norm += norm;
    sums.change += change;
    sums.move += move;
  }
  return sums;
}

template <class T>
StepSums row_sums(const GuidanceStep& step, std::size_t row) {
  float* const map = step.map + row * step.pixels;
  for (std::size_t p = 0; p < step.pixels; ++p) map[p] = 0;
  StepSums sums;
  for (std::size_t k = 0; k < step.channels; ++k) {
    const StepSums channel = channel_sums<T>(step, (row * step.channels + k) * step.pixels, map);
    sums.norm += channel.norm;
    sums.change += channel.change;
    sums.move += channel.move;
  }
  return sums;
}

StepSums row_sums(const GuidanceStep& step, std::size_t row) {
  switch (step.dtype) {
    case DType::float16:
      return row_sums<Half>(step, row);
    case DType::bfloat16:
      return row_sums<Bfloat16>(step, row);
    default:
      return row_sums<float>(step, row);
  }
}

}  // namespace

std::size_t guidance_step(const GuidanceStep& step) {
  std::size_t not_finite = 0;
  for (std::size_t r = 0; r < step.rows; ++r) {
    StepSums sums = row_sums(step, r);
    if (!std::isfinite(sums.norm + sums.change + sums.move)) {
      sums.norm = sums.change = sums.move = std::numeric_limits<double>::quiet_NaN();
      ++not_finite;
    }
    step.out[r] = std::sqrt(sums.norm);
    step.out[step.rows + r] = std::sqrt(sums.change);
    step.out[2 * step.rows + r] = std::sqrt(sums.move);
  }
  return not_finite;
}

}  // namespace memedge
