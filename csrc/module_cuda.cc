// The part of memedge._core that reduces on an NVIDIA GPU; compiled where nvcc is.
#include <pybind11/stl.h>

#include <stdexcept>

#include "binding.h"

namespace memedge {
namespace {

void check(const char* error) {
  if (error) throw std::runtime_error(std::string("CUDA guidance statistics: ") + error);
}

// Memory of a GPU, for as long as this lives.
class DeviceMemory {
 public:
  DeviceMemory(std::size_t bytes, int device) : bytes_(bytes), device_(device) {
    py::gil_scoped_release unlocked;
    check(cuda_allocate(bytes, device, &memory_));
  }
  DeviceMemory(const DeviceMemory&) = delete;
  ~DeviceMemory() { cuda_release(memory_, device_); }

  std::uintptr_t address() const { return reinterpret_cast<std::uintptr_t>(memory_); }

  void download(const py::buffer& host) const {
    const py::buffer_info view = host.request(true);
    if (static_cast<std::size_t>(view.size * view.itemsize) != bytes_) throw py::value_error("other numbers of bytes");
    py::gil_scoped_release unlocked;
    check(cuda_download(view.ptr, memory_, bytes_, device_));
  }

 private:
  std::size_t bytes_;
  int device_;
  void* memory_ = nullptr;
};

void run_step(std::uintptr_t x, std::uintptr_t cond, std::uintptr_t uncond, std::uintptr_t last_x,
              std::uintptr_t last_eps, std::uintptr_t map, std::uintptr_t out, const std::string& dtype, bool first,
              float scale, float shift, std::size_t rows, std::size_t channels, std::size_t pixels, int device,
              const std::vector<std::uintptr_t>& streams) {
  const GuidanceStep step = checked_step(x, cond, uncond, last_x, last_eps, map, out, dtype, first, scale, shift, rows,
                                         channels, pixels);
  if (streams.empty()) throw py::value_error("there is no stream");
  std::vector<void*> handles;
  for (const std::uintptr_t stream : streams) handles.push_back(reinterpret_cast<void*>(stream));
  py::gil_scoped_release unlocked;
  check(cuda_guidance_step(step, device, handles));
}

void launch(std::uintptr_t cond, std::uintptr_t uncond, std::uintptr_t out, const std::string& dtype, std::size_t rows,
            std::size_t uncond_rows, std::size_t channels, std::size_t pixels, const std::string& operands,
            std::uintptr_t stream, std::uintptr_t row) {
  const GuidanceStats task =
      checked_task(cond, uncond, out, dtype, rows, uncond_rows, channels, pixels, operands, row);
  py::gil_scoped_release unlocked;  // the first call starts CUDA
  check(cuda_guidance_stats(task, reinterpret_cast<void*>(stream)));
}

void to_host(std::uintptr_t cond, std::uintptr_t uncond, std::uintptr_t out, const std::string& dtype, std::size_t rows,
             std::size_t uncond_rows, std::size_t channels, std::size_t pixels, const std::string& operands, int device,
             std::uintptr_t stream, std::uintptr_t uncond_stream) {
  const GuidanceStats task = checked_task(cond, uncond, out, dtype, rows, uncond_rows, channels, pixels, operands, 0);
  py::gil_scoped_release unlocked;
  check(cuda_guidance_stats_to_host(task, device, reinterpret_cast<void*>(stream),
                                    reinterpret_cast<void*>(uncond_stream)));
}

int device_of(std::uintptr_t pointer) {
  int device = 0;
  py::gil_scoped_release unlocked;
  check(cuda_device_of(reinterpret_cast<const void*>(pointer), &device));
  return device;
}

}  // namespace

void define_cuda(py::module_& m) {
  m.def("cuda_guidance_stats", &launch, py::arg("cond_ptr"), py::arg("uncond_ptr"), py::arg("out_ptr"),
        py::arg("dtype"), py::arg("rows"), py::arg("uncond_rows"), py::arg("channels"), py::arg("pixels"),
        py::arg("operands") = "uncond_delta", py::arg("stream") = 0, py::kw_only(), py::arg("row_ptr") = 0,
        "The same in memory of the current CUDA device, enqueued on the stream (a cudaStream_t) and not waited for. Rows "
        "that are not finite are NaN, and so are rows whose uncond row does not exist. Raises RuntimeError with CUDA's "
        "reason where nothing was enqueued.");
  m.def("cuda_guidance_stats_to_host", &to_host, py::arg("cond_ptr"), py::arg("uncond_ptr"), py::arg("out_ptr"),
        py::arg("dtype"), py::arg("rows"), py::arg("uncond_rows"), py::arg("channels"), py::arg("pixels"),
        py::arg("operands"), py::arg("device"), py::arg("stream"), py::arg("uncond_stream"),
        "The same on that device, with out in host memory: waits for the result. What was enqueued on either stream "
        "before is done first.");
  m.def("cuda_guidance_step", &run_step, py::arg("x_ptr"), py::arg("cond_ptr"), py::arg("uncond_ptr"),
        py::arg("last_x_ptr"), py::arg("last_eps_ptr"), py::arg("map_ptr"), py::arg("out_ptr"), py::arg("dtype"),
        py::arg("first"), py::arg("scale"), py::arg("shift"), py::arg("rows"), py::arg("channels"), py::arg("pixels"),
        py::arg("device"), py::arg("streams"),
        "The same on that device, with out alone in host memory: waits for the result. What was enqueued on the streams "
        "before is done first.");
  py::class_<DeviceMemory>(m, "DeviceMemory", "Memory of a GPU, freed with this object.")
      .def(py::init<std::size_t, int>(), py::arg("bytes"), py::arg("device"))
      .def_property_readonly("address", &DeviceMemory::address)
      .def("download", &DeviceMemory::download, py::arg("host"), "Fills a writable contiguous buffer of as many bytes.");
  m.def("cuda_device", &device_of, py::arg("pointer"), "The number of the GPU that an address belongs to.");
}

}  // namespace memedge
