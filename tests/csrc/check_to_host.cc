// csrc/to_host.cu, unchanged, over a runtime on the CPU: its result, its order, and what it leaves behind whichever call
// fails. Built as check_cuda_kernel.cc is.
#include <algorithm>
#include <initializer_list>

#include "cuda_runtime_on_cpu.h"
// The sources under test need the above.
#include "guidance_stats.cu"
#include "to_host.cu"

using namespace memedge;

namespace {

int failures = 0;

void expect(bool good, const char* what, int failing) {
  if (good) return;
  ++failures;
  std::printf("FAILED %s, with call %d failing\n", what, failing);
}

struct Call {
  const char* problem;
  double norm;
};

// One row of 16 threes less ones: its norm is 8.
Call reduce(int device, std::uintptr_t stream, std::uintptr_t uncond_stream, std::size_t offset = 0) {
  alignas(16) float cond[17], uncond[17];
  std::fill(cond, cond + 17, 3.0f);
  std::fill(uncond, uncond + 17, 1.0f);
  double out[3] = {-7, -7, -7};
  const char* shifted = reinterpret_cast<const char*>(cond) + offset;
  const char* problem = cuda_guidance_stats_to_host(
      {shifted, uncond, nullptr, out, DType::float32, Operands::uncond_delta, 1, 1, 4, 4}, device,
      reinterpret_cast<void*>(stream), reinterpret_cast<void*>(uncond_stream));
  for (const auto& [of_stream, work] : cuda_on_cpu::enqueued) {
    expect(work.empty(), "work that outlives its buffers", cuda_on_cpu::failing);
  }
  return {problem, out[0]};
}

void reset(int failing) {
  cuda_on_cpu::calls = 0;
  cuda_on_cpu::failing = failing;
  cuda_on_cpu::device = 1;
  cuda_on_cpu::waited_for.clear();
}

void check_every_failure(int device, std::uintptr_t stream, std::uintptr_t uncond_stream) {
  reset(-1);
  const Call good = reduce(device, stream, uncond_stream);
  expect(!good.problem && good.norm == 8, "result", -1);
  const int calls = cuda_on_cpu::calls;
  const auto handle = [](std::uintptr_t value) { return reinterpret_cast<cudaStream_t>(value); };
  std::vector<cudaStream_t> expected{handle(stream)};
  if (stream != uncond_stream) expected.insert(expected.begin(), handle(uncond_stream));
  expect(cuda_on_cpu::waited_for == expected, "streams waited for", -1);
  expect(cuda_on_cpu::device == 1, "device restored", -1);
  expect(cuda_on_cpu::buffers.empty(), "buffer freed", -1);

  const bool switches = device != 1;
  for (int failing = 0; failing < calls; ++failing) {
    reset(failing);
    const Call call = reduce(device, stream, uncond_stream);
    const bool restoring = switches && failing == calls - 1;  // too late to say so: the result is there
    expect(restoring ? !call.problem : call.problem != nullptr, "reported", failing);
    expect(cuda_on_cpu::device == 1, "device restored", failing);
    for (void* buffer : cuda_on_cpu::buffers) {  // only where freeing it is what failed
      expect(failing == calls - 2 - switches, "buffer freed", failing);
      std::free(buffer);
    }
    cuda_on_cpu::buffers.clear();
  }
}

}  // namespace

int main() {
  for (const int device : {0, 1}) {
    for (const std::uintptr_t uncond_stream : {7, 9}) check_every_failure(device, 7, uncond_stream);
  }
  reset(-1);
  expect(reduce(5, 7, 7).problem && cuda_on_cpu::device == 1, "no such device", -1);
  reset(-1);
  expect(reduce(1, 7, 7, 2).problem && cuda_on_cpu::buffers.empty(), "misaligned cond", -1);

  int device = -1;
  reset(-1);
  expect(!cuda_device_of(&device, &device) && device == 1, "device of an address", -1);
  expect(cuda_device_of(nullptr, &device), "address of no device", -1);
  reset(0);
  expect(cuda_device_of(&device, &device), "attributes fail", 0);
  std::printf("%d failures\n", failures);
  return failures != 0;
}
