// csrc/guidance_stats.cu, unchanged, on a CPU in both thread orders against serial.h: for machines without a GPU.
//
//   g++ -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all
//       -Wno-unknown-pragmas -Icsrc tests/csrc/check_cuda_kernel.cc -o check && ./check
//
// With the argument "race", "divergence" or "alignment" it runs a kernel that makes this mistake, to show that such
// mistakes are found: it exits with 1 or aborts.
#include "cuda_on_cpu.h"
// The source under test needs the above.
#include <algorithm>
#include <random>
#include <string>

#include "guidance_stats.cu"
#include "serial.h"

using namespace memedge;

namespace {

int failures = 0;
std::size_t checks = 0;

struct Case {
  DType dtype;
  Operands operands;
  std::size_t rows, uncond_rows, channels, pixels, offset;  // the offset, in items, of both inputs from 16 bytes
};

void expect(bool good, const char* what, const Case& c) {
  ++checks;
  if (good) return;
  ++failures;
  std::printf("FAILED %s: dtype %d operands %d rows %zu / %zu channels %zu pixels %zu offset %zu\n", what,
              static_cast<int>(c.dtype), static_cast<int>(c.operands), c.rows, c.uncond_rows, c.channels, c.pixels,
              c.offset);
}

// Items that end where the memory ends, so that a sanitizer sees a read beyond, at the case's offset from 16 bytes.
class Items {
 public:
  Items(const Case& c, std::size_t rows)
      : dtype_(c.dtype), count_(rows * c.channels * c.pixels), start_(c.offset * item()),
        bytes_(new Aligned[(start_ + count_ * item() + 15) / 16]) {
    // What lies between the last item and the end of its 16 bytes is NaN: a read beyond spoils the result.
    std::memset(bytes_.get(), 0xff, (start_ + count_ * item() + 15) / 16 * 16);
  }

  void set(std::size_t i, float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (dtype_ == DType::float16) {
      const auto half = static_cast<_Float16>(value);
      std::memcpy(data() + i * 2, &half, 2);
    } else if (dtype_ == DType::bfloat16) {  // truncated
      const auto half = static_cast<std::uint16_t>(bits >> 16);
      std::memcpy(data() + i * 2, &half, 2);
    } else {
      std::memcpy(data() + i * 4, &bits, 4);
    }
  }
  template <class Value>
  void fill(Value value) {
    for (std::size_t i = 0; i < count_; ++i) set(i, value());
  }

  std::size_t item() const { return dtype_ == DType::float32 ? 4 : 2; }
  unsigned char* data() const { return bytes_[0].bytes + start_; }

