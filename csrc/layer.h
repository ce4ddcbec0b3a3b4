// Looks at a whole LoRA layer and what it is called with, as peft_fast/patch/decode.py does in Python, where the common
// case is all there is to find: nothing is remembered that an answer could depend on.
#pragma once
#include "adapters.h"

namespace peft_fast {
namespace layer {

namespace py = pybind11;
using adapters::attribute;
using adapters::item;

// attributes and keys, made once
struct Words : adapters::Words {
  PyObject *disabled = word("_disable_adapters"), *merged = word("merged_adapters"), *variants = word("lora_variant"),
           *modules = word("_modules"), *base = word("base_layer"), *tensor_parallel = word("_hf_tp_plan"),
           *active = word("_active_adapter"), *loras_A = word("lora_A"), *loras_B = word("lora_B"),
           *dropouts = word("lora_dropout"), *scaling = word("scaling"), *casts = word("cast_input_dtype_enabled"),
           *is_nested = word("is_nested"), *level = word("_current_level"), *cpu = word("cpu"), *off = word("off"),
           *paused = word("paused"), *everywhere = word("everywhere"), *mark = word("_peft_fast");
  PyObject* global_hooks[4] = {word("_global_forward_hooks"), word("_global_forward_pre_hooks"),
                               word("_global_backward_hooks"), word("_global_backward_pre_hooks")};
};

// classes, dtypes and what tells of the modes that a call can be in, in the order that the caller names them
struct Around {
  PyObject *lora, *linear, *forward, *identity, *dropout, *parameter, *tensor, *strided, *f32, *bf16;
  PyObject *autocast, *tracing, *functorch, *exporting;  // functions
  PyObject *forward_ad, *modules;                        // the dicts of Python modules
  PyObject* state;                                       // of marks.py

