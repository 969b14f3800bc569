"""What the operators that only the engine calls return: shapes and dtypes, for tensors without values."""

# The parameters are those of the schemas in csrc/ops, which name their types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch

from pycert.ops.interval import _conv_shape


def _rows_shape(count, window, extent):
    return (count, extent[0], *(extent[1:] if window[0] else window[1:3]))


def _two_like(t):
    return torch.empty_like(t, memory_format=torch.contiguous_format), torch.empty_like(
        t, memory_format=torch.contiguous_format
    )


@torch.library.register_fake("pycert::linf_ball")
def _(x, eps, low, high):
    return _two_like(x)


@torch.library.register_fake("pycert::interval_scale")
def _(lower, upper, scale, term, magnitude, kappa, sound, relu=False):
    return _two_like(lower)


@torch.library.register_fake("pycert::interval_add")
def _(a_lower, a_upper, b_lower, b_upper, subtract, kappa, sound, relu=False):
    return _two_like(a_lower)


@torch.library.register_fake("pycert::dual_product")
def _(weight, mid, radius):
    shape = (mid.shape[0], weight.shape[0])
    return mid.new_empty(shape), mid.new_empty(shape)


@torch.library.register_fake("pycert::convolution")
def _(x, radius, weight, stride, padding, dilation, transposed, output_padding, groups):
    shape = _conv_shape(x, weight, stride, padding, dilation, transposed, output_padding, groups)
    return x.new_empty(shape), x.new_empty((0,) if radius is None else shape)


@torch.library.register_fake("pycert::magnitudes")
def _(lower, upper, length):
    size = torch.empty_like(lower, memory_format=torch.contiguous_format)
    return size, lower.new_empty((4, lower.numel() // length), dtype=torch.float64)


@torch.library.register_fake("pycert::squares")
def _(values):
    shape = (2, values.shape[0], values.shape[2]) if values.dim() == 3 else values.shape[:1]
    return values.new_empty(shape, dtype=torch.float64)


@torch.library.register_fake("pycert::affine_charge")
def _(
    like,
    shape,
    absolute,
    weight_squares,
    windows,
    signed_sum,
    radius,
    centre,
    bias,
    stats,
    network,
    constants,
):
    return like.new_empty(shape)


@torch.library.register_fake("pycert::rows_product")
def _(rows, weight, segments, columns, starts, sample=None):
    return rows.new_empty((rows.shape[0], weight.shape[1]))


@torch.library.register_fake("pycert::rows_convolution")
def _(rows, weight, stride, padding, dilation, output_padding, groups, transposed, segments, sample=None):
    return rows.new_empty(
        _conv_shape(rows, weight, stride, padding, dilation, transposed, output_padding, groups)
    )


@torch.library.register_fake("pycert::relax_rows")
def _(
    rows,
    source,
    negative_from,
    sample,
    position,
    window,
    extent,
    lower_slope,
    lower_intercept,
    upper_slope,
    upper_intercept,
    bias,
    charge,
    lower_row,
):
    count = sample.shape[0]
    return rows.new_empty(_rows_shape(count, window, extent)), rows.new_empty((3, count), dtype=torch.float64)


@torch.library.register_fake("pycert::relax_product")
def _(
    rows,
    source,
    negative_from,
    sample,
    extent,
    lower_slope,
    lower_intercept,
    upper_slope,
    upper_intercept,
    bias,
    charge,
    lower_row,
    weight,
    first,
    second,
    norm,
):
    count = sample.shape[0]
    sums = rows.new_empty((3, count), dtype=torch.float64)
    if first is not None:
        return rows.new_empty((2, count), dtype=torch.float64), sums
    return rows.new_empty((count, weight.shape[1])), sums


@torch.library.register_fake("pycert::relax_convolution")
def _(
    rows,
    source,
    negative_from,
    sample,
    position,
    window,
    extent,
    lower_slope,
    lower_intercept,
    upper_slope,
    upper_intercept,
    bias,
    charge,
    lower_row,
    weight,
    stride,
    padding,
    dilation,
    groups,
    to_window,
    to_extent,
    first,
    second,
    norm,
):
    count = sample.shape[0]
    sums = rows.new_empty((3, count), dtype=torch.float64)
    if first is not None:
        return rows.new_empty((2, count), dtype=torch.float64), sums
    return rows.new_empty(_rows_shape(count, to_window, to_extent)), sums


@torch.library.register_fake("pycert::dot_rows")
def _(rows, source, negative_from, sample, position, window, extent, bias, charge):
    return rows.new_empty((3, sample.shape[0]), dtype=torch.float64)


@torch.library.register_fake("pycert::relayout_rows")
def _(rows, source, negative_from, sample, position, window, to, extent):
    return rows.new_empty(_rows_shape(sample.shape[0], to, extent))


@torch.library.register_fake("pycert::relax_rows_backward")
def _(
    grad_out,
    grad_sums,
    rows,
    source,
    negative_from,
    sample,
    position,
    window,
    extent,
    lower_slope,
    lower_intercept,
    upper_slope,
    upper_intercept,
    bias,
    lower_row,
    wanted,
):
    def like(is_wanted, t):
        return torch.empty_like(t) if is_wanted and t is not None else None

    return (
        like(wanted[0], rows),
        like(wanted[1], lower_slope),
        like(wanted[1], lower_intercept),
        like(wanted[2], upper_slope),
        like(wanted[2], upper_intercept),
    )


@torch.library.register_fake("pycert::relayout_rows_backward")
def _(grad_out, table_rows, source, negative_from, sample, position, window, to, extent):
    return grad_out.new_empty(_rows_shape(table_rows, window, extent))


@torch.library.register_fake("pycert::ascend_slopes")
def _(slope, first, second, best, grad, lowest, highest, sample, best_row, improved, step, rate):
    return None
