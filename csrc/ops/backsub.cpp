#include "ops/backsub.h"

#include <ATen/Dispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/device.h"

namespace pycert {

using at::IntArrayRef;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace {

using Ints = std::vector<int64_t>;

Ints encode(const Window& w) { return {w.dense, w.height, w.width, w.stride_y, w.offset_y, w.stride_x, w.offset_x}; }
Ints encode(const Extent& e) { return {e.channels, e.height, e.width}; }

Window window_of(IntArrayRef v) {
  TORCH_CHECK_VALUE(v.size() == 7, "back-substitution: a window is 7 integers, got ", v.size());
  return {v[0] != 0, v[1], v[2], v[3], v[4], v[5], v[6]};
}
Extent extent_of(IntArrayRef v) {
  TORCH_CHECK_VALUE(v.size() == 3, "back-substitution: an extent is 3 integers, got ", v.size());
  return {v[0], v[1], v[2]};
}

int64_t row_size(const Window& w, const Extent& e) { return w.dense ? e.numel() : e.channels * w.height * w.width; }

// Contiguous index tensors and the kernel's view of them.
struct Map {
  Tensor source, sample, position;
  cpu::RowMap map;
  Map(const OptionalTensor& s, int64_t negative_from, const Tensor& of_sample, const OptionalTensor& at)
      : source(s.has_value() ? s->contiguous() : Tensor()),
        sample(of_sample.contiguous()),
        position(at.has_value() ? at->contiguous() : Tensor()) {
    map.count = sample.size(0);
    map.source = source.defined() ? source.const_data_ptr<int64_t>() : nullptr;
    map.negative_from = negative_from;
    map.sample = sample.const_data_ptr<int64_t>();
    map.position = position.defined() ? position.const_data_ptr<int64_t>() : nullptr;
  }
};

// Shape of a batch of rows in a layout.
Ints rows_shape(int64_t count, const Window& w, const Extent& e) {
  if (!w.dense) return {count, e.channels, w.height, w.width};
  return {count, e.channels, e.height, e.width};
}

void check_rows(const Tensor& rows, const Map& m, const Window& w, const Extent& e, const char* op) {
  check_floating(rows, op, "rows");
  const int64_t size = row_size(w, e), count = rows.size(0);
  TORCH_CHECK_VALUE(rows.numel() == count * size, op, ": rows must hold ", size, " coefficients each, got shape ",
                    rows.sizes());
  TORCH_CHECK_VALUE(m.source.defined() || count == m.map.count, op, ": ", m.map.count, " rows expected, got ", count);
  TORCH_CHECK_VALUE(w.dense || m.position.defined(), op, ": windows need the rows' positions");
}

template <typename T>
const T* pointer(const Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}

Tensor contiguous(const OptionalTensor& t) { return t.has_value() ? t->contiguous() : Tensor(); }

std::tuple<Tensor, Tensor> relax_on_device(const Tensor& rows, const OptionalTensor& source, int64_t negative_from,
                                           const Tensor& sample, const OptionalTensor& position, IntArrayRef window,
                                           IntArrayRef extent, const Tensor& lower_slope,
                                           const OptionalTensor& lower_intercept, const Tensor& upper_slope,
                                           const Tensor& upper_intercept, const OptionalTensor& bias,
                                           const OptionalTensor& charge, const OptionalTensor& lower_row) {
  const Map m(source, negative_from, sample, position);
  const Window w = window_of(window);
  const Extent e = extent_of(extent);
  const Tensor r = rows.contiguous(), lower_at = contiguous(lower_row);
  check_rows(r, m, w, e, "relax_rows");
  const Tensor ls = lower_slope.contiguous(), us = upper_slope.contiguous(), ui = upper_intercept.contiguous();
  const Tensor li = contiguous(lower_intercept), b = contiguous(bias), c = contiguous(charge);
  Tensor out = at::empty(rows_shape(m.map.count, w, e), r.options());
  Tensor sums = at::zeros({3, m.map.count}, r.options().dtype(at::kDouble));
  double* s = sums.data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(r.scalar_type(), "relax_rows", [&] {
    cpu::RelaxArgs<scalar_t> a{r.const_data_ptr<scalar_t>(),
                               out.data_ptr<scalar_t>(),
                               m.map,
                               w,
                               e,
                               ls.const_data_ptr<scalar_t>(),
                               us.const_data_ptr<scalar_t>(),
                               pointer<scalar_t>(li),
                               ui.const_data_ptr<scalar_t>(),
                               pointer<int64_t>(lower_at),
                               pointer<scalar_t>(b),
                               pointer<scalar_t>(c),
                               s,
                               c.defined() ? s + m.map.count : nullptr,
                               c.defined() ? s + 2 * m.map.count : nullptr};
    kernels<scalar_t>(r)->relax(a);
  });
  return {out, sums};
}

// The lines of an activation, with what rows that go through it meet besides, contiguous.
struct LineTensors {
  Tensor lower_slope, lower_intercept, upper_slope, upper_intercept, bias, charge, lower_row;

  // `sums` [3, Q] are the row's constants, their magnitudes and errors.
  template <typename T>
  cpu::RelaxArgs<T> arguments(const Tensor& rows, const Map& m, const Window& w, const Extent& e, Tensor& sums) const {
    double* s = sums.data_ptr<double>();
    const int64_t count = m.map.count;
    return {rows.const_data_ptr<T>(),
            nullptr,
            m.map,
            w,
            e,
            lower_slope.const_data_ptr<T>(),
            upper_slope.const_data_ptr<T>(),
            pointer<T>(lower_intercept),
            upper_intercept.const_data_ptr<T>(),
            pointer<int64_t>(lower_row),
            pointer<T>(bias),
            pointer<T>(charge),
            s,
            charge.defined() ? s + count : nullptr,
            charge.defined() ? s + 2 * count : nullptr};
  }
};

// Where rows are concretised: at boxes [B, n] (norm 0), or at balls of centre and radius.
template <typename T>
void set_end(cpu::ConcretizeArgs<T>& end, const Tensor& first, const Tensor& second, int64_t norm, Tensor& out) {
  end.lower = end.centre = pointer<T>(first);
  end.upper = end.eps = pointer<T>(second);
  end.norm = int(norm);
  end.value = out.data_ptr<double>();
  end.magnitude = end.value + out.size(1);
}

std::tuple<Tensor, Tensor> relax_product_on_device(const Tensor& rows, const OptionalTensor& source,
                                                   int64_t negative_from, const Tensor& sample, IntArrayRef extent,
                                                   const Tensor& lower_slope, const OptionalTensor& lower_intercept,
                                                   const Tensor& upper_slope, const Tensor& upper_intercept,
                                                   const OptionalTensor& bias, const OptionalTensor& charge,
                                                   const OptionalTensor& lower_row, const Tensor& weight,
                                                   const OptionalTensor& first, const OptionalTensor& second,
                                                   int64_t norm) {
  const Map m(source, negative_from, sample, {});
  const Extent e = extent_of(extent);
  const Tensor r = rows.contiguous(), w = weight.contiguous();
  check_rows(r, m, Window(), e, "relax_product");
  check_same(r, w, "relax_product", "rows", "weight");
  TORCH_CHECK_VALUE(w.dim() == 2 && w.size(0) == e.numel(), "relax_product: weight must be [", e.numel(),
                    ", columns], got ", w.sizes());
  TORCH_CHECK(has_relax_product(r), "relax_product: no kernel of its own on ", r.device());
  const LineTensors lines{
      lower_slope.contiguous(), contiguous(lower_intercept), upper_slope.contiguous(), upper_intercept.contiguous(),
      contiguous(bias),         contiguous(charge),          contiguous(lower_row)};
  const Tensor p = contiguous(first), q = contiguous(second);
  const int64_t count = m.map.count, columns = w.size(1), places = (columns + cpu::kEndColumns - 1) / cpu::kEndColumns;
  const auto doubles = r.options().dtype(at::kDouble);
  Tensor sums = at::zeros({3, count}, doubles);
  Tensor out = p.defined() ? at::empty({2, count}, doubles) : at::empty({count, columns}, r.options());
  Tensor partial = p.defined() ? at::empty({3, places, count}, doubles) : Tensor();
  AT_DISPATCH_FLOATING_TYPES(r.scalar_type(), "relax_product", [&] {
    cpu::RelaxProductArgs<scalar_t> a{};
    a.relax = lines.arguments<scalar_t>(r, m, Window(), e, sums);
    a.weight = w.const_data_ptr<scalar_t>();
    a.columns = columns;
    if (p.defined()) {
      set_end(a.end, p, q, norm, out);
      a.partial = partial.data_ptr<double>();
    } else {
      a.out = out.data_ptr<scalar_t>();
    }
    kernels<scalar_t>(r)->relax_product(a);
  });
  return {out, sums};
}

std::tuple<Tensor, Tensor> relax_convolution_on_device(
    const Tensor& rows, const OptionalTensor& source, int64_t negative_from, const Tensor& sample,
    const OptionalTensor& position, IntArrayRef window, IntArrayRef extent, const Tensor& lower_slope,
    const OptionalTensor& lower_intercept, const Tensor& upper_slope, const Tensor& upper_intercept,
    const OptionalTensor& bias, const OptionalTensor& charge, const OptionalTensor& lower_row, const Tensor& weight,
    IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, int64_t groups, IntArrayRef to_window,
    IntArrayRef to_extent, const OptionalTensor& first, const OptionalTensor& second, int64_t norm) {
  const Map m(source, negative_from, sample, position);
  const Window from = window_of(window), to = window_of(to_window);
  const Extent e = extent_of(extent), after = extent_of(to_extent);
  const Tensor r = rows.contiguous(), w = weight.contiguous();
  check_rows(r, m, from, e, "relax_convolution");
  check_same(r, w, "relax_convolution", "rows", "weight");
  TORCH_CHECK_VALUE(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2,
                    "relax_convolution: stride, padding and dilation are pairs");
  TORCH_CHECK_VALUE(w.dim() == 4 && w.size(0) == e.channels && groups > 0 && w.size(1) * groups == after.channels,
                    "relax_convolution: weight must be [", e.channels, ", ", after.channels, " / groups, y, x], got ",
                    w.sizes());
  TORCH_CHECK_VALUE(to.dense || m.position.defined(), "relax_convolution: windows need the rows' positions");
  TORCH_CHECK(has_relax_product(r), "relax_convolution: no kernel of its own on ", r.device());
  const LineTensors lines{
      lower_slope.contiguous(), contiguous(lower_intercept), upper_slope.contiguous(), upper_intercept.contiguous(),
      contiguous(bias),         contiguous(charge),          contiguous(lower_row)};
  const Tensor p = contiguous(first), q = contiguous(second);
  const int64_t count = m.map.count;
  const auto doubles = r.options().dtype(at::kDouble);
  Tensor sums = at::zeros({3, count}, doubles), partial;
  Tensor out = p.defined() ? at::empty({2, count}, doubles) : at::empty(rows_shape(count, to, after), r.options());
  AT_DISPATCH_FLOATING_TYPES(r.scalar_type(), "relax_convolution", [&] {
    cpu::RelaxConvolutionArgs<scalar_t> a{};
    a.relax = lines.arguments<scalar_t>(r, m, from, e, sums);
    a.weight = w.const_data_ptr<scalar_t>();
    a.groups = groups;
    std::tie(a.kernel_y, a.kernel_x) = std::tuple(w.size(2), w.size(3));
    std::tie(a.stride_y, a.stride_x) = std::tuple(stride[0], stride[1]);
    std::tie(a.padding_y, a.padding_x) = std::tuple(padding[0], padding[1]);
    std::tie(a.dilation_y, a.dilation_x) = std::tuple(dilation[0], dilation[1]);
    a.end.window = to;
    a.end.extent = after;
    const OnDevice<scalar_t> found = kernels<scalar_t>(r);
    if (p.defined()) {
      set_end(a.end, p, q, norm, out);
      partial = at::empty({(*found).relax_convolution_scratch(a)}, doubles);
      a.partial = partial.data_ptr<double>();
    } else {
      a.out = out.data_ptr<scalar_t>();
    }
    (*found).relax_convolution(a);
  });
  return {out, sums};
}

Tensor dot_on_device(const Tensor& rows, const OptionalTensor& source, int64_t negative_from, const Tensor& sample,
                     const OptionalTensor& position, IntArrayRef window, IntArrayRef extent, const OptionalTensor& bias,
                     const OptionalTensor& charge) {
  const Map m(source, negative_from, sample, position);
  const Window w = window_of(window);
  const Extent e = extent_of(extent);
  const Tensor r = rows.contiguous(), b = contiguous(bias), c = contiguous(charge);
  check_rows(r, m, w, e, "dot_rows");
  Tensor sums = at::zeros({3, m.map.count}, r.options().dtype(at::kDouble));
  double* s = sums.data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(r.scalar_type(), "dot_rows", [&] {
    cpu::DotArgs<scalar_t> a{
        r.const_data_ptr<scalar_t>(), m.map, w, e, pointer<scalar_t>(b), pointer<scalar_t>(c), s, s + m.map.count,
        s + 2 * m.map.count};
    kernels<scalar_t>(r)->dot(a);
  });
  return sums;
}

Tensor relayout_on_device(const Tensor& rows, const OptionalTensor& source, int64_t negative_from, const Tensor& sample,
                          const OptionalTensor& position, IntArrayRef from, IntArrayRef to, IntArrayRef extent) {
  const Map m(source, negative_from, sample, position);
  const Window f = window_of(from), t = window_of(to);
  const Extent e = extent_of(extent);
  const Tensor r = rows.contiguous();
  check_rows(r, m, f, e, "relayout_rows");
  Tensor out = at::empty(rows_shape(m.map.count, t, e), r.options());
  AT_DISPATCH_FLOATING_TYPES(r.scalar_type(), "relayout_rows", [&] {
    kernels<scalar_t>(r)->relayout({r.const_data_ptr<scalar_t>(), m.map, f, t, e, out.data_ptr<scalar_t>(), false});
  });
  return out;
}

void add_on_device(Tensor& out, const Tensor& rows, const OptionalTensor& source, int64_t negative_from,
                   const Tensor& sample, const OptionalTensor& position, IntArrayRef from, IntArrayRef to,
                   IntArrayRef extent) {
  const Map m(source, negative_from, sample, position);
  const Window f = window_of(from), t = window_of(to);
  const Extent e = extent_of(extent);
  const Tensor r = rows.contiguous();
  check_rows(r, m, f, e, "add_rows");
  check_rows(out, Map({}, INT64_MAX, sample, position), t, e, "add_rows");
  check_same(r, out, "add_rows", "rows", "out");
  TORCH_CHECK_VALUE(out.is_contiguous(), "add_rows: out must be contiguous");
  AT_DISPATCH_FLOATING_TYPES(r.scalar_type(), "add_rows", [&] {
    kernels<scalar_t>(r)->relayout({r.const_data_ptr<scalar_t>(), m.map, f, t, e, out.data_ptr<scalar_t>(), true});
  });
}

Tensor concretize_on_device(const Tensor& rows, const OptionalTensor& source, int64_t negative_from,
                            const Tensor& sample, const OptionalTensor& position, IntArrayRef window,
                            IntArrayRef extent, const Tensor& first, const Tensor& second, int64_t norm) {
  const Map m(source, negative_from, sample, position);
  const Window w = window_of(window);
  const Extent e = extent_of(extent);
  const Tensor r = rows.contiguous(), a = first.contiguous(), b = second.contiguous();
  check_rows(r, m, w, e, "concretize");
  check_same(r, a, "concretize", "rows", "region");
  Tensor out = at::empty({2, m.map.count}, r.options().dtype(at::kDouble));
  double* o = out.data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(r.scalar_type(), "concretize", [&] {
    const scalar_t *p = a.const_data_ptr<scalar_t>(), *q = b.const_data_ptr<scalar_t>();
    cpu::ConcretizeArgs<scalar_t> args{r.const_data_ptr<scalar_t>(),
                                       m.map,
                                       w,
                                       e,
                                       norm == 0 ? p : nullptr,
                                       norm == 0 ? q : nullptr,
                                       norm == 0 ? nullptr : p,
                                       norm == 0 ? nullptr : q,
                                       int(norm),
                                       o,
                                       o + m.map.count};
    kernels<scalar_t>(r)->concretize(args);
  });
  return out;
}

// Rows sorted by group, and where each group's begin; those of group -1, which are left out, stand before the first.
std::pair<Tensor, Tensor> by_group(const Tensor& group, int64_t groups) {
  const Tensor order = at::argsort(group, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  if (group.is_cpu()) return {order, at::bincount(group + 1, {}, groups + 1).cumsum(0)};
  // on other devices counting would wait for the largest value
  return {order, at::searchsorted(group.index_select(0, order), at::arange(-1, groups, group.options()),
                                  /*out_int32=*/false, /*right=*/true)};
}

// Every row a group of its own.
std::pair<Tensor, Tensor> by_row(const Tensor& sample) {
  const Tensor order = at::arange(sample.size(0) + 1, sample.options());
  return {order, order};
}

// `wanted`: gradients of the rows, of the lower line, of the upper line.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> relax_backward_on_device(
    const Tensor& grad_out, const Tensor& grad_sums, const Tensor& rows, const OptionalTensor& source,
    int64_t negative_from, const Tensor& sample, const OptionalTensor& position, IntArrayRef window, IntArrayRef extent,
    const Tensor& lower_slope, const OptionalTensor& lower_intercept, const Tensor& upper_slope,
    const Tensor& upper_intercept, const OptionalTensor& bias, const OptionalTensor& lower_row, IntArrayRef wanted) {
  const Map m(source, negative_from, sample, position);
  TORCH_CHECK_VALUE(wanted.size() == 3, "relax_rows_backward: wanted is 3 flags, got ", wanted.size());
  const bool of_rows = wanted[0] != 0, of_lower = wanted[1] != 0, of_upper = wanted[2] != 0;
  TORCH_CHECK_VALUE(!of_rows || (!source.has_value() && negative_from >= m.map.count),
                    "relax_rows_backward: rows with a source have no gradient");
  TORCH_CHECK_VALUE(!of_upper || !lower_row.has_value(),
                    "relax_rows_backward: with lower_row there are no gradients of the upper line");
  const Tensor r = rows.contiguous(), g = grad_out.contiguous(), gc = grad_sums.select(0, 0).contiguous();
  const Tensor ls = lower_slope.contiguous(), us = upper_slope.contiguous(), ui = upper_intercept.contiguous();
  const Tensor li = contiguous(lower_intercept), b = contiguous(bias), lower_at = contiguous(lower_row);
  const auto [order, starts] = !of_lower && !of_upper ? by_row(m.sample)
                               : lower_at.defined()   ? by_group(lower_at, ls.size(0))
                                                      : by_group(m.sample, ls.size(0));
  const auto zeros = [](bool is_wanted, const Tensor& like) {
    return is_wanted && like.defined() ? at::zeros_like(like) : Tensor();
  };
  Tensor grad_rows = of_rows ? at::empty_like(r) : Tensor(), grad_ls = zeros(of_lower, ls),
         grad_us = zeros(of_upper, us), grad_ui = zeros(of_upper, ui), grad_li = zeros(of_lower, li);
  const auto into = [](Tensor& t, auto* as) -> decltype(as) {
    using T = std::remove_pointer_t<decltype(as)>;
    return t.defined() ? t.data_ptr<T>() : nullptr;
  };
  AT_DISPATCH_FLOATING_TYPES(r.scalar_type(), "relax_rows_backward", [&] {
    scalar_t* as = nullptr;
    cpu::RelaxBackwardArgs<scalar_t> a{r.const_data_ptr<scalar_t>(),
                                       g.const_data_ptr<scalar_t>(),
                                       gc.const_data_ptr<double>(),
                                       m.map,
                                       window_of(window),
                                       extent_of(extent),
                                       starts.size(0) - 1,
                                       order.const_data_ptr<int64_t>(),
                                       starts.const_data_ptr<int64_t>(),
                                       ls.const_data_ptr<scalar_t>(),
                                       us.const_data_ptr<scalar_t>(),
                                       pointer<scalar_t>(li),
                                       ui.const_data_ptr<scalar_t>(),
                                       pointer<int64_t>(lower_at),
                                       pointer<scalar_t>(b),
                                       into(grad_rows, as),
                                       into(grad_ls, as),
                                       into(grad_li, as),
                                       into(grad_us, as),
                                       into(grad_ui, as)};
    kernels<scalar_t>(r)->relax_backward(a);
  });
  return {grad_rows, grad_ls, grad_li, grad_us, grad_ui};
}

std::tuple<Tensor, Tensor, Tensor> concretize_backward_on_device(const Tensor& grad, const Tensor& rows,
                                                                 const Tensor& sample, const OptionalTensor& position,
                                                                 IntArrayRef window, IntArrayRef extent,
                                                                 const Tensor& first, const Tensor& second,
                                                                 int64_t norm, bool of_region) {
  const Map m({}, INT64_MAX, sample, position);
  const Tensor r = rows.contiguous(), a = first.contiguous(), b = second.contiguous();
  const Tensor gv = grad.select(0, 0).contiguous();
  const bool box = of_region && norm == 0, ball = of_region && norm != 0;
  const auto [order, starts] = of_region ? by_group(m.sample, a.size(0)) : by_row(m.sample);
  Tensor grad_rows = at::empty_like(r), grad_first, grad_second;
  if (of_region) {
    grad_first = at::zeros_like(a);
    grad_second = norm == 0 ? at::zeros_like(b) : at::zeros_like(b, b.options().dtype(at::kDouble));
  }
  AT_DISPATCH_FLOATING_TYPES(r.scalar_type(), "concretize_backward", [&] {
    const scalar_t *p = a.const_data_ptr<scalar_t>(), *q = b.const_data_ptr<scalar_t>();
    cpu::ConcretizeBackwardArgs<scalar_t> args{r.const_data_ptr<scalar_t>(),
                                               gv.const_data_ptr<double>(),
                                               m.map,
                                               window_of(window),
                                               extent_of(extent),
                                               starts.size(0) - 1,
                                               order.const_data_ptr<int64_t>(),
                                               starts.const_data_ptr<int64_t>(),
                                               norm == 0 ? p : nullptr,
                                               norm == 0 ? q : nullptr,
                                               norm == 0 ? nullptr : p,
                                               norm == 0 ? nullptr : q,
                                               int(norm),
                                               grad_rows.data_ptr<scalar_t>(),
                                               box ? grad_first.data_ptr<scalar_t>() : nullptr,
                                               box ? grad_second.data_ptr<scalar_t>() : nullptr,
                                               ball ? grad_first.data_ptr<scalar_t>() : nullptr,
                                               ball ? grad_second.data_ptr<double>() : nullptr};
    kernels<scalar_t>(r)->concretize_backward(args);
  });
  return {grad_rows, grad_first, of_region ? grad_second.to(b.scalar_type()) : Tensor()};
}

Tensor relayout_backward_on_device(const Tensor& grad_out, int64_t table_rows, const OptionalTensor& source,
                                   int64_t negative_from, const Tensor& sample, const OptionalTensor& position,
                                   IntArrayRef from, IntArrayRef to, IntArrayRef extent) {
  const Map m(source, negative_from, sample, position);
  const Window f = window_of(from);
  const Extent e = extent_of(extent);
  const Tensor g = grad_out.contiguous();
  Tensor grad_rows = at::zeros(rows_shape(table_rows, f, e), g.options());
  AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "relayout_rows_backward", [&] {
    kernels<scalar_t>(g)->relayout_backward(
        {g.const_data_ptr<scalar_t>(), m.map, f, window_of(to), e, grad_rows.data_ptr<scalar_t>(), table_rows});
  });
  return grad_rows;
}

template <typename Function>
auto handle(const char* name, Function*) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Function>();
}
#define PYCERT_HANDLE(name, function) static const auto op = handle("pycert::" name, function)

