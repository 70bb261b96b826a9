// Runs CUDA source, unchanged, on a CPU: include this, then the .cu, and compile both with a C++ compiler.
//
// Every CUDA thread is a fiber. One runs until it waits for others (a barrier, a shuffle) or ends; then comes the next,
// in rising or falling order: where the order changes a result, a barrier is missing. Blocks run one after the other.
// Only what csrc/guidance_stats.cu uses is here. What would hang or fault on a GPU (a barrier that not all threads reach,
// a misaligned load, a launch without blocks) ends the process with a message.
#pragma once

#include <math.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(threads)
#define __shared__ static  // one block runs at a time

struct dim3 {
  unsigned x, y = 1, z = 1;
  explicit dim3(unsigned count) : x(count) {}
};
struct uint4 {
  unsigned x, y, z, w;
};

inline dim3 threadIdx(0), blockIdx(0), gridDim(0);

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32;
constexpr std::size_t kStack = std::size_t{1} << 17;

enum class State { ready, at_barrier, at_shuffle, ended };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::ended;
  std::uint32_t offered = 0;  // to the other lanes, in a shuffle
};

inline bool falling = false;  // the order of threads and blocks
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> kernel;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA on CPU: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

inline void wait(State state) {
  const dim3 me = threadIdx;
  fibers[me.x].state = state;
  swapcontext(&fibers[me.x].context, &scheduler);
  threadIdx = me;
}

inline void thread_main() {
  kernel();
  wait(State::ended);
}

// Lets every thread run that can; false if there was none.
inline bool run_ready() {
  bool ran = false;
  const unsigned count = static_cast<unsigned>(fibers.size());
  for (unsigned i = 0; i < count; ++i) {
    threadIdx.x = falling ? count - 1 - i : i;
    Fiber& fiber = fibers[threadIdx.x];
    if (fiber.state != State::ready) continue;
    swapcontext(&scheduler, &fiber.context);
    ran = true;
  }
  return ran;
}

// Lets `count` threads from `first` go on if all of them wait in this state.
inline bool release(std::size_t first, std::size_t count, State state) {
  for (std::size_t i = first; i < first + count; ++i) {
    if (fibers[i].state != state) return false;
  }
  for (std::size_t i = first; i < first + count; ++i) fibers[i].state = State::ready;
  return true;
}

inline void run_block() {
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, thread_main, 0);
    fiber.state = State::ready;
  }
  while (run_ready()) {
    release(0, fibers.size(), State::at_barrier);
    for (std::size_t warp = 0; warp < fibers.size(); warp += kWarp) release(warp, kWarp, State::at_shuffle);
  }
  for (const Fiber& fiber : fibers) {
    if (fiber.state != State::ended) fail("a barrier or shuffle that not all of its threads reach");
  }
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::State::at_barrier); }

inline float __shfl_xor_sync(unsigned mask, float value, unsigned lanes) {
  using namespace cuda_on_cpu;
  if (mask != 0xffffffffu || lanes >= kWarp) fail("only shuffles of whole warps are known here");
  std::memcpy(&fibers[threadIdx.x].offered, &value, sizeof value);
  wait(State::at_shuffle);  // until all have offered
  std::memcpy(&value, &fibers[threadIdx.x ^ lanes].offered, sizeof value);
  wait(State::at_shuffle);  // until all have read
  return value;
}

inline uint4 __ldg(const uint4* p) {
  if (reinterpret_cast<std::uintptr_t>(p) % 16) cuda_on_cpu::fail("a 16-byte load that is not aligned");
  uint4 value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct __half {
  _Float16 value;
};
inline __half __ushort_as_half(std::uint16_t bits) {
  __half half;
  std::memcpy(&half, &bits, sizeof half);
  return half;
}
inline float __half2float(__half half) { return static_cast<float>(half.value); }

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
using cudaStream_t = struct Stream*;
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration"; }

template <class Argument>
cudaError_t cudaLaunchKernel(void (*function)(Argument), dim3 grid, dim3 block, void** arguments, std::size_t,
                             cudaStream_t) {
  using namespace cuda_on_cpu;
  if (!grid.x || !block.x || block.x > 1024 || block.x % kWarp) return cudaErrorInvalidConfiguration;
  fibers.resize(block.x);
  gridDim = grid;
  kernel = [&] { function(*static_cast<std::remove_const_t<Argument>*>(arguments[0])); };
  for (unsigned i = 0; i < grid.x; ++i) {
    blockIdx.x = falling ? grid.x - 1 - i : i;
    run_block();
  }
  return cudaSuccess;
}
