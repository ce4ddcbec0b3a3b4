#include "cpu/lora_mlp.h"

#include <algorithm>

#include "cpu/dropout.h"
#include "cpu/lora_group.h"

namespace peft_fast {
namespace {

Activation named(const std::string& name) {
  static const char* const names[] = {"silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"};
  static_assert(std::size(names) == size_t(Activation::count));
  const auto* at = std::find(std::begin(names), std::end(names), name);
  STD_TORCH_CHECK(at != std::end(names), "given: activation=", name,
                  "\nneeded: silu, gelu, gelu_tanh, quick_gelu, relu or relu2\ndo: call peft_fast.ops.lora_mlp");
  return Activation(at - std::begin(names));
}

// the two inputs of one call as rows, the mask of its dropout and what every row shares
class Rows {
 public:
  Rows(const std::optional<Tensor>& gate, const Tensor& up, const std::optional<Tensor>& seed,
       const std::string& activation, const std::string& halves, double p)
      : up_(matrix(up, "up")), p_(p) {
    const bool split = halves == "first" || halves == "second";
    STD_TORCH_CHECK(up.dim() == 2 && split == !halves.empty() && (!split || (!gate && up_.cols % 2 == 0)),
                    "given: tensors and halves that do not fit\nneeded: gate, up (M, I), or up (M, 2I) without gate "
                    "and halves 'first' or 'second'\ndo: call peft_fast.ops.lora_mlp");
    line_ = {named(activation), up_.source.bf16, split ? up_.cols / 2 : up_.cols};
    gated_ = split || gate;
    if (gate) {
      gate_ = matrix(*gate, "gate");
      STD_TORCH_CHECK(gate_->rows == up_.rows && gate_->cols == up_.cols && gate_->source.bf16 == up_.source.bf16,
                      "given: gate and up of different shapes or dtypes\nneeded: two outputs of one x\n"
                      "do: call peft_fast.ops.lora_mlp");
    }
    // columns of up_ at which the activated input and the other one begin
    act_at_ = halves == "second" ? line_.n : 0;
    up_at_ = halves == "first" ? line_.n : 0;
    if (p > 0) {
      STD_TORCH_CHECK(seed && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long,
                      "given: dropout without a seed\nneeded: one int64\ndo: draw_seed(1)");
      seed_ = uint64_t(*(const int64_t*)seed->const_data_ptr());
      line_.keep_scale = p < 1 ? float(1 / (1 - p)) : 0.0f;
    }
  }

  int64_t M() const { return up_.rows; }
  int64_t I() const { return line_.n; }

  // for every row: run(line), once place(line, m) has put in the outputs
  template <class Place>
  void each(void (*run)(const ActLine&), const Place& place) const {
    const Engine& e = engine(up_.source.bf16);
    const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(I(), 1));
    const uint32_t threshold = uint32_t(std::lrint(p_ * 65536));
    torch::stable::parallel_for(0, M(), grain, [&](int64_t m0, int64_t m1) {
      std::vector<uint8_t> bits(p_ > 0 ? mask_stride(I()) : 0);
      ActLine line = line_;
      for (int64_t m = m0; m < m1; ++m) {
        if (p_ > 0) {
          e.mask_row(seed_, uint64_t(m), I(), threshold, bits.data());
          line.bits = bits.data();
        }
        line.up = at(up_, m, up_at_);
        line.gate = gate_ ? at(*gate_, m, 0) : gated_ ? at(up_, m, act_at_) : nullptr;
        place(line, m);
        run(line);
      }
    });
  }

  // where row m of a gradient of up, dense, holds the gradients of the activated input and of the other one
  void place_dup(ActLine& line, const Tensor& dup, int64_t m) const {
    char* row = element(dup, m * dup.size(1));
    line.dup = row + up_at_ * bytes();
    if (gated_ && !gate_) line.dgate = row + act_at_ * bytes();
  }
  char* element(const Tensor& t, int64_t i) const { return (char*)t.mutable_data_ptr() + i * bytes(); }
  const void* at(const Matrix& x, int64_t m, int64_t column) const {
    return (const char*)x.source.data + (m * x.source.row + column) * bytes();
  }

