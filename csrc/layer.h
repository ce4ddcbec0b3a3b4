// What a whole LoRA layer is made of, as peft_fast/patch/decode.py finds it in Python, where the common case is all there
// is to find. It is kept with a proof, and found anew where that stands no more.
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
           *level = word("_current_level"), *cpu = word("cpu"), *off = word("off"), *paused = word("paused"),
           *everywhere = word("everywhere"), *mark = word("_peft_fast"), *current = word("_current"),
           *backend = word("backend"), *disable = word("disable"), *min_tokens = word("min_tokens"),
           *magnitudes = word("lora_magnitude_vector"), *cache = word("_dora_cache"), *turned = word("fan_in_fan_out");
  PyObject* global_hooks[4] = {word("_global_forward_hooks"), word("_global_forward_pre_hooks"),
                               word("_global_backward_hooks"), word("_global_backward_pre_hooks")};
};

// of what Around names and in which order, and what keep() takes: another number for each other list
constexpr int LIST = 4;

// classes, dtypes and what tells of the modes that a call can be in, in the order that the caller names them
struct Around {
  PyObject *lora, *linear, *forward, *identity, *dropout, *parameter, *tensor, *strided, *f32, *bf16;
  PyObject *autocast, *tracing, *functorch, *exporting;  // functions
  PyObject *forward_ad, *modules;                        // the dicts of Python modules
  PyObject* state;                                       // of marks.py
  PyObject *function_modes, *dispatch_modes, *profiling;  // functions
  PyObject* settings;                                    // the dict of a Python module
  PyObject *most, *ranks, *few_tokens;                   // limits, and where few_tokens() is
  PyObject *dora, *magnitude;                            // classes: the variant, and its module

  explicit Around(const py::tuple& of) {
    PyObject** const to[] = {&lora,       &linear,  &forward,  &identity,       &dropout,        &parameter,
                             &tensor,     &strided, &f32,      &bf16,           &autocast,       &tracing,
                             &functorch,  &exporting, &forward_ad, &modules,    &state,          &function_modes,
                             &dispatch_modes, &profiling, &settings, &most,     &ranks,          &few_tokens,
                             &dora,       &magnitude};
    if (of.size() != std::size(to)) throw py::value_error("26 things around a layer");
    for (size_t i = 0; i < std::size(to); ++i) *to[i] = of[i].ptr();
    for (PyObject* dict : {forward_ad, modules, settings})
      if (!PyDict_Check(dict)) throw py::value_error("dicts of modules");
  }
  adapters::Kinds kinds() const { return {linear, identity, dropout, parameter, strided}; }
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
  py::object W, bias, m;  // m: DoRA's, or null
  std::vector<adapters::Low> lows;
  bool casts;        // x to the adapters' dtype
  Py_ssize_t below;  // so many tokens the settings leave a call to the compiled kernels
  py::object names;  // of the adapters that are on, whose addresses are part of the proof
};

// so many tokens do the settings leave it to them
inline Py_ssize_t settled(const Around& around, const Words& words, Proof& proof) {
  proof.values(around.settings);
  const py::object now = item(around.settings, words.current);
  if (none(now)) return 0;
  own(now.ptr(), proof);
  const std::string backend = py::str(attribute(now, words.backend));
  if ((backend != "auto" && backend != "cpu") || !attribute(now, words.disable).is(py::handle(Py_False))) return 0;
  return number(attribute(now, words.min_tokens));
}

// an adapter's magnitude, by its variant and module; null where they are not the common case
inline py::object magnitude(const py::object& variant, const py::object& module, const Around& around,
                            const Words& words, Proof& proof) {
  if ((PyObject*)Py_TYPE(variant.ptr()) != around.dora || !adapters::empty(own(variant.ptr(), proof), proof)) return {};
  const py::object state = adapters::untouched(module, around.magnitude, words, proof);
  if (!state || !adapters::empty(item(state.ptr(), words.cache), proof)) return {};  // PEFT was asked to keep its norm
  if (!item(state.ptr(), words.turned).is(py::handle(Py_False))) return {};
  const py::object parameters = adapters::dict(item(state.ptr(), words.parameters), proof);
  return parameters ? item(parameters.ptr(), words.weight) : py::object();
}

