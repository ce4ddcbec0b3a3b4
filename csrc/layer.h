// Looks at a whole LoRA layer and what it is called with, as peft_fast/patch/decode.py does in Python, where the common
// case is all there is to find. What its modules are is kept with a proof, and found anew where that stands no more; the
// tensors, x and the modes of the process are asked every time.
#pragma once
#include <cstring>
#include <memory>
#include <unordered_map>

#include "adapters.h"
#include "cpu/few_tokens.h"

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

// a call: what a layer is made of, and what x is
struct Call : Found {
  Seen* seen;        // as long as the layer is
  py::object shape;  // of x
  Py_ssize_t tokens = 1, K = 0, rank = 0;  // all adapters' together
  bool bf16, low_bf16, m_bf16 = false;
};

// is it PEFT's lora.Linear over an nn.Linear with adapters, that is to be fast, in float32 or bfloat16 and on the
// processor, called with x (..., K)? That nothing wants a gradient is for the caller to see
inline bool look(const py::object& self, const py::object& x, const py::tuple& of, const Around& around,
                 const Words& words, Call& call) {
  if ((PyObject*)Py_TYPE(self.ptr()) != around.lora || !quiet(around, words)) return false;
  call.seen = Seen::of(self.ptr());
  if (!call.seen || !call.seen->stands(of, call)) {
    Proof proof;
    if (!modules(self, around, words, call, proof)) return false;
    call.seen = Seen::keep(self, of, call, std::move(proof));
  }
  const py::object linear = py::reinterpret_borrow<py::object>(around.linear);
  if (!attribute(linear, words.forward).is(py::handle(around.forward))) return false;

  const adapters::Tensors& tensors = adapters::Tensors::all();
  py::object dtype, kind;
  if (!adapters::dense(call.W, around.parameter, around.strided, dtype)) return false;
  call.bf16 = dtype.is(py::handle(around.bf16));
  if (!call.bf16 && !dtype.is(py::handle(around.f32))) return false;
  if (!none(call.bias) && !adapters::dense(call.bias, around.parameter, around.strided, dtype)) return false;

  if (!adapters::dense(x, around.tensor, around.strided, dtype)) return false;
  if (!adapters::property(x, tensors.is_nested).is(py::handle(Py_False))) return false;
  call.shape = adapters::property(x, tensors.shape);
  if (!PyTuple_Check(call.shape.ptr())) return false;
  const Py_ssize_t dims = PyTuple_GET_SIZE(call.shape.ptr());
  if (dims == 0 || (call.m && dims == 1)) return false;  // of a vector PEFT's DoRA makes a row
  const auto size = [&](Py_ssize_t i) { return PyLong_AsSsize_t(PyTuple_GET_ITEM(call.shape.ptr(), i)); };
  for (Py_ssize_t i = 0; i + 1 < dims; ++i) call.tokens *= size(i);
  call.K = size(dims - 1);
  if (PyErr_Occurred()) throw py::error_already_set();
  if (call.K != adapters::size(call.W, 1)) return false;

  for (const adapters::Low& low : call.lows) {
    const Py_ssize_t r = adapters::tensors(low, around.kinds(), kind);
    if (r < 0) return false;
    call.rank += r;
  }
  call.low_bf16 = kind.is(py::handle(around.bf16));
  if (call.m) {
    py::object of_m;
    if (!adapters::dense(call.m, around.parameter, around.strided, of_m)) return false;
    call.m_bf16 = of_m.is(py::handle(around.bf16));
    if (!call.m_bf16 && !of_m.is(py::handle(around.f32))) return false;
  }
  return kind.is(dtype) || (kind.is(py::handle(around.f32)) && call.casts);
}

// a layer, x (..., K) and what is around them -> (W, bias, (As, Bs, biases of B, scalings), tokens, ranks together, m or
// None), or None
inline py::object common(const py::object& self, const py::object& x, const py::tuple& of) {
  static const Words words;
  Call call;
  if (!look(self, x, of, Around(of), words, call)) return py::none();
  adapters::Lists lists;
  for (const adapters::Low& low : call.lows) lists.append(low);
  const py::object bias = none(call.bias) ? py::object(py::none()) : call.bias;
  return py::make_tuple(call.W, bias, lists.all(), call.tokens, call.rank, call.m ? call.m : py::object(py::none()));
}

// calls that decode() answered, of the process
inline uint64_t& calls() {
  static uint64_t n = 0;
  return n;
}

// do a dense tensor's values lie side by side, as they are?
inline bool plain(const py::object& tensor) {
  const adapters::Tensors& of = adapters::Tensors::all();
  return adapters::method(tensor, of.is_contiguous).is(py::handle(Py_True)) &&
         adapters::method(tensor, of.is_neg).is(py::handle(Py_False));
}

inline void* values(const py::object& tensor) {
  void* const at = PyLong_AsVoidPtr(adapters::method(tensor, adapters::Tensors::all().data_ptr).ptr());
  if (!at && PyErr_Occurred()) throw py::error_already_set();
  return at;
}

// a vector (N,) that is plain, or none
inline bool vector(const py::object& of, Py_ssize_t N) {
  if (none(of)) return true;
  const py::object shape = adapters::property(of, adapters::Tensors::all().shape);
  return PyTuple_Check(shape.ptr()) && PyTuple_GET_SIZE(shape.ptr()) == 1 &&
         PyLong_AsSsize_t(PyTuple_GET_ITEM(shape.ptr(), 0)) == N && plain(of);
}

