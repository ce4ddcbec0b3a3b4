// Looks at the modules of PEFT's adapters, of which a batch may name dozens: what peft_fast/patch/decode.py asks of each
// of them in Python, where the common case is all there is to find.
#pragma once
#include <pybind11/pybind11.h>

namespace peft_fast {
namespace adapters {

namespace py = pybind11;

// attributes and keys, made once
struct Words {
  PyObject* hooks[4] = {word("_forward_hooks"), word("_forward_pre_hooks"), word("_backward_hooks"),
                        word("_backward_pre_hooks")};
  PyObject *forward = word("forward"), *parameters = word("_parameters"), *weight = word("weight"),
           *bias = word("bias"), *training = word("training"), *inplace = word("inplace"), *dtype = word("dtype"),
           *layout = word("layout"), *is_cpu = word("is_cpu"), *shape = word("shape");

  static PyObject* word(const char* text) { return PyUnicode_InternFromString(text); }
};

// owned, because a look at a tensor may run what a TorchFunctionMode does; null if there is none
inline py::object item(PyObject* dict, PyObject* key) {
  PyObject* found = PyDict_GetItemWithError(dict, key);
  if (!found && PyErr_Occurred()) throw py::error_already_set();
  return py::reinterpret_borrow<py::object>(found);
}

inline py::object attribute(const py::object& of, PyObject* name) {
  PyObject* found = PyObject_GetAttr(of.ptr(), name);
  if (!found) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
}

// the __dict__ of a module of exactly this class, whose call is its class's forward; else null
inline py::object untouched(const py::object& module, PyObject* kind, const Words& words) {
  if (!module || (PyObject*)Py_TYPE(module.ptr()) != kind) return {};
  auto state = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
  if (!state) throw py::error_already_set();
  for (PyObject* hooks : words.hooks) {
    const py::object own = item(state.ptr(), hooks);
    if (!own || !PyDict_Check(own.ptr()) || PyDict_Size(own.ptr())) return {};
  }
  return item(state.ptr(), words.forward) ? py::object() : state;
}

// does a dropout drop nothing?
inline bool idle(const py::object& dropout, PyObject* identity, PyObject* kind, const Words& words) {
  if (!dropout) return false;
  if ((PyObject*)Py_TYPE(dropout.ptr()) == identity) return bool(untouched(dropout, identity, words));
  const py::object state = untouched(dropout, kind, words);
  return state && item(state.ptr(), words.training).is(py::handle(Py_False)) &&
         item(state.ptr(), words.inplace).is(py::handle(Py_False));
}

// a parameter of this dtype (null: of any, which it becomes) in the processor's memory?
inline bool dense(const py::object& tensor, PyObject* kind, PyObject* strided, py::object& dtype, const Words& words) {
  if (!tensor || (PyObject*)Py_TYPE(tensor.ptr()) != kind) return false;
  const py::object own = attribute(tensor, words.dtype);
  if (!dtype) dtype = own;
  return own.is(dtype) && attribute(tensor, words.layout).is(py::handle(strided)) &&
         attribute(tensor, words.is_cpu).is(py::handle(Py_True));
}

// dimension i of a matrix, or -1
inline Py_ssize_t size(const py::object& tensor, int i, const Words& words) {
  const py::object shape = attribute(tensor, words.shape);
  if (!PyTuple_Check(shape.ptr()) || PyTuple_GET_SIZE(shape.ptr()) != 2) return -1;
  return PyLong_AsSsize_t(PyTuple_GET_ITEM(shape.ptr(), i));
}

// the dicts of lora_A, lora_B and lora_dropout, of scalings, the names, and (nn.Linear, nn.Identity, nn.Dropout,
// nn.Parameter, torch.strided) -> (As, Bs, biases of B, scalings) of those that lora_A has; None where any is not the
// common case, or one is of another dtype than the first
inline py::object common(const py::object& loras_A, const py::object& loras_B, const py::object& dropouts,
                         const py::object& scalings, const py::object& names, const py::tuple& kinds) {
  static const Words words;
  if (kinds.size() != 5) throw py::value_error("five kinds");
  for (const py::object& dict : {loras_A, loras_B, dropouts, scalings})
    if (!PyDict_Check(dict.ptr())) return py::none();
  PyObject *linear = kinds[0].ptr(), *identity = kinds[1].ptr(), *dropout = kinds[2].ptr(),
           *parameter = kinds[3].ptr(), *strided = kinds[4].ptr();
  py::list As, Bs, biases, numbers;
  py::object dtype;
  for (const py::handle name : names) {
    const py::object lora_A = item(loras_A.ptr(), name.ptr());
    if (!lora_A) continue;
    const py::object lora_B = item(loras_B.ptr(), name.ptr()), scaling = item(scalings.ptr(), name.ptr());
    const py::object of_A = untouched(lora_A, linear, words), of_B = untouched(lora_B, linear, words);
    if (!of_A || !of_B || !scaling || !PyFloat_CheckExact(scaling.ptr())) return py::none();
    if (!idle(item(dropouts.ptr(), name.ptr()), identity, dropout, words)) return py::none();
    const py::object own_A = item(of_A.ptr(), words.parameters), own_B = item(of_B.ptr(), words.parameters);
    if (!own_A || !own_B || !PyDict_Check(own_A.ptr()) || !PyDict_Check(own_B.ptr())) return py::none();
    const py::object A = item(own_A.ptr(), words.weight), B = item(own_B.ptr(), words.weight);
    const py::object bias = item(own_B.ptr(), words.bias), none = item(own_A.ptr(), words.bias);
    if (!bias || !none || !none.is_none() || !dense(A, parameter, strided, dtype, words) ||
        !dense(B, parameter, strided, dtype, words) ||
        !(bias.is_none() || dense(bias, parameter, strided, dtype, words)))
      return py::none();
    const Py_ssize_t r = size(A, 0, words);
    if (r < 0 || r != size(B, 1, words)) return py::none();
    As.append(A), Bs.append(B), biases.append(bias), numbers.append(scaling);
  }
  return py::make_tuple(As, Bs, biases, numbers);
}

}  // namespace adapters
}  // namespace peft_fast
