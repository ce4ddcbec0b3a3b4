// peft_fast._C: what is not a tensor operator. It links no torch, so that it tells about a machine torch fails on.
#include <pybind11/pybind11.h>

#include "adapters.h"
#include "layer.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace py = pybind11;

static py::dict capabilities() {
  py::dict d;
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, e = 0, a1 = 0, x = 0, y = 0, z = 0;
  __get_cpuid_count(7, 0, &a, &b, &c, &e);
  __get_cpuid_count(7, 1, &a1, &x, &y, &z);
  d["avx2"] = bool(__builtin_cpu_supports("avx2")) && bool(__builtin_cpu_supports("fma"));
  d["avx512"] = bool(__builtin_cpu_supports("avx512f")) && bool(__builtin_cpu_supports("avx512bw")) &&
                bool(__builtin_cpu_supports("avx512vl")) && bool(__builtin_cpu_supports("avx512dq"));
  d["avx512_bf16"] = bool(a1 >> 5 & 1);
  d["amx"] = bool(e >> 22 & 1) && bool(e >> 24 & 1);
#endif
  d["portable"] = true;
  return d;
}

static bool intel() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

static py::dict build_info() {
  py::dict d;
#if defined(__VERSION__)
  d["compiler"] = __VERSION__;
#endif
  d["cplusplus"] = __cplusplus;
  d["pybind11"] = PYBIND11_VERSION_MAJOR * 100 + PYBIND11_VERSION_MINOR;
  return d;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "What the processor has, what the extension was built with, and what a layer's adapters are.";
  m.def("capabilities", &capabilities, "Instruction sets of this processor: name -> bool.");
  m.def("intel", &intel, "Is this a processor of Intel's?");
  m.def("adapters", &peft_fast::adapters::common, "What a layer's adapters are, in the common case; else None.");
  m.def("layer", &peft_fast::layer::common, "What a layer is and is called with, in the common case; else None.");
  m.def("decode", &peft_fast::layer::decode, "What a layer gives for few tokens, in the common case; else None.");
  m.def("calls", [] { return peft_fast::layer::calls(); }, "How many calls decode has answered.");
  m.def("build_info", &build_info, "Compiler and versions of this build.");
}
