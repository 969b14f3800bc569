// Cuts in a backward walk: rows less nonnegative multiples of constraints that every execution meets.
#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include "cpu/cut_loops.h"
#include "engine/backward.h"
#include "ops/testing.h"

namespace pycert::engine {

namespace {

// What the rows of a walk take from the cuts, and where the charges and centres are found.
struct Taking {
  Cuts cuts;
  Tensor sample, table;                    // [Q]
  Tensor value_size, activation_size;      // [B, n], or undefined: no charges
  Tensor value_centre, activation_centre;  // [B, n], or undefined
  double of_sums = 0, of_rounding = 0;
};

template <typename T>
const T* pointer(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}

template <typename T>
cpu::CutTable<T> table_of(const Taking& t, int64_t n) {
  return {t.cuts.index.const_data_ptr<int64_t>(),
          t.cuts.of_value.const_data_ptr<T>(),
          t.cuts.of_activation.const_data_ptr<T>(),
          t.cuts.constant.const_data_ptr<T>(),
          t.sample.const_data_ptr<int64_t>(),
          t.table.const_data_ptr<int64_t>(),
          t.cuts.index.size(1),
          t.cuts.index.size(2),
          n};
}

using Taken = std::array<Tensor, 3>;  // on the activation and on the value [Q, n], sums [3, Q] double

Taken take_on_cpu(const Taking& t, const Tensor& rows, const Tensor& multipliers) {
  Tensor y = at::empty_like(rows), x = at::empty_like(rows);
  Tensor sums = at::empty({3, rows.size(0)}, rows.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "take_cuts_off", [&] {
    cpu::take_cuts_off<scalar_t>({table_of<scalar_t>(t, rows.size(1)), multipliers.const_data_ptr<scalar_t>(),
                                  rows.const_data_ptr<scalar_t>(), y.data_ptr<scalar_t>(), x.data_ptr<scalar_t>(),
                                  sums.data_ptr<double>(), pointer<scalar_t>(t.value_size),
                                  pointer<scalar_t>(t.activation_size), pointer<scalar_t>(t.value_centre),
                                  pointer<scalar_t>(t.activation_centre), t.of_sums, t.of_rounding, rows.size(0)});
  });
  return {y, x, sums};
}

// The same by gathers and scatters, for other devices.
Taken take_anywhere(const Taking& t, const Tensor& rows, const Tensor& multipliers) {
  const auto of_rows = [&](const Tensor& u) { return u.index_select(0, t.sample); };
  const Tensor rho = multipliers.index_select(0, t.table).to(at::kDouble);
  const Tensor index = of_rows(t.cuts.index).flatten(1), term = rho * of_rows(t.cuts.constant);
  Tensor constant = -term.sum(1), magnitude = term.abs().sum(1), error = at::zeros_like(constant);
  const auto side = [&](const Tensor& had, const Tensor& coefficients, const Tensor& size, const Tensor& centre) {
    const Tensor terms = (rho.unsqueeze(2) * of_rows(coefficients)).flatten(1);
    const Tensor none = at::zeros(rows.sizes(), terms.options()), wide = had.to(at::kDouble);
    const Tensor sum = none.scatter_add(1, index, terms), sizes = none.scatter_add(1, index, terms.abs());
    const Tensor out = (wide - sum).to(rows.scalar_type());
    if (size.defined()) {
      const Tensor charge =
          ((wide.abs() + sizes) * t.of_sums + out.abs().to(at::kDouble) * t.of_rounding) * of_rows(size);
      error = error + at::where(sizes.eq(0), 0.0, charge).sum(1);
    }
    if (centre.defined()) {
      const Tensor c = of_rows(centre).to(at::kDouble);
      constant = constant - (sum * c).sum(1);
      magnitude = magnitude + (sizes * c.abs()).sum(1);
    }
    return out;
  };
  const Tensor y = side(rows, t.cuts.of_activation, t.activation_size, t.activation_centre);
  const Tensor x = side(at::zeros_like(rows), t.cuts.of_value, t.value_size, t.value_centre);
  return {y, x, at::stack({constant, magnitude, error + magnitude * t.of_sums})};
}

Taken take(const Taking& t, const Tensor& rows, const Tensor& multipliers) {
  return rows.is_cpu() ? take_on_cpu(t, rows, multipliers) : take_anywhere(t, rows, multipliers);
}

Tensor multiplier_gradient(const Taking& t, const Tensor& y, const Tensor& x, const Tensor& of_constant,
                           int64_t tables) {
  const int64_t count = t.cuts.index.size(1);
  Tensor grad = at::zeros({tables, count}, y.options());
  if (y.is_cpu()) {
    AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "cuts_backward", [&] {
      cpu::cuts_backward<scalar_t>(table_of<scalar_t>(t, y.size(1)), y.size(0), y.const_data_ptr<scalar_t>(),
                                   x.const_data_ptr<scalar_t>(), of_constant.const_data_ptr<double>(),
                                   grad.data_ptr<scalar_t>());
    });
    return grad;
  }
  const auto of_rows = [&](const Tensor& u) { return u.index_select(0, t.sample); };
  const Tensor index = of_rows(t.cuts.index).flatten(1);
  const auto picked = [&](const Tensor& g, const Tensor& coefficients) {
    return (g.gather(1, index).view({g.size(0), count, -1}) * of_rows(coefficients)).sum(2);
  };
  const Tensor constant = of_rows(t.cuts.constant) * of_constant.to(y.scalar_type()).unsqueeze(1);
  return grad.index_add(0, t.table, -(picked(y, t.cuts.of_activation) + picked(x, t.cuts.of_value) + constant));
}

struct CutFunction : torch::autograd::Function<CutFunction> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& rows,
                                                const Tensor& multipliers, const Taking& t) {
    at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({t.cuts.index, t.cuts.of_value, t.cuts.of_activation, t.cuts.constant, t.sample, t.table,
                            t.value_centre, t.activation_centre});
    ctx->saved_data["tables"] = multipliers.size(0);
    const Taken out = take(t, rows, multipliers);
    return {out[0], out[1], out[2]};
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    check_first_order(grads, "back-substitution");
    const auto s = ctx->get_saved_variables();
    const Taking t{{s[0], s[1], s[2], s[3]}, s[4], s[5], {}, {}, s[6], s[7]};
    Tensor to_multipliers;
    if (ctx->needs_input_grad(1)) {
      const Tensor of_constant = grads[2].select(0, 0).contiguous();
      const auto with_centre = [&](const Tensor& grad, const Tensor& centre) {
        if (!centre.defined()) return grad.contiguous();
        const Tensor more = of_constant.unsqueeze(1) * centre.index_select(0, t.sample);
        return (grad + more.to(grad.scalar_type())).contiguous();
      };
      to_multipliers =
          multiplier_gradient(t, with_centre(grads[0], t.activation_centre), with_centre(grads[1], t.value_centre),
                              of_constant, ctx->saved_data["tables"].toInt());
    }
    return {grads[0], to_multipliers, Tensor()};
  }
};

}  // namespace