 private:
  struct alignas(16) Aligned {
    unsigned char bytes[16];
  };
  DType dtype_;
  std::size_t count_, start_;
  std::unique_ptr<Aligned[]> bytes_;
};

template <class T>
RowSums serial(Operands operands, const void* cond, const void* uncond, const Case& c) {
  switch (operands) {
    case Operands::cond_uncond:
      return serial_row<T, Operands::cond_uncond>(cond, uncond, c.channels, c.pixels);
    case Operands::cond_delta:
      return serial_row<T, Operands::cond_delta>(cond, uncond, c.channels, c.pixels);
    default:
      return serial_row<T, Operands::uncond_delta>(cond, uncond, c.channels, c.pixels);
  }
}

using Index = std::vector<std::int64_t>;  // empty: none

std::vector<double> truth(const Case& c, const Items& cond, const Items& uncond, const Index& row = {}) {
  std::vector<double> out(3 * c.rows);
  const std::size_t row_bytes = c.channels * c.pixels * cond.item();
  for (std::size_t r = 0; r < c.rows; ++r) {
    const void* a = cond.data() + r * row_bytes;
    const void* b = uncond.data() + (row.empty() ? r % c.uncond_rows : static_cast<std::size_t>(row[r])) * row_bytes;
    const RowSums s = c.dtype == DType::float32   ? serial<float>(c.operands, a, b, c)
                      : c.dtype == DType::float16 ? serial<Half>(c.operands, a, b, c)
                                                  : serial<Bfloat16>(c.operands, a, b, c);
    const bool finite = std::isfinite(s.aa) && std::isfinite(s.bb) && std::isfinite(s.dd);
    out[r] = finite ? std::sqrt(s.dd) : NAN;
    out[c.rows + r] = finite ? s.cosine / static_cast<double>(c.pixels) : NAN;
    out[2 * c.rows + r] = finite ? cosine(s.aa, s.bb, s.ab) : NAN;
  }
  return out;
}

// In both thread orders, which have to agree to the bit.
std::vector<double> run(const Case& c, const Items& cond, const Items& uncond, const Index& row = {}) {
  std::vector<double> out[2];
  for (const bool falling : {false, true}) {
    cuda_on_cpu::falling = falling;
    out[falling].assign(3 * c.rows, -7.0);
    const char* error = cuda_guidance_stats(
        {cond.data(), uncond.data(), row.empty() ? nullptr : row.data(), out[falling].data(), c.dtype, c.operands,
         c.rows, c.uncond_rows, c.channels, c.pixels},
        nullptr);
    expect(!error, error ? error : "launch", c);
  }
  expect(!std::memcmp(out[0].data(), out[1].data(), out[0].size() * sizeof(double)), "thread order", c);
  return out[0];
}

bool close(const std::vector<double>& out, const std::vector<double>& expected, std::size_t rows) {
  bool good = true;
  for (std::size_t i = 0; i < out.size(); ++i) {
    const double tolerance = i < rows ? 1e-6 * expected[i] : 1e-6;  // precision.py's
    good = good && std::fabs(out[i] - expected[i]) <= tolerance && (i < rows || std::fabs(out[i]) <= 1);
  }
  return good;
}

bool is_nan(const std::vector<double>& out, std::size_t rows, std::size_t row) {
  return std::isnan(out[row]) && std::isnan(out[rows + row]) && std::isnan(out[2 * rows + row]);
}

void check_truth(const Case& c, float scale = 1, float shift = 0.3f) {
  Items cond(c, c.rows), uncond(c, c.uncond_rows);
  std::mt19937 random(static_cast<unsigned>(c.channels * c.pixels));
  std::normal_distribution<float> normal;
  std::vector<float> values(c.uncond_rows * c.channels * c.pixels);
  for (float& value : values) value = normal(random);
  std::size_t i = 0;
  uncond.fill([&] { return scale * values[i++]; });
  i = 0;
  cond.fill([&] { return scale * (values[i++ % values.size()] + shift * normal(random)); });
  expect(close(run(c, cond, uncond), truth(c, cond, uncond), c.rows), "truth", c);
}

// Rows that name their uncond row; where it does not exist, the row is NaN and nothing is read.
void check_index(DType dtype, Operands operands, std::size_t channels, std::size_t pixels) {
  constexpr std::int64_t kLowest = INT64_MIN;
  const Case c{dtype, operands, 8, 3, channels, pixels, 0};
  Items cond(c, c.rows), uncond(c, c.uncond_rows);
  std::mt19937 random(static_cast<unsigned>(channels * pixels));
  std::normal_distribution<float> normal;
  cond.fill([&] { return normal(random); });
  uncond.fill([&] { return normal(random); });
  const Index known{2, 2, 0, 1, 0, 2, 1, 0};
  auto expected = truth(c, cond, uncond, known);
  expect(close(run(c, cond, uncond, known), expected, c.rows), "index", c);

  const Index partly{2, -1, 0, 3, kLowest, 2, INT64_MAX, std::int64_t{1} << 32};
  auto out = run(c, cond, uncond, partly);
  for (const std::size_t r : {1, 3, 4, 6, 7}) {
    expect(is_nan(out, c.rows, r), "index out of range", c);
    for (std::size_t i = 0; i < 3; ++i) out[i * c.rows + r] = expected[i * c.rows + r];
  }
  expect(close(out, expected, c.rows), "index beside one out of range", c);

  const Case more{dtype, operands, 1, 3, channels, pixels, 0};  // more uncond rows than rows
  expect(close(run(more, cond, uncond, {1}), truth(more, cond, uncond, {1}), 1), "index into more rows", more);
}

void check_zeros(const Case& c) {
  Items cond(c, c.rows), uncond(c, c.uncond_rows);
  const auto zero = [] { return 0.0f; };
  const auto two = [] { return 2.0f; };
  for (const bool uncond_is_zero : {true, false}) {
    uncond_is_zero ? uncond.fill(zero) : uncond.fill(two);
    for (const bool cond_is_zero : {true, false}) {
      cond_is_zero ? cond.fill(zero) : cond.fill(two);
      const auto out = run(c, cond, uncond);
      expect(close(out, truth(c, cond, uncond), c.rows), "zeros", c);
      if (uncond_is_zero == cond_is_zero) expect(out[0] == 0, "equal inputs", c);
    }
  }
}

// One bad value, in cond or uncond, at the start, somewhere or at the end, in each row but the last: they alone are NaN.
void check_not_finite(DType dtype, Operands operands, std::size_t channels, std::size_t pixels) {
  constexpr std::size_t kBadRows = 18;
  const Case c{dtype, operands, kBadRows + 1, kBadRows + 1, channels, pixels, 0};
  const std::size_t row = channels * pixels;
  std::mt19937 random(static_cast<unsigned>(row));
  std::uniform_real_distribution<float> uniform(0.125f, 4.0f);
  Items cond(c, c.rows), uncond(c, c.rows);
  cond.fill([&] { return uniform(random); });
  uncond.fill([&] { return uniform(random); });
  const auto expected = truth(c, cond, uncond);
  std::size_t r = 0;
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    for (Items* items : {&cond, &uncond}) {
      for (const std::size_t place : {std::size_t{0}, random() % row, row - 1}) items->set(r++ * row + place, bad);
    }
  }
  const auto out = run(c, cond, uncond);
  for (r = 0; r < kBadRows; ++r) expect(is_nan(out, c.rows, r), "not finite", c);
  for (std::size_t i = 0; i < 3; ++i) {
    const std::size_t last = i * c.rows + kBadRows;
    expect(std::fabs(out[last] - expected[last]) <= 1e-6 * std::max(1.0, expected[last]), "the finite row", c);
  }
}