// ---- autograd ----------------------------------------------------------------------------------------------------

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Rows with a source or a sign have no gradient themselves; a bias never has one.
struct RelaxFunction : torch::autograd::Function<RelaxFunction> {
  static variable_list forward(AutogradContext* ctx, const Tensor& rows, const OptionalTensor& source,
                               int64_t negative_from, const Tensor& sample, const OptionalTensor& position,
                               IntArrayRef window, IntArrayRef extent, const Tensor& lower_slope,
                               const OptionalTensor& lower_intercept, const Tensor& upper_slope,
                               const Tensor& upper_intercept, const OptionalTensor& bias, const OptionalTensor& charge,
                               const OptionalTensor& lower_row) {
    at::AutoDispatchBelowADInplaceOrView below;
    PYCERT_HANDLE("relax_rows", relax_on_device);
    auto [out, sums] = op.call(rows, source, negative_from, sample, position, window, extent, lower_slope,
                               lower_intercept, upper_slope, upper_intercept, bias, charge, lower_row);
    ctx->save_for_backward({rows, value_or_empty(source), sample, value_or_empty(position), lower_slope,
                            value_or_empty(lower_intercept), upper_slope, upper_intercept, value_or_empty(bias),
                            value_or_empty(lower_row), sums});
    ctx->saved_data["negative_from"] = negative_from;
    ctx->saved_data["window"] = window.vec();
    ctx->saved_data["extent"] = extent.vec();
    ctx->saved_data["wanted"] =
        Ints{rows.requires_grad(), lower_slope.requires_grad() || needs_grad(value_or_empty(lower_intercept)),
             upper_slope.requires_grad() || upper_intercept.requires_grad()};
    return {out, sums};
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    PYCERT_HANDLE("relax_rows_backward", relax_backward_on_device);
    const auto s = ctx->get_saved_variables();
    check_first_order(grads, "back-substitution", s);
    const Tensor& sums = s[10];
    const auto shape = rows_shape(sums.size(1), window_of(ctx->saved_data["window"].toIntVector()),
                                  extent_of(ctx->saved_data["extent"].toIntVector()));
    const Tensor grad_out = grads[0].defined() ? grads[0] : at::zeros(shape, s[0].options());
    const Tensor grad_sums = grads[1].defined() ? grads[1] : at::zeros_like(sums);
    auto [rows, ls, li, us, ui] = op.call(
        grad_out, grad_sums, s[0], optional_of(s[1]), ctx->saved_data["negative_from"].toInt(), s[2], optional_of(s[3]),
        ctx->saved_data["window"].toIntVector(), ctx->saved_data["extent"].toIntVector(), s[4], optional_of(s[5]), s[6],
        s[7], optional_of(s[8]), optional_of(s[9]), ctx->saved_data["wanted"].toIntVector());
    const Tensor none;
    return {rows, none, none, none, none, none, none, ls, li, us, ui, none, none, none};
  }
};

