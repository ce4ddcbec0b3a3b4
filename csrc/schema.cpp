// The one list of torch operators, through LibTorch's stable ABI.
#include "cpu/lora_linear.h"

namespace peft_fast {

std::string set_isa(std::string name) { return select_isa(name.c_str()); }
std::string isa() { return current_isa(); }

}  // namespace peft_fast

STABLE_TORCH_LIBRARY(peft_fast, m) {
  m.def(
      "lora_linear(Tensor x, Tensor w, Tensor? bias, Tensor a, Tensor b, Tensor? seed, int[] ranks, float[] scalings, "
      "float[] ps, bool transposed, Tensor? packed=None) -> (Tensor, Tensor)");
  m.def(
      "lora_linear_backward(Tensor g, Tensor x, Tensor w, Tensor a, Tensor b, Tensor h, Tensor? seed, int[] ranks, "
      "float[] scalings, float[] ps, bool transposed, bool[] needs, bool wide_dx, Tensor? packed=None) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("pack_weight(Tensor w, bool transposed, bool for_dx, bool like_bf16) -> Tensor");
  m.def("weight_digest(Tensor w) -> int");
  m.def("dropout_mask(Tensor seed, int M, int K, float p) -> Tensor");
  m.def("set_isa(str name) -> str");
  m.def("isa() -> str");
  // on a GPU, the skinny products and the base GEMM: cuda/operators.cpp, cuda/gemm.cpp
  m.def("lora_shrink(Tensor x, Tensor op, Tensor? seed, int[] ranks, float[] scalings, float[] ps) -> Tensor");
  m.def(
      "lora_outer(Tensor d, Tensor x, Tensor like, Tensor? seed, int[] ranks, float[] ps, bool turned) -> Tensor");
  m.def(
      "lora_shrink_outer(Tensor g, Tensor op, Tensor h, int[] ranks, float[] scalings) -> (Tensor, Tensor)");
  m.def("lora_expand(Tensor p, Tensor q, Tensor? bias, Tensor? seed, int[] ranks, float[] ps) -> Tensor");
  m.def("gemm_add_(Tensor(a!) out, Tensor a, Tensor b, bool tf32) -> bool");
  m.def(
      "lora_gemm(Tensor left, Tensor right, Tensor low_left, Tensor low_right, Tensor? bias, Tensor? seed, float p, "
      "bool turned) -> (Tensor, str)");
  m.def("cuda_archs() -> str");
  m.def("cuda_no_device() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(peft_fast, CPU, m) {
  m.impl("lora_linear", TORCH_BOX(&peft_fast::lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&peft_fast::lora_linear_backward));
  m.impl("pack_weight", TORCH_BOX(&peft_fast::pack_weight));
  m.impl("weight_digest", TORCH_BOX(&peft_fast::weight_digest));
  m.impl("dropout_mask", TORCH_BOX(&peft_fast::dropout_mask));
}

STABLE_TORCH_LIBRARY_IMPL(peft_fast, CompositeExplicitAutograd, m) {
  m.impl("set_isa", TORCH_BOX(&peft_fast::set_isa));
  m.impl("isa", TORCH_BOX(&peft_fast::isa));
}
