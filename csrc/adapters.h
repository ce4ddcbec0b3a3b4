// Looks at the modules of PEFT's adapters, of which a batch may name dozens: what peft_fast/patch/decode.py asks of each
// of them in Python, where the common case is all there is to find.
#pragma once
#include <pybind11/pybind11.h>

#include "proof.h"

namespace peft_fast {
namespace adapters {

namespace py = pybind11;

// attributes and keys, made once
struct Words {
  PyObject* hooks[4] = {word("_forward_hooks"), word("_forward_pre_hooks"), word("_backward_hooks"),
                        word("_backward_pre_hooks")};
  PyObject *forward = word("forward"), *parameters = word("_parameters"), *weight = word("weight"),
           *bias = word("bias"), *training = word("training"), *inplace = word("inplace");

  static PyObject* word(const char* text) { return PyUnicode_InternFromString(text); }
};

// what torch.Tensor defines in C, found once: to ask a class for each of them anew costs more than the answer
struct Tensors {
  PyObject *dtype = of("dtype"), *layout = of("layout"), *is_cpu = of("is_cpu"), *is_nested = of("is_nested"),
           *shape = of("shape"), *is_contiguous = of("is_contiguous"), *is_neg = of("is_neg"),
           *data_ptr = of("data_ptr"), *new_empty = of("new_empty");

  // no static object: two threads may wait for each other where one has its lock and the other Python's
  static const Tensors& all() {
    static const Tensors* found = nullptr;
    if (!found) found = new Tensors;
    return *found;
  }

 private:
  static PyObject* of(const char* name) {
    py::object found = py::module_::import("torch").attr("Tensor").attr(name);
    if (!Py_TYPE(found.ptr())->tp_descr_get) throw py::type_error("a property of torch.Tensor is none");
    return found.release().ptr();
  }
};

// a property of a tensor, or what one of its methods gives
inline py::object property(const py::object& tensor, PyObject* of) {
  PyObject* const kind = (PyObject*)Py_TYPE(tensor.ptr());
  auto found = py::reinterpret_steal<py::object>(Py_TYPE(of)->tp_descr_get(of, tensor.ptr(), kind));
  if (!found) throw py::error_already_set();
  return found;
}

inline py::object method(const py::object& tensor, PyObject* of, PyObject* argument = nullptr) {
  PyObject* const given[] = {tensor.ptr(), argument};
  auto found = py::reinterpret_steal<py::object>(PyObject_Vectorcall(of, given, argument ? 2 : 1, nullptr));
  if (!found) throw py::error_already_set();
  return found;
}

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

// what calls of nn.Module ask: classes of the children, and what a tensor is
struct Kinds {
  PyObject *linear, *identity, *dropout, *parameter, *strided;
};

// the __dict__ of an object
inline py::object own(PyObject* object, Proof& proof) {
  auto found = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(object, nullptr));
  if (!found) throw py::error_already_set();
  proof.object(object, found.ptr());
  return found;
}

// a dict; null if it is none
inline py::object dict(const py::object& found, Proof& proof) {
  if (!found || !PyDict_Check(found.ptr())) return {};
  proof.values(found.ptr());
  return found;
}

// is it a dict without anything in it?
inline bool empty(const py::object& found, Proof& proof) {
  if (!found || !PyDict_Check(found.ptr()) || PyDict_Size(found.ptr())) return false;
  proof.size(found.ptr());
  return true;
}

// the __dict__ of a module of exactly this class, whose call is its class's forward; else null
inline py::object untouched(const py::object& module, PyObject* kind, const Words& words, Proof& proof) {
  if (!module || (PyObject*)Py_TYPE(module.ptr()) != kind) return {};
  const py::object state = own(module.ptr(), proof);
  for (PyObject* hooks : words.hooks)
    if (!empty(item(state.ptr(), hooks), proof)) return {};
  return item(state.ptr(), words.forward) ? py::object() : state;
}

// does a dropout drop nothing?
inline bool idle(const py::object& dropout, const Kinds& kinds, const Words& words, Proof& proof) {
  if (!dropout) return false;
  if ((PyObject*)Py_TYPE(dropout.ptr()) == kinds.identity)
    return bool(untouched(dropout, kinds.identity, words, proof));
  const py::object state = untouched(dropout, kinds.dropout, words, proof);
  return state && item(state.ptr(), words.training).is(py::handle(Py_False)) &&
         item(state.ptr(), words.inplace).is(py::handle(Py_False));
}

// a parameter of this dtype (null: of any, which it becomes) in the processor's memory?
inline bool dense(const py::object& tensor, PyObject* kind, PyObject* strided, py::object& dtype) {
  if (!tensor || (PyObject*)Py_TYPE(tensor.ptr()) != kind) return false;
  const Tensors& of = Tensors::all();
  const py::object own = property(tensor, of.dtype);
  if (!dtype) dtype = own;
  return own.is(dtype) && property(tensor, of.layout).is(py::handle(strided)) &&
         property(tensor, of.is_cpu).is(py::handle(Py_True));
}

// dimension i of a matrix, or -1
inline Py_ssize_t size(const py::object& tensor, int i) {
  const py::object shape = property(tensor, Tensors::all().shape);
  if (!PyTuple_Check(shape.ptr()) || PyTuple_GET_SIZE(shape.ptr()) != 2) return -1;
  return PyLong_AsSsize_t(PyTuple_GET_ITEM(shape.ptr(), i));
}

// of an adapter: A (r, K), B (N, r), the bias of B (N,) or None, and scaling
struct Low {
  py::object A, B, bias, scaling;
};

// the dicts of lora_A, lora_B and lora_dropout, and of scalings
struct Dicts {
  py::object loras_A, loras_B, dropouts, scalings;
};

// an adapter that lora_A has, by its modules; false where they are not the common case
inline bool modules(const Dicts& of, PyObject* name, const Kinds& kinds, const Words& words, Low& low, Proof& proof) {
  const py::object lora_A = item(of.loras_A.ptr(), name), lora_B = item(of.loras_B.ptr(), name);
  const py::object state_A = untouched(lora_A, kinds.linear, words, proof);
  const py::object state_B = untouched(lora_B, kinds.linear, words, proof);
  low.scaling = item(of.scalings.ptr(), name);
  if (!state_A || !state_B || !low.scaling || !PyFloat_CheckExact(low.scaling.ptr())) return false;
  if (!idle(item(of.dropouts.ptr(), name), kinds, words, proof)) return false;
  const py::object own_A = dict(item(state_A.ptr(), words.parameters), proof);
  const py::object own_B = dict(item(state_B.ptr(), words.parameters), proof);
  if (!own_A || !own_B) return false;
  low.A = item(own_A.ptr(), words.weight), low.B = item(own_B.ptr(), words.weight);
  low.bias = item(own_B.ptr(), words.bias);
  const py::object none = item(own_A.ptr(), words.bias);
  return low.A && low.B && low.bias && none && none.is_none();
}

// its rank by its tensors; -1 where they are not the common case, or of another dtype than the one given
inline Py_ssize_t tensors(const Low& low, const Kinds& kinds, py::object& dtype) {
  if (!dense(low.A, kinds.parameter, kinds.strided, dtype) || !dense(low.B, kinds.parameter, kinds.strided, dtype) ||
      !(low.bias.is_none() || dense(low.bias, kinds.parameter, kinds.strided, dtype)))
    return -1;
  const Py_ssize_t r = size(low.A, 0);
  return r == size(low.B, 1) ? r : -1;
}

// adapters as the operators take them
struct Lists {
  py::list As, Bs, biases, scalings;