struct ConcretizeFunction : torch::autograd::Function<ConcretizeFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const Tensor& sample, const OptionalTensor& position,
                        IntArrayRef window, IntArrayRef extent, const Tensor& first, const Tensor& second,
                        int64_t norm) {
    at::AutoDispatchBelowADInplaceOrView below;
    PYCERT_HANDLE("concretize_rows", concretize_on_device);
    const Tensor out = op.call(rows, {}, INT64_MAX, sample, position, window, extent, first, second, norm);
    ctx->save_for_backward({rows, sample, value_or_empty(position), first, second});
    ctx->saved_data["window"] = window.vec();
    ctx->saved_data["extent"] = extent.vec();
    ctx->saved_data["norm"] = norm;
    ctx->saved_data["of_region"] = first.requires_grad() || second.requires_grad();
    return out;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    PYCERT_HANDLE("concretize_rows_backward", concretize_backward_on_device);
    const auto s = ctx->get_saved_variables();
    check_first_order(grads, "back-substitution", s);
    auto [rows, first, second] =
        op.call(grads[0], s[0], s[1], optional_of(s[2]), ctx->saved_data["window"].toIntVector(),
                ctx->saved_data["extent"].toIntVector(), s[3], s[4], ctx->saved_data["norm"].toInt(),
                ctx->saved_data["of_region"].toBool());
    return {rows, Tensor(), Tensor(), Tensor(), Tensor(), first, second, Tensor()};
  }
};

