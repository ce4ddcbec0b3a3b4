#include "cuda/outer.cuh"

namespace peft_fast::cuda {
template void launch_outer<Bf16>(const Outer&, Stream);
template void launch_shrink_outer<Bf16>(const Outer&, Stream);
}
