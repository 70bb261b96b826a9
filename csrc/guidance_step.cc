// The step on a CPU: one loop over a channel of a row.
#include "guidance_step.h"

#include <cmath>
#include <limits>

#include "serial.h"

namespace memedge {
namespace {

// Squares are summed in as many float32 lanes, which compilers make vectors of, and flushed to float64 before they lose
// digits.
constexpr std::size_t kLanes = 16, kBlock = 64 * kLanes;

struct StepSums {
  double norm = 0, change = 0, move = 0;  // squared
};

struct Lanes {
  float norm[kLanes] = {}, change[kLanes] = {}, move[kLanes] = {};
};

// One channel of one row, of `count` pixels.
template <class T>
struct Channel {
  const T* __restrict x;
  const T* __restrict cond;
  const T* __restrict uncond;
  float* __restrict last_x;
  float* __restrict last_eps;
  float* __restrict map;
  float scale, shift, later;  // later: 0 at the first step, 1 at all others

  void add(std::size_t p, std::size_t lane, Lanes& lanes) const {
    const float own = widen(x[p]), c = widen(cond[p]);
    const float eps = scale * c + shift * own;
    const float delta = scale * (c - widen(uncond[p]));
    const float by = later * (eps - last_eps[p]), moved = later * (own - last_x[p]);
    lanes.norm[lane] += delta * delta;
    lanes.change[lane] += by * by;
    lanes.move[lane] += moved * moved;
    map[p] += delta * delta;
    last_x[p] = own;
    last_eps[p] = eps;
  }
};

template <class T>
void add_channel(StepSums& sums, const Channel<T>& channel, std::size_t pixels) {
  for (std::size_t start = 0; start < pixels; start += kBlock) {
    const std::size_t end = start + kBlock < pixels ? start + kBlock : pixels;
    Lanes lanes;
    std::size_t p = start;
    for (; p + kLanes <= end; p += kLanes) {
      for (std::size_t lane = 0; lane < kLanes; ++lane) channel.add(p + lane, lane, lanes);
    }
    for (; p < end; ++p) channel.add(p, 0, lanes);
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      sums.norm += lanes.norm[lane];
      sums.change += lanes.change[lane];
      sums.move += lanes.move[lane];
    }
  }
}

template <class T>
StepSums row_sums(const GuidanceStep& step, std::size_t row) {
  float* const map = step.map + row * step.pixels;
  for (std::size_t p = 0; p < step.pixels; ++p) map[p] = 0;
  StepSums sums;
  for (std::size_t k = 0; k < step.channels; ++k) {
    const std::size_t at = (row * step.channels + k) * step.pixels;
    if (step.first) {  // whatever is there may not be finite
      for (std::size_t p = at; p < at + step.pixels; ++p) step.last_x[p] = step.last_eps[p] = 0;
    }
    add_channel<T>(sums,
                   {static_cast<const T*>(step.x) + at, static_cast<const T*>(step.cond) + at,
                    static_cast<const T*>(step.uncond) + at, step.last_x + at, step.last_eps + at, map, step.scale,
                    step.shift, step.first ? 0.0f : 1.0f},
                   step.pixels);
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
