// Chooses the row kernel, spreads rows over threads and turns sums into statistics.
#include "guidance_stats.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <system_error>
#include <thread>

#include "serial.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sched.h>
#endif

namespace memedge {
namespace {

// About a tenth of a millisecond of work; starting a thread costs a few hundredths.
constexpr std::size_t kMinElementsPerThread = std::size_t{1} << 18;

template <class T>
RowKernel scalar_kernel(Operands operands) {
  switch (operands) {
    case Operands::cond_uncond:
      return serial_row<T, Operands::cond_uncond>;
    case Operands::cond_delta:
      return serial_row<T, Operands::cond_delta>;
    default:
      return serial_row<T, Operands::uncond_delta>;
  }
}

RowKernel scalar_kernel(DType dtype, Operands operands) {
  switch (dtype) {
    case DType::float16:
      return scalar_kernel<Half>(operands);
    case DType::bfloat16:
      return scalar_kernel<Bfloat16>(operands);
    default:
      return scalar_kernel<float>(operands);
  }
}

RowKernel kernel(Isa isa, DType dtype, Operands operands) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::avx512:
      return avx512_kernel(dtype, operands);
    case Isa::avx2:
      return avx2_kernel(dtype, operands);
#elif defined(__aarch64__)
    case Isa::neon:
      return neon_kernel(dtype, operands);
#endif
    default:
      return scalar_kernel(dtype, operands);
  }
}

std::vector<Isa> detect_isas() {
  std::vector<Isa> isas{Isa::scalar};
#if defined(__x86_64__)
  unsigned eax, ebx, ecx = 0, edx;
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
  const bool f16c = ecx & bit_F16C;
  // These also ask whether the operating system saves the wide registers.
  if (f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    isas.push_back(Isa::avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
      isas.push_back(Isa::avx512);
    }
  }
#elif defined(__aarch64__)
  isas.push_back(Isa::neon);
#endif
  return isas;
}

std::size_t usable_processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return static_cast<std::size_t>(CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

std::size_t thread_count(const GuidanceStats& task, std::size_t most) {
  const std::size_t worthwhile = task.rows * task.channels * task.pixels / kMinElementsPerThread;
  if (worthwhile <= 1 || most == 1) return 1;
  return std::min({worthwhile, task.rows, most ? most : usable_processors()});
}

}  // namespace

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> isas = detect_isas();
  return isas;
}

std::size_t guidance_stats(const GuidanceStats& task, std::size_t threads, Isa isa) {
  const RowKernel row_kernel = kernel(isa, task.dtype, task.operands);
  const std::size_t row_bytes = task.channels * task.pixels * (task.dtype == DType::float32 ? 4 : 2);
  const char* cond = static_cast<const char*>(task.cond);
  const char* uncond = static_cast<const char*>(task.uncond);
  std::atomic<std::size_t> next{0}, not_finite{0};

  const auto work = [&] {
    for (std::size_t r; (r = next.fetch_add(1, std::memory_order_relaxed)) < task.rows;) {
      const std::size_t paired = task.row ? static_cast<std::size_t>(task.row[r]) : r % task.uncond_rows;
      const RowSums sums =
          row_kernel(cond + r * row_bytes, uncond + paired * row_bytes, task.channels, task.pixels);
      double norm = std::sqrt(sums.dd);
      double channel = std::clamp(sums.cosine / static_cast<double>(task.pixels), -1.0, 1.0);
      double flat = std::clamp(cosine(sums.aa, sums.bb, sums.ab), -1.0, 1.0);
      // These three hold every value squared. What overflowed there may have become a harmless-looking 0 in a cosine.
      if (!std::isfinite(sums.dd) || !std::isfinite(sums.aa) || !std::isfinite(sums.bb)) {
        norm = channel = flat = std::numeric_limits<double>::quiet_NaN();
        not_finite.fetch_add(1, std::memory_order_relaxed);
      }
      task.out[r] = norm;
      task.out[task.rows + r] = channel;
      task.out[2 * task.rows + r] = flat;
    }
  };

  std::vector<std::thread> helpers;
  const std::size_t count = thread_count(task, threads) - 1;
  helpers.reserve(count);
  try {
    while (helpers.size() < count) helpers.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads to be had: those that started and this one do the work.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  return not_finite;
}

}  // namespace memedge