// Squares beyond float32 are NaN, never a harmless-looking cosine.
void check_overflow(const Case& c) {
  Items cond(c, c.rows), uncond(c, c.uncond_rows);
  uncond.fill([] { return 1.0f; });
  cond.fill([] { return 1e20f; });
  const auto out = run(c, cond, uncond);
  for (std::size_t r = 0; r < c.rows; ++r) expect(is_nan(out, c.rows, r), "overflow", c);
}

void check_refusals() {
  alignas(16) float data[8] = {};
  alignas(16) double out[4] = {};
  const Case c{DType::float32, Operands::uncond_delta, 1, 1, 1, 1, 0};
  GuidanceStats task{data, data, nullptr, out, c.dtype, c.operands, 1, 1, 1, 1};
  expect(!cuda_guidance_stats(task, nullptr), "accepted", c);
  task.cond = reinterpret_cast<const char*>(data) + 2;
  expect(cuda_guidance_stats(task, nullptr), "misaligned cond", c);
  task.cond = data;
  task.out = reinterpret_cast<double*>(reinterpret_cast<char*>(out) + 4);
  expect(cuda_guidance_stats(task, nullptr), "misaligned out", c);
  task.out = out;
  task.row = reinterpret_cast<std::int64_t*>(reinterpret_cast<char*>(out) + 4);
  expect(cuda_guidance_stats(task, nullptr), "misaligned row", c);
  task.row = nullptr;
  task.rows = std::size_t{1} << 31;
  expect(cuda_guidance_stats(task, nullptr), "too many rows", c);
}

int check_all() {
  check_refusals();
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    for (const Operands operands : {Operands::uncond_delta, Operands::cond_uncond, Operands::cond_delta}) {
#ifdef __SANITIZE_ADDRESS__  // all pairs read the same addresses, and this takes minutes
      if (operands != Operands::cond_uncond) continue;
#endif
      for (const std::size_t channels : {1, 3, 4, 16, 65, 130}) {
        for (const std::size_t pixels : {1, 35, 64}) check_truth({dtype, operands, 2, 1, channels, pixels, 0});
        check_truth({dtype, operands, 4, 2, channels, 64, 1});
      }
      for (const std::size_t channels : {1, 3, 4, 16}) {
        for (const std::size_t offset : {0, 1}) {
          check_truth({dtype, operands, 2, 2, channels, 64 * 64, offset});
          check_truth({dtype, operands, 1, 1, channels, 96 * 96, offset});
        }
      }
      check_truth({dtype, operands, 1, 1, 4, 300007, 0});
      for (const std::size_t pixels : {35, 64}) {
        if (operands == Operands::cond_uncond) check_index(dtype, operands, 4, pixels);
        check_zeros({dtype, operands, 2, 1, 4, pixels, 0});
        check_not_finite(dtype, operands, 4, pixels);
        if (dtype != DType::float16) {
          check_overflow({dtype, operands, 2, 1, 4, pixels, 0});
          // The product of the squared norms is beyond float32 here, their reciprocal roots are not.
          check_truth({dtype, operands, 2, 1, 4, pixels, 0}, 1e15f);
          for (const float tiny : {1e-9f, 1e-12f}) check_truth({dtype, operands, 2, 1, 4, pixels, 0}, tiny);
        }
      }
    }
  }
  std::printf("%zu checks, %d failures\n", checks, failures);
  return failures != 0;
}

// Thread 0 reads what the last thread writes, without waiting for it.
void racing_kernel(double* out) {
  __shared__ unsigned written;
  if (threadIdx.x == 63) written = 1;
  if (threadIdx.x == 0) *out = written;
}

void diverging_kernel(double*) {
  if (threadIdx.x < 7) __syncthreads();
}

void misaligned_kernel(double* out) { *out = __ldg(reinterpret_cast<const uint4*>(out + 1)).x; }

int make_mistake(const std::string& mistake) {
  alignas(16) double data[4] = {};
  double out[2];
  for (const bool falling : {false, true}) {
    double* argument = data;
    void* arguments[] = {&argument};
    cuda_on_cpu::falling = falling;
    cudaLaunchKernel(mistake == "race"         ? racing_kernel
                     : mistake == "divergence" ? diverging_kernel
                                               : misaligned_kernel,
                     dim3(1), dim3(64), arguments, 0, nullptr);
    out[falling] = data[0];
  }
  return out[0] != out[1];
}

}  // namespace

int main(int count, char** arguments) { return count > 1 ? make_mistake(arguments[1]) : check_all(); }
