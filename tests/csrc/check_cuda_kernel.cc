// csrc/guidance_stats.cu, unchanged, on a CPU in both thread orders against serial.h; for machines without a GPU.
//
//   g++ -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -pthread -DMEMEDGE_SERIAL_ONLY
//       -Icsrc tests/csrc/check_cuda_kernel.cc -o check && ./check
//
// `check race` and `check divergence` run a kernel with that mistake, to show that the mistakes are found.
#include "cuda_on_cpu.h"
//
#include "guidance_stats.cu"
//
#include <limits>
#include <random>
#include <string>
#include <type_traits>

#include "serial.h"

using namespace memedge;

