// Calls of a whole LoRA layer, looked at and, for few tokens, answered. What its modules are is layer.h's; the tensors, x
// and the modes of the process are asked every time.
#pragma once
#include <cstring>

#include "cpu/few_tokens.h"
#include "layer.h"

namespace peft_fast {
namespace layer {

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