// a lora.Linear that is to be fast, by its modules and the switches of the process; false where that is not the common
// case
inline bool modules(const py::object& self, const Around& around, const Words& words, Found& found, Proof& proof) {
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
  const py::object parts = adapters::dict(item(state.ptr(), words.modules), proof);
  const py::object variants = adapters::dict(item(state.ptr(), words.variants), proof);
  if (!parts || !variants) return false;

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
  else if (PyList_Check(names.ptr())) proof.items(names.ptr()), names = py::tuple(names);
  else if (!PyTuple_Check(names.ptr())) return false;
  found.names = names;
  for (const py::handle name : names) {
    if (!PyUnicode_CheckExact(name.ptr())) return false;
    if (!item(of.loras_A.ptr(), name.ptr())) continue;
    found.lows.emplace_back();
    if (!adapters::modules(of, name.ptr(), around.kinds(), words, found.lows.back(), proof)) return false;
    const py::object variant = item(variants.ptr(), name.ptr());
    if (!variant) continue;
    const py::object magnitudes = children(parts, words.magnitudes, words, proof);
    if (!magnitudes || found.m) return false;
    found.m = magnitude(variant, item(magnitudes.ptr(), name.ptr()), around, words, proof);
    if (!found.m || !found.lows.back().bias.is_none()) return false;
  }
  if (found.m && found.lows.size() > 1) return false;
  found.casts = item(state.ptr(), words.casts).is(py::handle(Py_True));
  found.below = settled(around, words, proof);
  return !found.lows.empty();
}

// what modules() found, as long as its proof stands: nothing here keeps a model alive
struct Seen {
  Proof proof;
  py::object around, gone;  // whom it was found for; a reference to the layer that takes this away with it
  py::object names;
  PyObject *W = nullptr, *bias = nullptr, *m = nullptr;
  struct Low {
    PyObject *A, *B, *bias, *scaling;
  };
  std::vector<Low> lows;
  bool casts = false;
  Py_ssize_t below = 0;
  uint64_t calls = 0;  // of decode() that it answered
  // the norm of W + s·B·A, with what the probe gave beside so many tokens when that was its norm
  struct Norm {
    Py_ssize_t tokens = 0, N = 0, K = 0;
    bool low_bf16 = false;          // of adapters whose dtype it was rounded to
    py::object norm, probe, check;  // vectors in float32 that nobody else writes, and where they are
    const float *norm_at = nullptr, *probe_at = nullptr, *check_at = nullptr;
  };
  std::vector<Norm> norms;

  static std::unordered_map<PyObject*, std::unique_ptr<Seen>>& all() {
    static auto* const seen = new std::unordered_map<PyObject*, std::unique_ptr<Seen>>;  // outlives the interpreter
    return *seen;
  }

  // null if nobody has
  static Seen* of(PyObject* layer) {
    const auto at = all().find(layer);
    return at == all().end() ? nullptr : at->second.get();
  }

  bool stands(const py::tuple& for_whom, Found& found) const {
    if (!around.is(for_whom) || !proof.stands()) return false;
    const auto owned = [](PyObject* of) { return py::reinterpret_borrow<py::object>(of); };
    found = {owned(W), owned(bias), owned(m), {}, casts, below, names};
    for (const Low& low : lows)
      found.lows.push_back({owned(low.A), owned(low.B), owned(low.bias), owned(low.scaling)});
    return true;
  }

  static Seen* keep(const py::object& self, const py::tuple& around, const Found& found, Proof&& proof) {
    PyObject* const key = self.ptr();
    auto& kept = all()[key];
    if (!kept) {
      kept = std::make_unique<Seen>();
      kept->gone = py::weakref(self, py::cpp_function([key](py::handle) { all().extract(key); }));
    }
    if (!PROVABLE) return kept.get();
    kept->proof = std::move(proof), kept->around = around, kept->W = found.W.ptr(), kept->bias = found.bias.ptr();
    kept->m = found.m.ptr(), kept->lows.clear(), kept->casts = found.casts, kept->below = found.below, kept->names = found.names;
    for (const adapters::Low& low : found.lows)
      kept->lows.push_back({low.A.ptr(), low.B.ptr(), low.bias.ptr(), low.scaling.ptr()});
    return kept.get();
  }
};

}  // namespace layer
}  // namespace peft_fast