// the norm of a DoRA layer's weight (N,), for decode() with so many tokens as long as the probe (K,) gives `check` (N,)
// beside them; all in float32, side by side
inline void keep(const py::object& self, Py_ssize_t tokens, bool low_bf16, const py::object& norm,
                 const py::object& probe, const py::object& check) {
  Seen* const seen = Seen::of(self.ptr());
  const Py_ssize_t N = py::len(norm), K = py::len(probe);
  if (!seen || !vector(norm, N) || !vector(probe, K) || !vector(check, N)) return;
  // to give a tensor up may let another thread run: what it meets is whole
  std::vector<Seen::Norm> norms{{tokens, N, K, low_bf16, norm, probe, check, (const float*)values(norm),
                                 (const float*)values(probe), (const float*)values(check)}};
  for (const Seen::Norm& of : seen->norms)
    if (of.tokens != tokens) norms.push_back(of);
  seen->norms.swap(norms);
}

// a layer and x (..., K) -> y (..., N) by lora_decode's arithmetic, without its way through torch's dispatcher, which
// costs as much as some layers; or None where it is not the common case, or somebody watches what torch calls
inline py::object decode(const py::object& self, const py::object& x, const py::tuple& of) {
  static const Words words;
  const Around around(of);
  const auto limit = [](PyObject* n) { return PyLong_AsSsize_t(n); };
  Call call;
  if (!PyLong_Check(around.few_tokens) || !look(self, x, of, around, words, call)) return py::none();
  const Py_ssize_t N = adapters::size(call.W, 0);
  if (call.tokens < 1 || call.tokens > limit(around.most) || N < 1 || call.K < 1 || call.rank > limit(around.ranks))
    return py::none();
  if (call.tokens >= call.below) return py::none();
  for (PyObject* modes : {around.function_modes, around.dispatch_modes}) {
    const auto depth = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(modes));
    if (!depth || number(depth) != 0) return py::none();
  }
  if (!gives(around.profiling, Py_False)) return py::none();

  // what does not fit is the operator's to refuse
  if (!plain(x) || !plain(call.W) || !vector(call.bias, N)) return py::none();
  for (const adapters::Low& low : call.lows) {
    if (adapters::size(low.A, 0) < 1 || adapters::size(low.A, 1) != call.K || adapters::size(low.B, 0) != N)
      return py::none();
    if (!plain(low.A) || !plain(low.B) || !vector(low.bias, N)) return py::none();
  }
  Seen::Norm norm{};
  if (call.m) {
    for (const Seen::Norm& of : call.seen->norms)
      if (of.tokens == call.tokens) norm = of;
    if (!norm.check || norm.N != N || norm.K != call.K || norm.low_bf16 != call.low_bf16 || !vector(call.m, N)) return py::none();
  }
  py::tuple shape(PyTuple_GET_SIZE(call.shape.ptr()));
  for (size_t i = 0; i + 1 < shape.size(); ++i)
    shape[i] = py::handle(PyTuple_GET_ITEM(call.shape.ptr(), Py_ssize_t(i)));
  shape[shape.size() - 1] = py::int_(N);
  const py::object y = adapters::method(x, adapters::Tensors::all().new_empty, shape.ptr());

  // from here on no other thread runs Python until all addresses are known; `call` keeps the tensors, though who swaps
  // one's memory meanwhile, in another thread, takes it from under this call
  const auto line = [&](const py::object& of, bool bf16) {
    return none(of) ? FewTokens::Line{} : FewTokens::Line{values(of), bf16, 1};
  };
  std::vector<FewTokens::Low> lows;
  for (const adapters::Low& low : call.lows) {
    const Py_ssize_t r = adapters::size(low.A, 0);
    lows.push_back({{values(low.A), call.low_bf16, call.K}, {values(low.B), call.low_bf16, r},
                    line(low.bias, call.low_bf16), r, PyFloat_AS_DOUBLE(low.scaling.ptr()), 0});
    if (!lows.back().a.data || !lows.back().b.data) return py::none();
  }
  FewTokens few{};
  few.M = call.tokens, few.K = call.K, few.N = N;
  few.x = {values(x), call.bf16, call.K};
  few.w = values(call.W), few.w_bf16 = call.bf16, few.w_row = call.K, few.w_col = 1;
  few.bias = line(call.bias, call.bf16), few.y = values(y);
  few.lows = lows.data(), few.n_lows = int64_t(lows.size());
  if (!few.x.data || !few.w || !few.y) return py::none();
  std::unique_ptr<float[]> check;
  if (call.m) {
    check.reset(new float[N]);
    few.norm = norm.norm_at, few.m = line(call.m, call.m_bf16), few.probe = norm.probe_at, few.check = check.get();
  }
  const auto run = (decltype(&peft_fast_few_tokens))PyLong_AsVoidPtr(around.few_tokens);
  int ran = 0;
  {
    const py::gil_scoped_release released;
    ran = run(&few, sizeof few);
  }
  if (!ran) return py::none();
  if (call.m && std::memcmp(check.get(), norm.check_at, N * sizeof(float))) return py::none();
  ++call.seen->calls, ++calls();
  return y;
}

}  // namespace layer
}  // namespace peft_fast