// A cut is at least 0 on every execution: a lower bound of the rows less multiples of cuts is one of the rows.
Rows Walk::take_cuts_off(int64_t i, Rows rows) {
  if (slopes_ == nullptr || stop_at_activations_) return rows;
  const auto& cuts = slopes_->cuts != nullptr ? *slopes_->cuts : context_.options().cuts;
  const auto found = cuts.find(i);
  if (found == cuts.end()) return rows;
  const bool measuring = slopes_->measured != nullptr;
  if (!measuring && slopes_->multipliers.count(i) == 0) return rows;
  rows = own(i, dense(i, std::move(rows)));
  const Tensor flat = rows.data.flatten(1).contiguous();
  if (measuring) {
    (*slopes_->measured)[i] = flat.detach().abs().mean(1, true);
    return rows;
  }
  const int64_t value = context_.program().node(i).inputs[0];
  Taking t{found->second, index_.sample, slopes_->row, {}, {}, {}, {}};
  if (context_.sound() && enabled(Term::BacksubOwn)) {
    t.value_size = size_of(value).contiguous();
    t.activation_size = size_of(i).contiguous();
    // All cuts of a sample may name one neuron, several times each.
    const double terms = double(t.cuts.index[0].numel());
    t.of_sums = gamma(terms + 16, at::kDouble) * (1 + 1e-6);
    t.of_rounding = context_.own_gamma(1) * (1 + 1e-6);
    underflow(i, 1);
    underflow(value, 1);
  }
  if (centred_) {
    t.value_centre = context_.centre(value).contiguous();
    t.activation_centre = context_.centre(i).contiguous();
  }
  const Tensor multipliers = slopes_->multipliers.at(i).contiguous();
  std::array<Tensor, 3> taken;
  if (any_needs_grad(flat, multipliers)) {
    const auto out = CutFunction::apply(flat, multipliers, t);
    taken = {out[0], out[1], out[2]};
  } else {
    at::AutoDispatchBelowADInplaceOrView below;
    taken = take(t, flat, multipliers);
  }
  sums_ = sums_ + at::cat({taken[2].narrow(0, 0, 1), taken[2].narrow(0, 1, 2).detach()});
  terms_ += double(t.cuts.index.size(1)) + 2.0 * double(flat.size(1));
  rows.data = taken[0];
  Rows before;
  before.data = taken[1];
  give(value, std::move(before));
  return rows;
}

}  // namespace pycert::engine