  explicit Around(const py::tuple& of) {
    PyObject** const to[] = {&lora,   &linear,  &forward, &identity, &dropout, &parameter, &tensor,     &strided, &f32,
                             &bf16,   &autocast, &tracing, &functorch, &exporting, &forward_ad, &modules, &state};
    if (of.size() != std::size(to)) throw py::value_error("17 things around a layer");
    for (size_t i = 0; i < std::size(to); ++i) *to[i] = of[i].ptr();
    if (!PyDict_Check(forward_ad) || !PyDict_Check(modules)) throw py::value_error("dicts of modules");
  }
};

// does f() give just this?
inline bool gives(PyObject* f, PyObject* what, PyObject* argument = nullptr) {
  const auto found = py::reinterpret_steal<py::object>(PyObject_CallFunctionObjArgs(f, argument, nullptr));
  if (!found) throw py::error_already_set();
  return found.ptr() == what;
}

inline long number(const py::object& found) {
  const long n = found && PyLong_Check(found.ptr()) ? PyLong_AsLong(found.ptr()) : -1;
  if (n == -1 && PyErr_Occurred()) throw py::error_already_set();
  return n;
}

inline py::object own(const py::object& module) {
  PyObject* found = PyObject_GenericGetDict(module.ptr(), nullptr);
  if (!found) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
}

inline bool none(const py::object& found) { return !found || found.is_none(); }
inline bool dict(const py::object& found) { return found && PyDict_Check(found.ptr()); }

// the children of a module that is one of a layer's; null if there are none
inline py::object children(const py::object& modules, PyObject* name, const Words& words) {
  const py::object module = item(modules.ptr(), name);
  if (!module) return {};
  const py::object found = item(own(module).ptr(), words.modules);
  return dict(found) ? found : py::object();
}

// is there no mode, and no hook for every module's call, in which a layer may not run by itself?
inline bool quiet(const Around& around, const Words& words) {
  if (!gives(around.autocast, Py_False, words.cpu)) return false;
  const py::object level = item(around.forward_ad, words.level);
  if (!level || !PyLong_Check(level.ptr()) || number(level) >= 0) return false;
  for (PyObject* name : words.global_hooks) {
    const py::object hooks = item(around.modules, name);
    if (!dict(hooks) || PyDict_Size(hooks.ptr())) return false;
  }
  return gives(around.tracing, Py_None) && gives(around.functorch, Py_None) && gives(around.exporting, Py_False);
}

// a layer, x (..., K) and what is around them -> (W, bias, (As, Bs, biases of B, scalings), tokens, ranks together), or
// None: whatever is not PEFT's lora.Linear over an nn.Linear with adapters, that is to be fast, in float32 or bfloat16
// and on the processor. That nothing wants a gradient is for the caller to see
inline py::object common(const py::object& self, const py::object& x, const py::tuple& of) {
  static const Words words;
  const Around around(of);
  const auto other = [] { return py::object(py::none()); };
  if ((PyObject*)Py_TYPE(self.ptr()) != around.lora) return other();
  if (!quiet(around, words)) return other();
  const py::object switches = own(py::reinterpret_borrow<py::object>(around.state)), state = own(self);
  if (!item(switches.ptr(), words.off).is(py::handle(Py_False))) return other();
  if (number(item(switches.ptr(), words.paused)) != 0) return other();
  const py::object merged = item(state.ptr(), words.merged), variants = item(state.ptr(), words.variants);
  if (!item(state.ptr(), words.disabled).is(py::handle(Py_False))) return other();
  if (!merged || !PyList_Check(merged.ptr()) || PyList_Size(merged.ptr())) return other();
  if (!dict(variants) || PyDict_Size(variants.ptr())) return other();
  const py::object modules = item(state.ptr(), words.modules);
  if (!dict(modules)) return other();

  const py::object base = adapters::untouched(item(modules.ptr(), words.base), around.linear, words);
  if (!base || !none(item(base.ptr(), words.tensor_parallel))) return other();
  if (!item(switches.ptr(), words.everywhere).is(py::handle(Py_True)) && !item(base.ptr(), words.mark)) return other();
  const py::object linear = py::reinterpret_borrow<py::object>(around.linear);
  if (!attribute(linear, words.forward).is(py::handle(around.forward))) return other();
  const py::object inside = item(base.ptr(), words.modules);  // the mark is the innermost layer's
  if (!dict(inside) || PyDict_Size(inside.ptr())) return other();
  const py::object parameters = item(base.ptr(), words.parameters);
  if (!dict(parameters)) return other();
  const py::object W = item(parameters.ptr(), words.weight), bias = item(parameters.ptr(), words.bias);
  py::object dtype;
  if (!adapters::dense(W, around.parameter, around.strided, dtype, words)) return other();
  if (!dtype.is(py::handle(around.f32)) && !dtype.is(py::handle(around.bf16))) return other();
  if (!none(bias) && !adapters::dense(bias, around.parameter, around.strided, dtype, words)) return other();

  if (!adapters::dense(x, around.tensor, around.strided, dtype, words)) return other();
  if (!attribute(x, words.is_nested).is(py::handle(Py_False))) return other();
  const py::object shape = attribute(x, words.shape);
  if (!PyTuple_Check(shape.ptr())) return other();
  const Py_ssize_t dims = PyTuple_GET_SIZE(shape.ptr());
  if (dims == 0) return other();
  Py_ssize_t tokens = 1, rank = 0;
  for (Py_ssize_t i = 0; i + 1 < dims; ++i) tokens *= PyLong_AsSsize_t(PyTuple_GET_ITEM(shape.ptr(), i));
  const Py_ssize_t K = PyLong_AsSsize_t(PyTuple_GET_ITEM(shape.ptr(), dims - 1));
  if (PyErr_Occurred()) throw py::error_already_set();
  if (K != adapters::size(W, 1, words)) return other();

  const py::object loras_A = children(modules, words.loras_A, words), loras_B = children(modules, words.loras_B, words);
  const py::object dropouts = children(modules, words.dropouts, words), scaling = item(state.ptr(), words.scaling);
  py::object names = item(state.ptr(), words.active);
  if (!loras_A || !loras_B || !dropouts || !dict(scaling) || !names) return other();
  if (PyUnicode_Check(names.ptr())) names = py::make_tuple(names);
  else if (!PyList_Check(names.ptr()) && !PyTuple_Check(names.ptr())) return other();
  const py::tuple parts = py::make_tuple(linear, py::handle(around.identity), py::handle(around.dropout),
                                         py::handle(around.parameter), py::handle(around.strided));
  const py::object low = adapters::common(loras_A, loras_B, dropouts, scaling, names, parts);
  if (low.is_none()) return other();
  const py::object As = low[py::int_(0)];
  const Py_ssize_t count = PyList_GET_SIZE(As.ptr());
  if (count == 0) return other();
  for (Py_ssize_t i = 0; i < count; ++i)
    rank += adapters::size(py::reinterpret_borrow<py::object>(PyList_GET_ITEM(As.ptr(), i)), 0, words);
  const py::object kind = attribute(py::reinterpret_borrow<py::object>(PyList_GET_ITEM(As.ptr(), 0)), words.dtype);
  const bool cast = kind.is(py::handle(around.f32)) && item(state.ptr(), words.casts).is(py::handle(Py_True));
  if (!kind.is(dtype) && !cast) return other();
  return py::make_tuple(W, none(bias) ? other() : bias, low, tokens, rank);
}

}  // namespace layer
}  // namespace peft_fast
