// csrc/guidance_step.cu, unchanged, on a CPU in both thread orders against guidance_step.cc; and what it leaves behind
// whichever call of CUDA fails. Built as check_cuda_kernel.cc is.
#include <algorithm>
#include <random>

#include "cuda_runtime_on_cpu.h"
// The sources under test need the above.
#include "guidance_step.cc"
#include "guidance_step.cu"

using namespace memedge;

namespace {

int failures = 0;

void expect(bool good, const char* what, std::size_t channels, std::size_t pixels) {
  if (good) return;
  ++failures;
  std::printf("FAILED %s: channels %zu pixels %zu\n", what, channels, pixels);
}

constexpr std::size_t kRows = 3, kSteps = 3;

// What is kept of the last step, and what comes out.
struct Kept {
  std::vector<float> last_x, last_eps, map;
  std::vector<double> out;
  Kept(std::size_t channels, std::size_t pixels)
      : last_x(kRows * channels * pixels), last_eps(last_x), map(kRows * pixels), out(3 * kRows) {}
};

template <class T>
GuidanceStep task(const std::vector<T> (&inputs)[3], Kept& kept, DType dtype, bool first, float scale, float shift,
                  std::size_t channels, std::size_t pixels) {
  return {inputs[0].data(), inputs[1].data(), inputs[2].data(), kept.last_x.data(), kept.last_eps.data(),
          kept.map.data(),  kept.out.data(),  dtype,            first,              scale,
          shift,            kRows,            channels,         pixels};
}

template <class Values>
bool close(const Values& own, const Values& expected) {
  for (std::size_t i = 0; i < own.size(); ++i) {
    if (!(std::fabs(own[i] - expected[i]) <= 2e-6 * std::fabs(expected[i]) + 1e-6)) return false;
  }
  return true;
}

void set(float& item, float value) { item = value; }
void set(Half& item, float value) {
  const auto half = static_cast<_Float16>(value);
  std::memcpy(&item, &half, sizeof half);
}
void set(Bfloat16& item, float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  item.bits = static_cast<std::uint16_t>(bits >> 16);
}

template <class T>
void check_truth(DType dtype, float scale, float shift, std::size_t channels, std::size_t pixels) {
  Kept truth(channels, pixels), kept[2] = {{channels, pixels}, {channels, pixels}};
  std::mt19937 random(static_cast<unsigned>(channels * pixels));
  std::normal_distribution<float> normal;
  for (std::size_t i = 0; i < kSteps; ++i) {
    std::vector<T> inputs[3];
    for (auto& values : inputs) {
      values.resize(kRows * channels * pixels);
      for (T& value : values) set(value, normal(random));
    }
    guidance_step(task(inputs, truth, dtype, i == 0, scale, shift, channels, pixels));
    for (const bool falling : {false, true}) {
      cuda_on_cpu::falling = falling;
      const auto step = task(inputs, kept[falling], dtype, i == 0, scale, shift, channels, pixels);
      expect(!cuda_guidance_step(step, 1, {nullptr}), "launch", channels, pixels);
      expect(close(kept[falling].out, truth.out), "truth", channels, pixels);
      expect(close(kept[falling].map, truth.map), "map", channels, pixels);
      expect(close(kept[falling].last_eps, truth.last_eps), "kept", channels, pixels);
    }
    expect(kept[0].out == kept[1].out && kept[0].last_x == kept[1].last_x, "thread order", channels, pixels);
  }
}

void check_every_failure() {
  const std::vector<float> inputs[3] = {std::vector<float>(12, 1.0f), std::vector<float>(12, 3.0f),
                                        std::vector<float>(12, 1.0f)};
  Kept kept(1, 4);
  const auto run = [&](int failing, int device, const std::vector<void*>& streams) {
    cuda_on_cpu::calls = 0;
    cuda_on_cpu::failing = failing;
    cuda_on_cpu::device = 1;
    const char* problem =
        cuda_guidance_step(task(inputs, kept, DType::float32, true, 1, 0, 1, 4), device, streams);
    for (const auto& [stream, work] : cuda_on_cpu::enqueued) expect(work.empty(), "work left", 0, failing);
    expect(cuda_on_cpu::device == 1, "device restored", 0, failing);
    for (void* buffer : cuda_on_cpu::buffers) std::free(buffer);  // only where freeing it is what failed
    cuda_on_cpu::buffers.clear();
    return problem;
  };
  int a = 0, b = 0;
  const std::vector<void*> streams{&a, &b, &a};
  expect(!run(-1, 0, streams) && kept.out[0] == 4, "result", 1, 4);
  const int calls = cuda_on_cpu::calls;
  for (int failing = 0; failing < calls - 1; ++failing) {  // the last one restores the device: the result is there
    expect(run(failing, 0, streams), "reported", 0, failing);
  }
  expect(run(-1, 5, streams), "no such device", 0, 0);
}

}  // namespace

int main() {
  for (const auto& [channels, pixels] : {std::pair<std::size_t, std::size_t>{1, 1}, {4, 64}, {3, 1000}, {16, 513}}) {
    check_truth<float>(DType::float32, 1, 0, channels, pixels);
    check_truth<Half>(DType::float16, 0.6f, 0.8f, channels, pixels);
    check_truth<Bfloat16>(DType::bfloat16, 1, 0, channels, pixels);
  }
  check_every_failure();
  void* memory = nullptr;
  cuda_on_cpu::failing = -1;
  const float given[2] = {1, 2};
  float found[2] = {};
  expect(!cuda_allocate(sizeof given, 1, &memory), "allocate", 0, 0);
  std::memcpy(memory, given, sizeof given);
  expect(!cuda_download(found, memory, sizeof found, 1) && found[1] == 2, "download", 0, 0);
  cuda_release(memory, 1);
  expect(cuda_on_cpu::buffers.empty(), "release", 0, 0);
  expect(cuda_allocate(4, 7, &memory), "allocate on no device", 0, 0);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
