// Looks at a whole LoRA layer and what it is called with, as peft_fast/patch/decode.py does in Python, where the common
// case is all there is to find. What its modules are is kept with a proof, and found anew where that stands no more; the
// tensors, x and the modes of the process are asked every time.
#pragma once
#include <memory>
#include <unordered_map>

#include "adapters.h"

namespace peft_fast {
namespace layer {

namespace py = pybind11;
using adapters::attribute;
using adapters::item;
using adapters::own;

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

  adapters::Kinds kinds() const { return {linear, identity, dropout, parameter, strided}; }
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

inline bool none(const py::object& found) { return !found || found.is_none(); }

// the children of a module that is one of a layer's; null if there are none
inline py::object children(const py::object& modules, PyObject* name, const Words& words, Proof& proof) {
  const py::object module = item(modules.ptr(), name);
  return module ? adapters::dict(item(own(module.ptr(), proof).ptr(), words.modules), proof) : py::object();
}

// is there no mode in which a layer may not run by itself?
inline bool quiet(const Around& around, const Words& words) {
  if (!gives(around.autocast, Py_False, words.cpu)) return false;
  const py::object level = item(around.forward_ad, words.level);
  if (!level || !PyLong_Check(level.ptr()) || number(level) >= 0) return false;
  return gives(around.tracing, Py_None) && gives(around.functorch, Py_None) && gives(around.exporting, Py_False);
}

// what a layer is made of
struct Found {
  py::object W, bias;
  std::vector<adapters::Low> lows;
  bool casts;  // x to the adapters' dtype
};

// a layer that is to be fast, by its modules and the switches of the process; false where that is not the common case
inline bool modules(const py::object& self, const Around& around, const Words& words, Found& found, Proof& proof) {
  if ((PyObject*)Py_TYPE(self.ptr()) != around.lora) return false;
  const py::object switches = own(around.state, proof), state = own(self.ptr(), proof);
  if (!item(switches.ptr(), words.off).is(py::handle(Py_False))) return false;
  if (number(item(switches.ptr(), words.paused)) != 0) return false;
  proof.values(around.modules);
  for (PyObject* name : words.global_hooks)
    if (!adapters::empty(item(around.modules, name), proof)) return false;
  const py::object merged = item(state.ptr(), words.merged);
  if (!item(state.ptr(), words.disabled).is(py::handle(Py_False))) return false;
  if (!merged || !PyList_Check(merged.ptr()) || PyList_Size(merged.ptr())) return false;
  proof.items(merged.ptr());
  if (!adapters::empty(item(state.ptr(), words.variants), proof)) return false;
  const py::object parts = adapters::dict(item(state.ptr(), words.modules), proof);
  if (!parts) return false;

  const py::object base = adapters::untouched(item(parts.ptr(), words.base), around.linear, words, proof);
  if (!base || !none(item(base.ptr(), words.tensor_parallel))) return false;
  if (!item(switches.ptr(), words.everywhere).is(py::handle(Py_True)) && !item(base.ptr(), words.mark)) return false;
  if (!adapters::empty(item(base.ptr(), words.modules), proof)) return false;  // the mark is the innermost layer's
  const py::object parameters = adapters::dict(item(base.ptr(), words.parameters), proof);
  if (!parameters) return false;
  found.W = item(parameters.ptr(), words.weight), found.bias = item(parameters.ptr(), words.bias);

  const adapters::Dicts of{children(parts, words.loras_A, words, proof), children(parts, words.loras_B, words, proof),
                           children(parts, words.dropouts, words, proof),
                           adapters::dict(item(state.ptr(), words.scaling), proof)};
  py::object names = item(state.ptr(), words.active);
  if (!of.loras_A || !of.loras_B || !of.dropouts || !of.scalings || !names) return false;
  if (PyUnicode_Check(names.ptr())) names = py::make_tuple(names);
  else if (PyList_Check(names.ptr())) proof.items(names.ptr());
  else if (!PyTuple_Check(names.ptr())) return false;
  for (const py::handle name : names) {
    if (!item(of.loras_A.ptr(), name.ptr())) continue;
    found.lows.emplace_back();
    if (!adapters::modules(of, name.ptr(), around.kinds(), words, found.lows.back(), proof)) return false;
  }
  found.casts = item(state.ptr(), words.casts).is(py::handle(Py_True));
  return !found.lows.empty();
}

// what modules() found, as long as its proof stands: nothing here keeps a model alive
struct Seen {
  Proof proof;
  py::object around, gone;  // whom it was found for; a reference to the layer that takes this away with it
  PyObject *W = nullptr, *bias = nullptr;
  struct Low {
    PyObject *A, *B, *bias, *scaling;
  };
  std::vector<Low> lows;
  bool casts = false;