  void append(const Low& low) { As.append(low.A), Bs.append(low.B), biases.append(low.bias), scalings.append(low.scaling); }
  py::tuple all() const { return py::make_tuple(As, Bs, biases, scalings); }
};

// the dicts of lora_A, lora_B and lora_dropout, of scalings, the names, and (nn.Linear, nn.Identity, nn.Dropout,
// nn.Parameter, torch.strided) -> (As, Bs, biases of B, scalings) of those that lora_A has; None where any is not the
// common case, or one is of another dtype than the first
inline py::object common(const py::object& loras_A, const py::object& loras_B, const py::object& dropouts,
                         const py::object& scalings, const py::object& names, const py::tuple& of) {
  static const Words words;
  if (of.size() != 5) throw py::value_error("five kinds");
  const Kinds kinds{of[0].ptr(), of[1].ptr(), of[2].ptr(), of[3].ptr(), of[4].ptr()};
  for (const py::object& found : {loras_A, loras_B, dropouts, scalings})
    if (!PyDict_Check(found.ptr())) return py::none();
  Proof proof(false);
  Lists lists;
  py::object dtype;
  for (const py::handle name : names) {
    if (!item(loras_A.ptr(), name.ptr())) continue;
    Low low;
    if (!modules({loras_A, loras_B, dropouts, scalings}, name.ptr(), kinds, words, low, proof)) return py::none();
    if (tensors(low, kinds, dtype) < 0) return py::none();
    lists.append(low);
  }
  return lists.all();
}

}  // namespace adapters
}  // namespace peft_fast
