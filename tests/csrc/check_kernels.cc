// Every instruction set of this machine against serial.h, with no Python: for sanitizers and for emulated processors.
//
//   g++ -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -pthread -mavx2 -mfma -mf16c
//       -c csrc/guidance_stats_avx2.cc                         (and so on, each file with its flags from setup.py)
//   g++ ... -Icsrc tests/csrc/check_kernels.cc csrc/guidance_stats.cc *.o -o check && ./check
//   aarch64-linux-gnu-g++ -std=c++17 -O3 -static -Icsrc tests/csrc/check_kernels.cc csrc/guidance_stats.cc
//       csrc/guidance_stats_neon.cc -o check && qemu-aarch64 ./check
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>

#include "guidance_stats.h"

using namespace memedge;

namespace {

constexpr std::size_t kRows = 4, kUncondRows = 2;
int failures = 0;

void store(unsigned char* to, DType dtype, float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (dtype == DType::float32) {
    std::memcpy(to, &bits, 4);
  } else {  // truncated; the values used here are normal numbers of every dtype, or not finite
    std::uint16_t half = static_cast<std::uint16_t>(bits >> 16);
    if (dtype == DType::float16) {
      const int exponent = static_cast<int>(bits >> 23 & 255) - 112;
      half = static_cast<std::uint16_t>((bits >> 16 & 0x8000) |
                                        (std::isfinite(value) ? exponent << 10 | (bits >> 13 & 1023)
                                                              : 0x7c00 | (std::isnan(value) ? 512 : 0)));
    }
    std::memcpy(to, &half, 2);
  }
}

void expect(bool good, const char* what, Isa isa, DType dtype, Operands operands, std::size_t channels,
            std::size_t pixels) {
  if (good) return;
  ++failures;
  std::printf("FAILED %s: isa %d dtype %d operands %d channels %zu pixels %zu\n", what, static_cast<int>(isa),
              static_cast<int>(dtype), static_cast<int>(operands), channels, pixels);
}

void check(DType dtype, Operands operands, std::size_t channels, std::size_t pixels) {
  const std::size_t item = dtype == DType::float32 ? 4 : 2, row_size = channels * pixels;
  // Allocated to the byte, so that a read beyond the end is caught, and offset by one, so that nothing is aligned.
  const std::unique_ptr<unsigned char[]> cond(new unsigned char[kRows * row_size * item + 1]);
  const std::unique_ptr<unsigned char[]> uncond(new unsigned char[kUncondRows * row_size * item + 1]);
  std::mt19937 random(static_cast<unsigned>(row_size));
  std::uniform_real_distribution<float> uniform(0.125f, 4.0f);
  const auto value = [&] { return random() & 1 ? uniform(random) : -uniform(random); };
  for (std::size_t i = 0; i < kRows * row_size; ++i) store(cond.get() + 1 + i * item, dtype, value());
  for (std::size_t i = 0; i < kUncondRows * row_size; ++i) store(uncond.get() + 1 + i * item, dtype, value());

  double truth[3 * kRows], out[3 * kRows];
  const auto agrees = [&] {
    bool good = true;
    for (std::size_t i = 0; i < 3 * kRows; ++i) {
      good = good && std::fabs(out[i] - truth[i]) <= 1e-6 * std::max(1.0, std::fabs(truth[i]));
    }
    return good;
  };
  GuidanceStats task{cond.get() + 1, uncond.get() + 1, nullptr,     truth,    dtype,
                     operands,       kRows,            kUncondRows, channels, pixels};
  expect(guidance_stats(task, 3, Isa::scalar) == 0, "scalar finite", Isa::scalar, dtype, operands, channels, pixels);
  task.out = out;
  for (const Isa isa : available_isas()) {
    expect(guidance_stats(task, 3, isa) == 0, "finite", isa, dtype, operands, channels, pixels);
    expect(agrees(), "truth", isa, dtype, operands, channels, pixels);
  }
  const std::int64_t row[kRows] = {1, 1, 0, 1};
  task.row = row;
  for (std::size_t r = 0; r < kRows; ++r) {  // row by row, each with its own uncond row
    double of_row[3];
    const GuidanceStats alone{cond.get() + 1 + r * row_size * item,
                              uncond.get() + 1 + static_cast<std::size_t>(row[r]) * row_size * item,
                              nullptr, of_row, dtype, operands, 1, 1, channels, pixels};
    guidance_stats(alone, 1, Isa::scalar);
    for (std::size_t i = 0; i < 3; ++i) truth[i * kRows + r] = of_row[i];
  }
  for (const Isa isa : available_isas()) {
    expect(guidance_stats(task, 3, isa) == 0, "indexed finite", isa, dtype, operands, channels, pixels);
    expect(agrees(), "indexed truth", isa, dtype, operands, channels, pixels);
  }
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    const std::size_t place = random() % row_size;
    store(cond.get() + 1 + (row_size + place) * item, dtype, bad);
    for (const Isa isa : available_isas()) {
      const bool caught = guidance_stats(task, 3, isa) == 1 && std::isnan(out[1]) && std::isnan(out[kRows + 1]) &&
                          std::isnan(out[2 * kRows + 1]) && std::isfinite(out[0]);
      expect(caught, "not finite", isa, dtype, operands, channels, pixels);
    }
  }
}

}  // namespace

int main() {
  std::size_t checks = 0;
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    for (const Operands operands : {Operands::uncond_delta, Operands::cond_uncond, Operands::cond_delta}) {
      for (const std::size_t channels : {1, 3, 4, 16, 65, 130}) {
        for (std::size_t pixels = 1; pixels <= 35; ++pixels, ++checks) check(dtype, operands, channels, pixels);
        for (const std::size_t pixels : {511, 512, 513, 1031}) ++checks, check(dtype, operands, channels, pixels);
      }
      check(dtype, operands, 4, 300007), ++checks;
    }
  }
  std::printf("%zu cases on %zu instruction sets, %d failures\n", checks, available_isas().size(), failures);
  return failures != 0;
}