 private:
  int64_t bytes() const { return line_.bf16 ? 2 : 4; }

  Matrix up_;
  std::optional<Matrix> gate_;
  ActLine line_{};
  bool gated_;
  int64_t act_at_, up_at_;
  double p_;
  uint64_t seed_ = 0;
};

// dgate (empty without gate) and dup; with_h writes h over dh
std::tuple<Tensor, Tensor> gradients(const Rows& rows, const Matrix& dh, const std::optional<Tensor>& gate,
                                     const Tensor& up, bool with_h) {
  STD_TORCH_CHECK(dh.rows == rows.M() && dh.cols == rows.I() && dh.source.bf16 == is_bf16(up),
                  "given: a gradient of another shape or dtype than h\nneeded: dh (M, I) in the dtype of up\n"
                  "do: call peft_fast.ops.lora_mlp and let autograd run the backward");
  Tensor dgate = empty_like(up, {gate ? rows.M() : 0, rows.I()}), dup = empty_like(up, {up.size(0), up.size(1)});
  rows.each(engine(is_bf16(up)).activate_backward, [&](ActLine& line, int64_t m) {
    line.dh = rows.at(dh, m, 0);
    if (with_h) line.h = const_cast<void*>(line.dh);
    if (gate) line.dgate = rows.element(dgate, m * rows.I());
    rows.place_dup(line, dup, m);
  });
  return {dgate, dup};
}

}  // namespace

Tensor lora_mlp_activate(const std::optional<Tensor>& gate, const Tensor& up, const std::optional<Tensor>& seed,
                         const std::string& activation, const std::string& halves, double p) {
  const Rows rows(gate, up, seed, activation, halves, p);
  Tensor h = empty_like(up, {rows.M(), rows.I()});
  rows.each(engine(is_bf16(up)).activate, [&](ActLine& line, int64_t m) { line.h = rows.element(h, m * rows.I()); });
  return h;
}

std::tuple<Tensor, Tensor> lora_mlp_activate_backward(const Tensor& dh, const std::optional<Tensor>& gate,
                                                      const Tensor& up, const std::optional<Tensor>& seed,
                                                      const std::string& activation, const std::string& halves,
                                                      double p) {
  return gradients(Rows(gate, up, seed, activation, halves, p), matrix(dh, "the gradient of h"), gate, up, false);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_mlp_down_backward(
    const Tensor& g, const Tensor& w, const Tensor& a, const Tensor& b, const Tensor& low,
    const std::optional<Tensor>& seed, const std::vector<int64_t>& ranks, const std::vector<double>& scalings,
    const std::vector<double>& ps, bool transposed, const std::vector<bool>& needs,
    const std::optional<Tensor>& packed, const std::optional<Tensor>& gate, const Tensor& up,
    const std::optional<Tensor>& h_seed, const std::string& activation, const std::string& halves, double p) {
  STD_TORCH_CHECK(needs.size() == 3, "given: needs of another length\nneeded: bias, A, B of down\n"
                                     "do: call peft_fast.ops.lora_mlp and let autograd run the backward");
  const Rows rows(gate, up, h_seed, activation, halves, p);
  std::tuple<Tensor, Tensor> found;
  // h has this shape; dA reads its values, once they lie where dh was
  const Tensor shape = torch::stable::narrow(const_cast<Tensor&>(up), 1, 0, rows.I());
  auto [dh, da, dbs, dbiases] = group_backward(
      {g}, shape, {w}, a, {b}, low, seed, {int64_t(ranks.size())}, ranks, scalings, ps, {transposed}, true, {needs[0]},
      needs[1], {needs[2]}, false, {packed}, [&](const Tensor& dh) {
        const Matrix m = matrix(dh, "the gradient of h");
        found = gradients(rows, m, gate, up, needs[1]);
        return m.source;
      });
  return {std::get<0>(found), std::get<1>(found), da, dbs[0], dbiases[0]};
}

}  // namespace peft_fast