  static std::unordered_map<PyObject*, std::unique_ptr<Seen>>& all() {
    static auto* const seen = new std::unordered_map<PyObject*, std::unique_ptr<Seen>>;  // outlives the interpreter
    return *seen;
  }

  static bool of(const py::object& self, const py::tuple& around, Found& found) {
    const auto at = all().find(self.ptr());
    if (at == all().end() || !at->second->around.is(around) || !at->second->proof.stands()) return false;
    const auto owned = [](PyObject* of) { return py::reinterpret_borrow<py::object>(of); };
    const Seen& seen = *at->second;
    found = {owned(seen.W), owned(seen.bias), {}, seen.casts};
    for (const Low& low : seen.lows)
      found.lows.push_back({owned(low.A), owned(low.B), owned(low.bias), owned(low.scaling)});
    return true;
  }

  static void keep(const py::object& self, const py::tuple& around, const Found& found, Proof&& proof) {
    if (!PROVABLE) return;
    PyObject* const key = self.ptr();
    auto& kept = all()[key];
    if (!kept) {
      kept = std::make_unique<Seen>();
      kept->gone = py::weakref(self, py::cpp_function([key](py::handle) { all().erase(key); }));
    }
    kept->proof = std::move(proof), kept->around = around, kept->W = found.W.ptr(), kept->bias = found.bias.ptr();
    kept->lows.clear(), kept->casts = found.casts;
    for (const adapters::Low& low : found.lows)
      kept->lows.push_back({low.A.ptr(), low.B.ptr(), low.bias.ptr(), low.scaling.ptr()});
  }
};

// a layer, x (..., K) and what is around them -> (W, bias, (As, Bs, biases of B, scalings), tokens, ranks together), or
// None: whatever is not PEFT's lora.Linear over an nn.Linear with adapters, that is to be fast, in float32 or bfloat16
// and on the processor. That nothing wants a gradient is for the caller to see
inline py::object common(const py::object& self, const py::object& x, const py::tuple& of) {
  static const Words words;
  const Around around(of);
  const adapters::Kinds kinds = around.kinds();
  const auto other = [] { return py::object(py::none()); };
  if ((PyObject*)Py_TYPE(self.ptr()) != around.lora || !quiet(around, words)) return other();
  Found found;
  if (!Seen::of(self, of, found)) {
    Proof proof;
    if (!modules(self, around, words, found, proof)) return other();
    Seen::keep(self, of, found, std::move(proof));
  }
  const py::object linear = py::reinterpret_borrow<py::object>(around.linear);
  if (!attribute(linear, words.forward).is(py::handle(around.forward))) return other();

  const auto& [W, bias, lows, casts] = found;
  py::object dtype, kind;
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

  adapters::Lists lists;
  for (const adapters::Low& low : lows) {
    const Py_ssize_t r = adapters::tensors(low, kinds, kind, words);
    if (r < 0) return other();
    rank += r;
    lists.append(low);
  }
  if (!kind.is(dtype) && !(kind.is(py::handle(around.f32)) && casts)) return other();
  return py::make_tuple(W, none(bias) ? other() : bias, lists.all(), tokens, rank);
}

}  // namespace layer
}  // namespace peft_fast
