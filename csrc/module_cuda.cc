// The part of memedge._core that reduces on an NVIDIA GPU; compiled where nvcc is.
#include <stdexcept>

#include "binding.h"

namespace memedge {
namespace {

void check(const char* error) {
  if (error) throw std::runtime_error(std::string("CUDA guidance statistics: ") + error);
}

void launch(std::uintptr_t cond, std::uintptr_t uncond, std::uintptr_t out, const std::string& dtype, std::size_t rows,
            std::size_t uncond_rows, std::size_t channels, std::size_t pixels, const std::string& operands,
            std::uintptr_t stream, std::uintptr_t row) {
  const GuidanceStats task =
      checked_task(cond, uncond, out, dtype, rows, uncond_rows, channels, pixels, operands, row);
  py::gil_scoped_release unlocked;  // the first call starts CUDA
  check(cuda_guidance_stats(task, reinterpret_cast<void*>(stream)));
}

}  // namespace

void define_cuda(py::module_& m) {
  m.def("cuda_guidance_stats", &launch, py::arg("cond_ptr"), py::arg("uncond_ptr"), py::arg("out_ptr"),
        py::arg("dtype"), py::arg("rows"), py::arg("uncond_rows"), py::arg("channels"), py::arg("pixels"),
        py::arg("operands") = "uncond_delta", py::arg("stream") = 0, py::kw_only(), py::arg("row_ptr") = 0,
        "The same in memory of the current CUDA device, enqueued on the stream (a cudaStream_t) and not waited for. Rows "
        "that are not finite are NaN, and so are rows whose uncond row does not exist. Raises RuntimeError with CUDA's "
        "reason where nothing was enqueued.");
}

}  // namespace memedge
