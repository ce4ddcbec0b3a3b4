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
