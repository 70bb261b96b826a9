// The Python module memedge._core. Checks names and counts; memory is the caller's promise (engine/reduction.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "guidance_stats.h"

namespace py = pybind11;
using namespace memedge;

#if defined(__clang__)
#define MEMEDGE_COMPILER __VERSION__
#else
#define MEMEDGE_COMPILER "GCC " __VERSION__
#endif

namespace {

template <class E>
using Names = std::vector<std::pair<const char*, E>>;

const Names<DType> kDTypes{{"float32", DType::float32}, {"float16", DType::float16}, {"bfloat16", DType::bfloat16}};
const Names<Operands> kOperands{{"uncond_delta", Operands::uncond_delta},
                                {"cond_uncond", Operands::cond_uncond},
                                {"cond_delta", Operands::cond_delta}};
const Names<Isa> kIsas{{"scalar", Isa::scalar}, {"neon", Isa::neon}, {"avx2", Isa::avx2}, {"avx512", Isa::avx512}};

template <class E>
E parse(const Names<E>& names, const std::string& name, const char* what) {
  for (const auto& [known, value] : names) {
    if (name == known) return value;
  }
  throw py::value_error(std::string("unknown ") + what + " '" + name + "'");
}

std::vector<std::string> isa_available() {
  std::vector<std::string> available;
  for (const Isa isa : available_isas()) {
    for (const auto& [name, value] : kIsas) {
      if (value == isa) available.emplace_back(name);
    }
  }
  return available;
}

// numpy.ndarray.ctypes.data takes a microsecond, as long as a quarter of a small reduction.
std::uintptr_t address(const py::object& buffer) {
  Py_buffer view;
  if (PyObject_GetBuffer(buffer.ptr(), &view, PyBUF_SIMPLE)) throw py::error_already_set();
  const auto pointer = reinterpret_cast<std::uintptr_t>(view.buf);
  PyBuffer_Release(&view);
  return pointer;
}

std::string isa_active() { return isa_available().back(); }

Isa parse_isa(const std::string& name) {
  if (name.empty()) return available_isas().back();
  const Isa isa = parse(kIsas, name, "isa");
  const auto& available = available_isas();
  if (std::find(available.begin(), available.end(), isa) == available.end()) {
    throw py::value_error("this build or processor cannot run isa '" + name + "'");
  }
  return isa;
}

void check(std::uintptr_t cond, std::uintptr_t uncond, std::uintptr_t out, std::size_t rows, std::size_t uncond_rows,
           std::size_t channels, std::size_t pixels) {
  if (!cond || !uncond || !out) throw py::value_error("a pointer is null");
  if (!rows || !uncond_rows || !channels || !pixels) throw py::value_error("a size is zero");
  if (rows % uncond_rows) throw py::value_error("rows is no multiple of uncond_rows");
}

std::size_t run(std::uintptr_t cond, std::uintptr_t uncond, std::uintptr_t out, const std::string& dtype,
                std::size_t rows, std::size_t uncond_rows, std::size_t channels, std::size_t pixels,
                const std::string& operands, std::size_t threads, const std::string& isa) {
  check(cond, uncond, out, rows, uncond_rows, channels, pixels);
  const GuidanceStats task{
      reinterpret_cast<const void*>(cond), reinterpret_cast<const void*>(uncond), reinterpret_cast<double*>(out),
      parse(kDTypes, dtype, "dtype"), parse(kOperands, operands, "operands"), rows, uncond_rows, channels, pixels,
      threads, parse_isa(isa)};
  py::gil_scoped_release unlocked;
  return guidance_stats(task);
}

#ifdef MEMEDGE_CUDA
void run_cuda(std::uintptr_t cond, std::uintptr_t uncond, std::uintptr_t out, const std::string& dtype,
              std::size_t rows, std::size_t uncond_rows, std::size_t channels, std::size_t pixels,
              const std::string& operands, std::uintptr_t stream) {
  check(cond, uncond, out, rows, uncond_rows, channels, pixels);
  const DeviceGuidanceStats task{
      reinterpret_cast<const void*>(cond), reinterpret_cast<const void*>(uncond), reinterpret_cast<double*>(out),
      parse(kDTypes, dtype, "dtype"), parse(kOperands, operands, "operands"), rows, uncond_rows, channels, pixels};
  py::gil_scoped_release unlocked;  // the first call starts CUDA
  const char* error = guidance_stats(task, reinterpret_cast<void*>(stream));
  if (error) throw std::runtime_error(std::string("CUDA guidance statistics: ") + error);
}
#endif

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Native guidance statistics of memedge; use memedge.engine.reduction, which checks the memory first.";
  m.def("guidance_stats", &run, py::arg("cond_ptr"), py::arg("uncond_ptr"), py::arg("out_ptr"), py::arg("dtype"),
        py::arg("rows"), py::arg("uncond_rows"), py::arg("channels"), py::arg("pixels"),
        py::arg("operands") = "uncond_delta", py::arg("threads") = 0, py::arg("isa") = "",
        "cond [rows, channels, pixels], uncond [uncond_rows, channels, pixels] -> out float64 [3, rows]: norm, channel, "
        "flat. Contiguous host memory. threads 0: all; isa '': the fastest. Returns how many rows are not finite.");
  m.def("address", &address, "Where a contiguous buffer starts; valid as long as the buffer is.");
  m.def("isa_available", &isa_available, "Instruction sets this build has and this processor runs, slowest first.");
  m.def("isa_active", &isa_active, "The instruction set used unless one is named.");
  m.attr("COMPILER") = MEMEDGE_COMPILER;
#ifdef MEMEDGE_CUDA
  m.def("cuda_guidance_stats", &run_cuda, py::arg("cond_ptr"), py::arg("uncond_ptr"), py::arg("out_ptr"),
        py::arg("dtype"), py::arg("rows"), py::arg("uncond_rows"), py::arg("channels"), py::arg("pixels"),
        py::arg("operands") = "uncond_delta", py::arg("stream") = 0,
        "The same in memory of the current CUDA device, enqueued on the stream (a cudaStream_t) and not waited for. Rows "
        "that are not finite are NaN. Raises RuntimeError with CUDA's reason where nothing was enqueued.");
  m.attr("CUDA") = true;
#else
  m.attr("CUDA") = false;
#endif
}
