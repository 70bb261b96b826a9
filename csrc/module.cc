// The Python module memedge._core. Checks names and counts; memory is the caller's promise (engine/reduction.py).
#include <pybind11/stl.h>

#include <algorithm>

#include "binding.h"

using namespace memedge;

#if defined(__clang__)
#define MEMEDGE_COMPILER __VERSION__
#elif defined(_MSC_VER)
#define MEMEDGE_TEXT(number) #number
#define MEMEDGE_TEXT_OF(macro) MEMEDGE_TEXT(macro)
#define MEMEDGE_COMPILER "Visual C++ " MEMEDGE_TEXT_OF(_MSC_VER)
#else
#define MEMEDGE_COMPILER "GCC " __VERSION__
#endif

namespace {

const Names<Isa> kIsas{{"scalar", Isa::scalar}, {"neon", Isa::neon}, {"avx2", Isa::avx2}, {"avx512", Isa::avx512}};

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

std::size_t run(std::uintptr_t cond, std::uintptr_t uncond, std::uintptr_t out, const std::string& dtype,
                std::size_t rows, std::size_t uncond_rows, std::size_t channels, std::size_t pixels,
                const std::string& operands, std::size_t threads, const std::string& isa, std::uintptr_t row) {
  const GuidanceStats task =
      checked_task(cond, uncond, out, dtype, rows, uncond_rows, channels, pixels, operands, row);
  for (std::size_t r = 0; task.row && r < rows; ++r) {
    if (static_cast<std::uint64_t>(task.row[r]) >= uncond_rows) {
      throw py::value_error("row " + std::to_string(r) + " is paired with uncond row " + std::to_string(task.row[r]) +
                            " of " + std::to_string(uncond_rows));
    }
  }
  const Isa chosen = parse_isa(isa);
  py::gil_scoped_release unlocked;
  return guidance_stats(task, threads, chosen);
}

std::size_t run_step(std::uintptr_t x, std::uintptr_t cond, std::uintptr_t uncond, std::uintptr_t last_x,
                     std::uintptr_t last_eps, std::uintptr_t map, std::uintptr_t out, const std::string& dtype,
                     bool first, float scale, float shift, std::size_t rows, std::size_t channels, std::size_t pixels) {
  const GuidanceStep step = checked_step(x, cond, uncond, last_x, last_eps, map, out, dtype, first, scale, shift, rows,
                                         channels, pixels);
  py::gil_scoped_release unlocked;
  return guidance_step(step);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Native guidance statistics of memedge; use memedge.engine.reduction, which checks the memory first.";
  m.def("guidance_stats", &run, py::arg("cond_ptr"), py::arg("uncond_ptr"), py::arg("out_ptr"), py::arg("dtype"),
        py::arg("rows"), py::arg("uncond_rows"), py::arg("channels"), py::arg("pixels"),
        py::arg("operands") = "uncond_delta", py::arg("threads") = 0, py::arg("isa") = "", py::arg("row_ptr") = 0,
        "cond [rows, channels, pixels], uncond [uncond_rows, channels, pixels] -> out float64 [3, rows]: norm, channel, "
        "flat. Contiguous host memory. threads 0: all; isa '': the fastest. row int64 [rows]: each row's uncond row; "
        "null: r % uncond_rows. Returns how many rows are not finite.");
  m.def("guidance_step", &run_step, py::arg("x_ptr"), py::arg("cond_ptr"), py::arg("uncond_ptr"),
        py::arg("last_x_ptr"), py::arg("last_eps_ptr"), py::arg("map_ptr"), py::arg("out_ptr"), py::arg("dtype"),
        py::arg("first"), py::arg("scale"), py::arg("shift"), py::arg("rows"), py::arg("channels"), py::arg("pixels"),
        "x, cond and uncond [rows, channels, pixels] against the last step, float32 last_x and last_eps [rows, channels, "
        "pixels], which become this one -> map float32 [rows, pixels] and out float64 [3, rows]: norm, change, move. "
        "Contiguous host memory. Returns how many rows are not finite.");
  m.def("address", &address, "Where a contiguous buffer starts; valid as long as the buffer is.");
  m.def("isa_available", &isa_available, "Instruction sets this build has and this processor runs, slowest first.");
  m.def("isa_active", &isa_active, "The instruction set used unless one is named.");
  m.attr("COMPILER") = MEMEDGE_COMPILER;
#ifdef MEMEDGE_CUDA_TARGETS
  m.attr("CUDA_TARGETS") = py::make_tuple(MEMEDGE_CUDA_TARGETS);
  define_cuda(m);
#else
  m.attr("CUDA_TARGETS") = py::none();
#endif
}
