// peft_fast._C: what is not a tensor operator. It links no torch, so that it tells about a machine torch fails on.
#include <pybind11/pybind11.h>

#include "adapters.h"
#include "call.h"

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

// a layer and x and what is around them -> y or None: without pybind11's own way to a function, which costs a call more
static PyObject* decode(PyObject*, PyObject* const* of, Py_ssize_t count) {
  if (count != 3 || !PyTuple_Check(of[2])) {
    PyErr_SetString(PyExc_TypeError, "a layer, x, and a tuple of what is around them");
    return nullptr;
  }
  const auto borrowed = [](PyObject* o) { return py::reinterpret_borrow<py::object>(o); };
  try {
    const auto around = py::reinterpret_borrow<py::tuple>(of[2]);
    return peft_fast::layer::decode(borrowed(of[0]), borrowed(of[1]), around).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (py::builtin_exception& error) {
    error.set_error();
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

static uint64_t calls(size_t id, bool forget) {
  if (id == 0) return peft_fast::layer::calls();
  auto* const seen = peft_fast::layer::Seen::of((PyObject*)id);
  const uint64_t found = seen ? seen->calls : 0;
  if (seen && forget) seen->calls = 0;
  return found;
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
  m.def("keep", &peft_fast::layer::keep, "The norm of a DoRA layer's weight, while the probe gives `check`.",
        py::arg("layer"), py::arg("tokens"), py::arg("low_bf16"), py::arg("norm"), py::arg("probe"), py::arg("check"));
  m.attr("LIST") = peft_fast::layer::LIST;
  m.def("calls", &calls, "How many calls decode has answered: of a layer by its id, or all; then 0, if forgotten.",
        py::arg("id") = 0, py::arg("forget") = false);
  static PyMethodDef method{"decode", (PyCFunction)(void (*)())decode, METH_FASTCALL,
                            "What a layer gives for few tokens, in the common case; else None."};
  m.attr("decode") = py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr));
  m.def("build_info", &build_info, "Compiler and versions of this build.");
}
