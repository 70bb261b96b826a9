// What both bindings share: names as enums, and a task whose names, pointers and sizes are checked.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "guidance_step.h"

namespace memedge {

namespace py = pybind11;

template <class E>
using Names = std::vector<std::pair<const char*, E>>;

inline const Names<DType> kDTypes{
    {"float32", DType::float32}, {"float16", DType::float16}, {"bfloat16", DType::bfloat16}};
inline const Names<Operands> kOperands{{"uncond_delta", Operands::uncond_delta},
                                       {"cond_uncond", Operands::cond_uncond},
                                       {"cond_delta", Operands::cond_delta}};

template <class E>
E parse(const Names<E>& names, const std::string& name, const char* what) {
  for (const auto& [known, value] : names) {
    if (name == known) return value;
  }
  throw py::value_error(std::string("unknown ") + what + " '" + name + "'");
}

inline GuidanceStats checked_task(std::uintptr_t cond, std::uintptr_t uncond, std::uintptr_t out,
                                  const std::string& dtype, std::size_t rows, std::size_t uncond_rows,
                                  std::size_t channels, std::size_t pixels, const std::string& operands,
                                  std::uintptr_t row) {
  if (!cond || !uncond || !out) throw py::value_error("a pointer is null");
  if (!rows || !uncond_rows || !channels || !pixels) throw py::value_error("a size is zero");
  if (!row && rows % uncond_rows) throw py::value_error("rows is no multiple of uncond_rows");
  return {reinterpret_cast<const void*>(cond),
          reinterpret_cast<const void*>(uncond),
          reinterpret_cast<const std::int64_t*>(row),
          reinterpret_cast<double*>(out),
          parse(kDTypes, dtype, "dtype"),
          parse(kOperands, operands, "operands"),
          rows,
          uncond_rows,
          channels,
          pixels};
}

// first: whether last_x and last_eps hold nothing yet.
inline GuidanceStep checked_step(std::uintptr_t x, std::uintptr_t cond, std::uintptr_t uncond, std::uintptr_t last_x,
                                 std::uintptr_t last_eps, std::uintptr_t map, std::uintptr_t out,
                                 const std::string& dtype, bool first, float scale, float shift, std::size_t rows,
                                 std::size_t channels, std::size_t pixels) {
  for (const std::uintptr_t pointer : {x, cond, uncond, last_x, last_eps, map, out}) {
    if (!pointer) throw py::value_error("a pointer is null");
  }
  if (!rows || !channels || !pixels) throw py::value_error("a size is zero");
  return {reinterpret_cast<const void*>(x),
          reinterpret_cast<const void*>(cond),
          reinterpret_cast<const void*>(uncond),
          reinterpret_cast<float*>(last_x),
          reinterpret_cast<float*>(last_eps),
          reinterpret_cast<float*>(map),
          reinterpret_cast<double*>(out),
          parse(kDTypes, dtype, "dtype"),
          first,
          scale,
          shift,
          rows,
          channels,
          pixels};
}

#ifdef MEMEDGE_CUDA_TARGETS
void define_cuda(py::module_& m);  // module_cuda.cc
#endif

}  // namespace memedge