struct RelayoutFunction : torch::autograd::Function<RelayoutFunction> {
  static Tensor forward(AutogradContext* ctx, const Tensor& rows, const OptionalTensor& source, int64_t negative_from,
                        const Tensor& sample, const OptionalTensor& position, IntArrayRef from, IntArrayRef to,
                        IntArrayRef extent) {
    at::AutoDispatchBelowADInplaceOrView below;
    PYCERT_HANDLE("relayout_rows", relayout_on_device);
    ctx->save_for_backward({value_or_empty(source), sample, value_or_empty(position)});
    ctx->saved_data["from"] = from.vec();
    ctx->saved_data["to"] = to.vec();
    ctx->saved_data["extent"] = extent.vec();
    ctx->saved_data["negative_from"] = negative_from;
    ctx->saved_data["shape"] = rows.sizes().vec();
    return op.call(rows, source, negative_from, sample, position, from, to, extent);
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    check_first_order(grads, "back-substitution");
    PYCERT_HANDLE("relayout_rows_backward", relayout_backward_on_device);
    const auto s = ctx->get_saved_variables();
    const auto shape = ctx->saved_data["shape"].toIntVector();
    const Tensor rows = op.call(grads[0], shape[0], optional_of(s[0]), ctx->saved_data["negative_from"].toInt(), s[1],
                                optional_of(s[2]), ctx->saved_data["from"].toIntVector(),
                                ctx->saved_data["to"].toIntVector(), ctx->saved_data["extent"].toIntVector());
    return {rows.view(shape), Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

std::tuple<Tensor, Tensor> relax_autograd(const Tensor& rows, const OptionalTensor& source, int64_t negative_from,
                                          const Tensor& sample, const OptionalTensor& position, IntArrayRef window,
                                          IntArrayRef extent, const Tensor& lower_slope,
                                          const OptionalTensor& lower_intercept, const Tensor& upper_slope,
                                          const Tensor& upper_intercept, const OptionalTensor& bias,
                                          const OptionalTensor& charge, const OptionalTensor& lower_row) {
  if (any_needs_grad(rows, lower_slope, value_or_empty(lower_intercept), upper_slope, upper_intercept,
                     value_or_empty(bias))) {
    TORCH_CHECK_VALUE(!any_needs_grad(rows) || (!source.has_value() && negative_from >= rows.size(0)),
                      "relax_rows: gradients of rows need rows of their own (no source, no sign)");
    TORCH_CHECK_VALUE(!any_needs_grad(value_or_empty(bias)), "relax_rows: a bias has no gradient here");
    TORCH_CHECK_VALUE(!lower_row.has_value() || !any_needs_grad(upper_slope, upper_intercept),
                      "relax_rows: with lower_row the upper line has no gradient");
    auto out = RelaxFunction::apply(rows, source, negative_from, sample, position, window, extent, lower_slope,
                                    lower_intercept, upper_slope, upper_intercept, bias, charge, lower_row);
    return {out[0], out[1]};
  }
  at::AutoDispatchBelowADInplaceOrView below;
  PYCERT_HANDLE("relax_rows", relax_on_device);
  return op.call(rows, source, negative_from, sample, position, window, extent, lower_slope, lower_intercept,
                 upper_slope, upper_intercept, bias, charge, lower_row);
}

Tensor concretize_autograd(const Tensor& rows, const OptionalTensor& source, int64_t negative_from,
                           const Tensor& sample, const OptionalTensor& position, IntArrayRef window, IntArrayRef extent,
                           const Tensor& first, const Tensor& second, int64_t norm) {
  if (any_needs_grad(rows, first, second)) {
    TORCH_CHECK_VALUE(!source.has_value() && negative_from >= rows.size(0),
                      "concretize_rows: gradients need rows of their own (no source, no sign)");
    return ConcretizeFunction::apply(rows, sample, position, window, extent, first, second, norm);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  PYCERT_HANDLE("concretize_rows", concretize_on_device);
  return op.call(rows, source, negative_from, sample, position, window, extent, first, second, norm);
}

Tensor relayout_autograd(const Tensor& rows, const OptionalTensor& source, int64_t negative_from, const Tensor& sample,
                         const OptionalTensor& position, IntArrayRef from, IntArrayRef to, IntArrayRef extent) {
  if (any_needs_grad(rows))
    return RelayoutFunction::apply(rows, source, negative_from, sample, position, from, to, extent);
  at::AutoDispatchBelowADInplaceOrView below;
  PYCERT_HANDLE("relayout_rows", relayout_on_device);
  return op.call(rows, source, negative_from, sample, position, from, to, extent);
}

void ascend_on_device(const Tensor& slope, const Tensor& first, const Tensor& second, const Tensor& best,
                      const Tensor& grad, const Tensor& lowest, const Tensor& highest, const Tensor& sample,
                      const Tensor& best_row, const Tensor& improved, int64_t step, double rate) {
  constexpr double kFirst = 0.9, kSecond = 0.999, kEpsilon = 1e-8;  // Kingma & Ba's
  const Tensor g = grad.contiguous();
  for (const Tensor& t : {slope, first, second, best, lowest, highest, sample, best_row, improved})
    TORCH_CHECK_VALUE(t.is_contiguous(), "ascend_slopes: tensors must be contiguous");
  AT_DISPATCH_FLOATING_TYPES(slope.scalar_type(), "ascend_slopes", [&] {
    kernels<scalar_t>(slope)->ascend(
        {slope.size(0), slope.size(1), slope.data_ptr<scalar_t>(), first.data_ptr<scalar_t>(),
         second.data_ptr<scalar_t>(), best.data_ptr<scalar_t>(), g.const_data_ptr<scalar_t>(),
         lowest.const_data_ptr<scalar_t>(), highest.const_data_ptr<scalar_t>(), sample.const_data_ptr<int64_t>(),
         best_row.const_data_ptr<int64_t>(), improved.const_data_ptr<bool>(),
         scalar_t(rate / (1 - std::pow(kFirst, double(step)))), scalar_t(kFirst), scalar_t(kSecond),
         scalar_t(1 / std::sqrt(1 - std::pow(kSecond, double(step)))), scalar_t(kEpsilon)});
  });
}

}  // namespace

void ascend_slopes(const Tensor& slope, const Tensor& first, const Tensor& second, const Tensor& best,
                   const Tensor& grad, const Tensor& lowest, const Tensor& highest, const Tensor& sample,
                   const Tensor& best_row, const Tensor& improved, int64_t step, double rate) {
  PYCERT_HANDLE("ascend_slopes", ascend_on_device);
  at::AutoDispatchBelowADInplaceOrView below;
  op.call(slope, first, second, best, grad, lowest, highest, sample, best_row, improved, step, rate);
}

std::tuple<Tensor, RowSums> relax_rows(const Tensor& rows, const RowSource& source, const RowIndex& index,
                                       const Window& window, const Extent& extent, const Tensor& lower_slope,
                                       const Tensor& lower_intercept, const Tensor& upper_slope,
                                       const Tensor& upper_intercept, const Tensor& bias, const Tensor& charge,
                                       const Tensor& lower_row) {
  PYCERT_HANDLE("relax_rows", relax_on_device);
  return op.call(rows, optional_of(source.source), source.negative_from, index.of_kernels(),
                 optional_of(index.position), encode(window), encode(extent), lower_slope, optional_of(lower_intercept),
                 upper_slope, upper_intercept, optional_of(bias), optional_of(charge), optional_of(lower_row));
}

bool has_relax_product(const Tensor& like) {
  if (!like.is_cpu()) return true;
  return like.scalar_type() == at::kFloat ? device_kernels<float>(like.device()).main.relax_product != nullptr
                                          : device_kernels<double>(like.device()).main.relax_product != nullptr;
}

std::tuple<Tensor, RowSums> relax_product(const Tensor& rows, const RowSource& source, const RowIndex& index,
                                          const Extent& extent, const Tensor& lower_slope,
                                          const Tensor& lower_intercept, const Tensor& upper_slope,
                                          const Tensor& upper_intercept, const Tensor& bias, const Tensor& charge,
                                          const Tensor& lower_row, const Tensor& weight,
                                          const std::optional<RowEnd>& end) {
  PYCERT_HANDLE("relax_product", relax_product_on_device);
  return op.call(rows, optional_of(source.source), source.negative_from, index.of_kernels(), encode(extent),
                 lower_slope, optional_of(lower_intercept), upper_slope, upper_intercept, optional_of(bias),
                 optional_of(charge), optional_of(lower_row), weight,
                 end.has_value() ? optional_of(end->first) : std::nullopt,
                 end.has_value() ? optional_of(end->second) : std::nullopt, end.has_value() ? end->norm : 0);
}

std::tuple<Tensor, RowSums> relax_convolution(const Tensor& rows, const RowSource& source, const RowIndex& index,
                                              const Window& window, const Extent& extent, const Tensor& lower_slope,
                                              const Tensor& lower_intercept, const Tensor& upper_slope,
                                              const Tensor& upper_intercept, const Tensor& bias, const Tensor& charge,
                                              const Tensor& lower_row, const Tensor& weight, const ConvGeometry& g,
                                              const Window& to, const Extent& to_extent,
                                              const std::optional<RowEnd>& end) {
  PYCERT_HANDLE("relax_convolution", relax_convolution_on_device);
  return op.call(rows, optional_of(source.source), source.negative_from, index.of_kernels(),
                 optional_of(index.position), encode(window), encode(extent), lower_slope, optional_of(lower_intercept),
                 upper_slope, upper_intercept, optional_of(bias), optional_of(charge), optional_of(lower_row), weight,
                 g.stride, g.padding, g.dilation, g.groups, encode(to), encode(to_extent),
                 end.has_value() ? optional_of(end->first) : std::nullopt,
                 end.has_value() ? optional_of(end->second) : std::nullopt, end.has_value() ? end->norm : 0);
}

RowSums dot_rows(const Tensor& rows, const RowSource& source, const RowIndex& index, const Window& window,
                 const Extent& extent, const Tensor& bias, const Tensor& charge) {
  PYCERT_HANDLE("dot_rows", dot_on_device);
  at::NoGradGuard no_grad;
  return op.call(rows.detach(), optional_of(source.source), source.negative_from, index.of_kernels(),
                 optional_of(index.position), encode(window), encode(extent), optional_of(bias), optional_of(charge));
}

Tensor relayout_rows(const Tensor& rows, const RowSource& source, const RowIndex& index, const Window& from,
                     const Window& to, const Extent& extent) {
  PYCERT_HANDLE("relayout_rows", relayout_on_device);
  return op.call(rows, optional_of(source.source), source.negative_from, index.of_kernels(),
                 optional_of(index.position), encode(from), encode(to), encode(extent));
}

void add_rows(Tensor& out, const Tensor& rows, const RowSource& source, const RowIndex& index, const Window& from,
              const Window& to, const Extent& extent) {
  PYCERT_HANDLE("add_rows", add_on_device);
  at::AutoDispatchBelowADInplaceOrView below;
  op.call(out, rows, optional_of(source.source), source.negative_from, index.of_kernels(), optional_of(index.position),
          encode(from), encode(to), encode(extent));
}

Tensor concretize_box(const Tensor& rows, const RowSource& source, const RowIndex& index, const Window& window,
                      const Extent& extent, const Tensor& lower, const Tensor& upper) {
  PYCERT_HANDLE("concretize_rows", concretize_on_device);
  return op.call(rows, optional_of(source.source), source.negative_from, index.of_kernels(),
                 optional_of(index.position), encode(window), encode(extent), lower, upper, 0);
}

Tensor concretize_ball(const Tensor& rows, const RowSource& source, const RowIndex& index, const Window& window,
                       const Extent& extent, const Tensor& centre, const Tensor& eps, int64_t p) {
  PYCERT_HANDLE("concretize_rows", concretize_on_device);
  return op.call(rows, optional_of(source.source), source.negative_from, index.of_kernels(),
                 optional_of(index.position), encode(window), encode(extent), centre, eps, p);
}

TORCH_LIBRARY_FRAGMENT(pycert, m) {
  m.def(
      "relax_rows(Tensor rows, Tensor? source, int negative_from, Tensor sample, Tensor? position, int[] window, "
      "int[] extent, Tensor lower_slope, Tensor? lower_intercept, Tensor upper_slope, Tensor upper_intercept, Tensor? "
      "bias, Tensor? charge, Tensor? lower_row) -> (Tensor, Tensor)");
  m.def(
      "relax_rows_backward(Tensor grad_out, Tensor grad_sums, Tensor rows, Tensor? source, int negative_from, Tensor "
      "sample, Tensor? position, int[] window, int[] extent, Tensor lower_slope, Tensor? lower_intercept, Tensor "
      "upper_slope, Tensor upper_intercept, Tensor? bias, Tensor? lower_row, int[] wanted) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "relax_product(Tensor rows, Tensor? source, int negative_from, Tensor sample, int[] extent, Tensor lower_slope, "
      "Tensor? lower_intercept, Tensor upper_slope, Tensor upper_intercept, Tensor? bias, Tensor? charge, Tensor? "
      "lower_row, Tensor weight, Tensor? first, Tensor? second, int norm) -> (Tensor, Tensor)");
  m.def(
      "relax_convolution(Tensor rows, Tensor? source, int negative_from, Tensor sample, Tensor? position, int[] "
      "window, "
      "int[] extent, Tensor lower_slope, Tensor? lower_intercept, Tensor upper_slope, Tensor upper_intercept, Tensor? "
      "bias, Tensor? charge, Tensor? lower_row, Tensor weight, int[] stride, int[] padding, int[] dilation, int "
      "groups, "
      "int[] to_window, int[] to_extent, Tensor? first, Tensor? second, int norm) -> (Tensor, Tensor)");
  m.def(
      "dot_rows(Tensor rows, Tensor? source, int negative_from, Tensor sample, Tensor? position, int[] window, int[] "
      "extent, Tensor? bias, Tensor? charge) -> Tensor");
  m.def(
      "relayout_rows(Tensor rows, Tensor? source, int negative_from, Tensor sample, Tensor? position, int[] from, "
      "int[] to, int[] extent) -> Tensor");
  m.def(
      "add_rows(Tensor(a!) out, Tensor rows, Tensor? source, int negative_from, Tensor sample, Tensor? position, int[] "
      "from, int[] to, int[] extent) -> ()");
  m.def(
      "relayout_rows_backward(Tensor grad_out, int table_rows, Tensor? source, int negative_from, Tensor sample, "
      "Tensor? position, int[] from, int[] to, int[] extent) -> Tensor");
  m.def(
      "concretize_rows(Tensor rows, Tensor? source, int negative_from, Tensor sample, Tensor? position, int[] window, "
      "int[] extent, Tensor first, Tensor second, int norm) -> Tensor");
  m.def(
      "concretize_rows_backward(Tensor grad, Tensor rows, Tensor sample, Tensor? position, int[] window, int[] "
      "extent, Tensor first, Tensor second, int norm, bool of_region) -> (Tensor, Tensor, Tensor)");
  m.def(
      "ascend_slopes(Tensor(a!) slope, Tensor(b!) first, Tensor(c!) second, Tensor(d!) best, Tensor grad, Tensor "
      "lowest, Tensor highest, Tensor sample, Tensor best_row, Tensor improved, int step, float rate) -> ()");
}

// Every device by the same functions: device.h has the kernels of each.
static void register_backsub(torch::Library& m) {
  m.impl("relax_rows", relax_on_device);
  m.impl("relax_rows_backward", relax_backward_on_device);
  m.impl("relax_product", relax_product_on_device);
  m.impl("relax_convolution", relax_convolution_on_device);
  m.impl("dot_rows", dot_on_device);
  m.impl("relayout_rows", relayout_on_device);
  m.impl("add_rows", add_on_device);
  m.impl("relayout_rows_backward", relayout_backward_on_device);
  m.impl("concretize_rows", concretize_on_device);
  m.impl("concretize_rows_backward", concretize_backward_on_device);
  m.impl("ascend_slopes", ascend_on_device);
}
TORCH_LIBRARY_IMPL(pycert, CPU, m) { register_backsub(m); }
TORCH_LIBRARY_IMPL(pycert, CUDA, m) { register_backsub(m); }

TORCH_LIBRARY_IMPL(pycert, Autograd, m) {
  m.impl("relax_rows", relax_autograd);
  m.impl("relayout_rows", relayout_autograd);
  m.impl("concretize_rows", concretize_autograd);
}

}  // namespace pycert
