// The one list of torch operators, through LibTorch's stable ABI.
#include "cpu/decode.h"
#include "cpu/dora_linear.h"
#include "cpu/dora_norm.h"
#include "cpu/lora_embedding.h"
#include "cpu/lora_experts.h"
#include "cpu/lora_group.h"
#include "cpu/lora_linear.h"
#include "cpu/lora_mixed.h"
#include "cpu/lora_mlp.h"
#include "cpu/lora_quantized.h"
#include "cpu/nf4.h"

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
  m.def(
      "lora_group(Tensor x, Tensor[] ws, Tensor?[] biases, Tensor a, Tensor[] bs, Tensor? seed, int[] counts, "
      "int[] ranks, float[] scalings, float[] ps, bool[] transposed, Tensor?[] packed) -> (Tensor[], Tensor)");
  m.def(
      "lora_group_backward(Tensor[] gs, Tensor x, Tensor[] ws, Tensor a, Tensor[] bs, Tensor h, Tensor? seed, "
      "int[] counts, int[] ranks, float[] scalings, float[] ps, bool[] transposed, bool needs_x, bool[] needs_bias, "
      "bool needs_a, bool[] needs_b, bool wide_dx, Tensor?[] packed) -> (Tensor, Tensor, Tensor[], Tensor[])");
  m.def(
      "lora_mlp_activate(Tensor? gate, Tensor up, Tensor? seed, str activation, str halves, float p) -> Tensor");
  m.def(
      "lora_mlp_activate_backward(Tensor dh, Tensor? gate, Tensor up, Tensor? seed, str activation, str halves, "
      "float p) -> (Tensor, Tensor)");
  m.def(
      "lora_mlp_down_backward(Tensor g, Tensor w, Tensor a, Tensor b, Tensor low, Tensor? seed, int[] ranks, "
      "float[] scalings, float[] ps, bool transposed, bool[] needs, Tensor? packed, Tensor? gate, Tensor up, "
      "Tensor? h_seed, str activation, str halves, float p) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "lora_embedding(Tensor ids, Tensor w, Tensor a, Tensor b, Tensor? scale, float scaling) -> (Tensor, Tensor)");
  m.def(
      "lora_embedding_backward(Tensor g, Tensor ids, Tensor a, Tensor b, Tensor h, Tensor? scale, float scaling, "
      "SymInt padding, bool[] needs) -> (Tensor, Tensor)");
  m.def(
      "lora_decode(Tensor x, Tensor w, Tensor? bias, Tensor[] a, Tensor[] b, Tensor?[] low_biases, float[] scalings, "
      "bool transposed, int[] order=[], int[] counts=[]) -> Tensor");
  m.def(
      "dora_decode(Tensor x, Tensor w, Tensor? bias, Tensor a, Tensor b, float scaling, Tensor m, Tensor norm, "
      "Tensor? probe, bool transposed) -> (Tensor, Tensor)");
  m.def(
      "lora_mixed(Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, Tensor?[] biases, int[] order, int[] counts, "
      "float[] scalings) -> ()");
  m.def(
      "lora_experts_infer(Tensor x, Tensor w, Tensor? bias, Tensor[] a, Tensor[] b, Tensor order, Tensor counts, "
      "SymInt k, float[] scalings, bool transposed, int few) -> Tensor");
  m.def(
      "lora_experts(Tensor x, Tensor w, Tensor? bias, Tensor a, Tensor b, Tensor order, Tensor counts, SymInt k, "
      "int[] ranks, float[] scalings, bool transposed) -> (Tensor, Tensor)");
  m.def(
      "lora_experts_backward(Tensor g, Tensor x, Tensor w, Tensor a, Tensor b, Tensor h, Tensor order, Tensor counts, "
      "SymInt k, int[] ranks, float[] scalings, bool transposed, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("nf4(Tensor data, Tensor scales, Tensor code, SymInt block, SymInt N, SymInt K, bool bf16) -> Tensor");
  m.def("nf4_scales(Tensor absmax, Tensor code, Tensor outer, Tensor offset, SymInt block) -> Tensor");
  m.def(
      "lora_quantized(Tensor x, Tensor w, Tensor codes, Tensor scales, Tensor? meaning, Tensor? zeros, SymInt block, "
      "Tensor? bias, Tensor a, Tensor b, Tensor? seed, int[] ranks, float[] scalings, float[] ps) "
      "-> (Tensor, Tensor)");
  m.def(
      "lora_quantized_backward(Tensor g, Tensor x, Tensor w, Tensor codes, Tensor scales, Tensor? meaning, "
      "Tensor? zeros, SymInt block, Tensor a, Tensor b, Tensor h, Tensor? seed, int[] ranks, float[] scalings, "
      "float[] ps, bool[] needs, bool wide_dx) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("all_zero(Tensor[] ts) -> bool");
  m.def("dora_norm(Tensor w, Tensor a, Tensor b, float scaling, bool transposed) -> Tensor");
  m.def(
      "dora_linear(Tensor x, Tensor w, Tensor? bias, Tensor a, Tensor b, Tensor c, Tensor? seed, float scaling, "
      "float p, bool transposed, bool keep, Tensor? packed=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "dora_linear_backward(Tensor g, Tensor x, Tensor w, Tensor a, Tensor b, Tensor c, Tensor h, Tensor z, "
      "Tensor? seed, float scaling, float p, bool transposed, bool[] needs, bool wide_dx, Tensor? packed=None) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("pack_weight(Tensor w, bool transposed, bool for_dx, bool like_bf16) -> Tensor");
  m.def("weight_digest(Tensor w) -> int");
  m.def("dropout_mask(Tensor seed, SymInt M, SymInt K, float p) -> Tensor");
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
  m.impl("lora_group", TORCH_BOX(&peft_fast::lora_group));
  m.impl("lora_group_backward", TORCH_BOX(&peft_fast::lora_group_backward));
  m.impl("lora_mlp_activate", TORCH_BOX(&peft_fast::lora_mlp_activate));
  m.impl("lora_mlp_down_backward", TORCH_BOX(&peft_fast::lora_mlp_down_backward));
  m.impl("lora_mlp_activate_backward", TORCH_BOX(&peft_fast::lora_mlp_activate_backward));
  m.impl("lora_embedding", TORCH_BOX(&peft_fast::lora_embedding));
  m.impl("lora_embedding_backward", TORCH_BOX(&peft_fast::lora_embedding_backward));
  m.impl("lora_decode", TORCH_BOX(&peft_fast::lora_decode));
  m.impl("dora_decode", TORCH_BOX(&peft_fast::dora_decode));
  m.impl("all_zero", TORCH_BOX(&peft_fast::all_zero));
  m.impl("lora_mixed", TORCH_BOX(&peft_fast::lora_mixed));
  m.impl("lora_experts_infer", TORCH_BOX(&peft_fast::lora_experts_infer));
  m.impl("lora_experts", TORCH_BOX(&peft_fast::lora_experts));
  m.impl("lora_experts_backward", TORCH_BOX(&peft_fast::lora_experts_backward));
  m.impl("nf4", TORCH_BOX(&peft_fast::nf4));
  m.impl("nf4_scales", TORCH_BOX(&peft_fast::nf4_scales));
  m.impl("lora_quantized", TORCH_BOX(&peft_fast::lora_quantized));
  m.impl("lora_quantized_backward", TORCH_BOX(&peft_fast::lora_quantized_backward));
  m.impl("dora_norm", TORCH_BOX(&peft_fast::dora_norm));
  m.impl("dora_linear", TORCH_BOX(&peft_fast::dora_linear));
  m.impl("dora_linear_backward", TORCH_BOX(&peft_fast::dora_linear_backward));
  m.impl("pack_weight", TORCH_BOX(&peft_fast::pack_weight));
  m.impl("weight_digest", TORCH_BOX(&peft_fast::weight_digest));
  m.impl("dropout_mask", TORCH_BOX(&peft_fast::dropout_mask));
}

STABLE_TORCH_LIBRARY_IMPL(peft_fast, CompositeExplicitAutograd, m) {
  m.impl("set_isa", TORCH_BOX(&peft_fast::set_isa));
  m.impl("isa", TORCH_BOX(&peft_fast::isa));
}
