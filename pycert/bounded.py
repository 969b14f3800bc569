"""``BoundedModule``: a network, traced once, that can be bounded over regions of inputs."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pycert import _C, _choices, _flags, activations
from pycert.graph import Graph, trace
from pycert.graph.state import Watch
from pycert.ops.relaxation import SLOPES
from pycert.options import INTERMEDIATES, METHODS, SIDES, SOUNDNESS, Options, memory_bytes, parse
from pycert.regions import Box, LpBall, Region

#: Numbers of the engine's methods; fastlin is crown with parallel slopes, alpha-crown the method its
#: intermediate bounds are of, with an ascent.
_ENGINE_METHODS = {"ibp": 0, "crown-ibp": 1, "crown": 2, "fastlin": 2, "alpha-crown": 2, "forward": 3}
_FALL = 0.05  # of the rate over all steps of an ascent with cuts
#: With constraints on groups of neurons (:mod:`pycert.krelu`).
JOINT_METHODS = ("krelu", "lp")
#: Bounds that a caller vouches for, by node number: values taken as they are, and values to intersect with.
Boxes = tuple[dict[int, tuple[Tensor, Tensor]], dict[int, tuple[Tensor, Tensor]]]


@dataclasses.dataclass
class LinearBounds:
    """``A_lower x + c_lower <= C f(x) <= A_upper x + c_upper`` for every ``x`` of the region.

    ``A_*`` have shape ``[B, S, *in]`` (a tuple of such tensors for a network of several inputs),
    ``c_*`` ``[B, S]``; what the call's ``side`` left out is None. The constants carry the error
    charges of the call's ``soundness``.
    """

    A_lower: Any
    c_lower: Tensor | None
    A_upper: Any
    c_upper: Tensor | None


@dataclasses.dataclass
class Bounds:
    """Bounds on every output: ``lower <= f(x) <= upper`` for every ``x`` of the region.

    Unpacks as ``lower, upper = bounds``. ``soundness`` is what the numbers are good for ("none",
    "real", "deployed"), ``excludes`` the executions that it does not cover under torch's settings
    at the time of the call.
    """

    lower: Tensor | None
    upper: Tensor | None
    linear: LinearBounds | None = None
    soundness: str = "deployed"
    excludes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Tensor | None]:
        return iter((self.lower, self.upper))


@dataclasses.dataclass(frozen=True)
class Cost:
    """Predicted cost of one call: ``bytes`` at its peak, beyond the network; ``flops`` in all."""

    bytes: int
    flops: float


class BoundedModule(nn.Module):
    """A network that can be bounded.

    Args:
        net: any module of supported layers (docs/methods.md lists them). Its parameters stay its own:
            an optimiser step is seen by the next bound.
        example: an input with a batch dimension, or a tuple of inputs; only shapes and dtypes matter.

    Raises:
        UnsupportedOperator: a layer cannot be bounded; names its path, its type and the nearest
            supported form.
        TypeError, ValueError: ``net`` or ``example`` is not what it must be.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> bm = pycert.BoundedModule(net, torch.empty(1, 2))
        >>> lower, upper = bm.bound(pycert.LpBall(torch.zeros(1, 2), eps=0.1), method="crown")
    """

    def __init__(self, net: nn.Module, example: Tensor | tuple[Tensor, ...]) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"net must be a torch.nn.Module, got {type(net).__name__}")
        self.net = net
        self.graph: Graph = trace(net, example)
        self._watch = Watch(net, (example,) if isinstance(example, Tensor) else tuple(example), self.graph)
        self._prepare()

    def _part(self, graph: Graph) -> BoundedModule:
        """A bounded module of a part of the graph, over the same modules."""
        made = type(self).__new__(type(self))
        nn.Module.__init__(made)
        made.net, made.graph, made._watch = self.net, graph, self._watch
        made._prepare()
        return made

    def _prepare(self) -> None:
        nodes = [
            {
                "op": n.op,
                "inputs": n.inputs,
                "shape": n.shape,
                "params": n.params,
                "attrs": n.attrs,
                "path": n.path,
            }
            for n in self.graph.nodes
        ]
        self._program = _C.Program(nodes, self.graph.output)
        self._custom = any(node.op == "custom" for node in self.graph.nodes)
        self._convolves = any(node.op == "conv" for node in self.graph.nodes)
        self._options: dict[Any, _C.Options] = {}
        self._hidden = _hidden_slots(self.graph)
        self._shapes = [getattr(value, "shape", None) for value in self.graph.tensors()]

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_program", "_options"):  # compiled: made anew from the graph
            state.pop(name)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._prepare()

    def forward(self, *inputs: Tensor) -> Tensor:
        """The network itself."""
        return self.net(*inputs)

    # ---- bounds -------------------------------------------------------------------------------------

    @_flags.subnormals_kept
    def bound(
        self,
        region: Region | tuple[Region, ...],
        method: str = "crown",
        *,
        spec: Tensor | None = None,
        return_linear: bool = False,
        **options: Any,
    ) -> Bounds:
        """Bounds on the outputs, or on ``spec @ outputs``, over a region.

        Args:
            region: ``LpBall`` or ``Box`` with a batch of ``B``; for a network of several inputs a tuple,
                one region an input (``Box(x, x)`` for a constant one).
            method: ``"ibp"`` (intervals), ``"crown-ibp"`` (one back-substitution over interval
                relaxations), ``"fastlin"`` and ``"crown"`` (back-substitution for every layer; parallel
                or adaptive slopes), ``"alpha-crown"`` (crown with lower slopes optimised for these bounds),
                ``"forward"`` (linear functions of the input propagated forward; for few inputs),
                ``"lipschitz"`` (the value at the centre and local Lipschitz constants; docs/lipschitz.md),
                ``"krelu"`` (alpha-crown with constraints on groups of neurons; docs/krelu.md), ``"lp"``
                (linear programs with triangles, and such constraints where ``rows`` is not 0).
            spec: ``[S, n_out]`` or ``[B, S, n_out]``, rows to bound instead of the outputs.
            return_linear: also return the linear functions of the input behind the bounds.
            side: ``"both"``, ``"lower"`` or ``"upper"``; what is not asked for is not computed.
            slope: lower slope of an unstable ReLU: ``"adaptive"``, ``"parallel"``, ``"zero"``, ``"one"``.
            intersect: intersect every intermediate bound and the result with the interval bound.
            soundness: ``"deployed"``, ``"real"`` or ``"none"``; see docs/soundness.md.
            precision: ``"exact"``, or ``"fast"``: the radii of interval convolutions are formed in bfloat16,
                rounded up, where the processor has it and eight images or more share the work. As sound,
                and some percent wider (docs/soundness.md).
            memory: budget for the rows of one chunk, as ``"2GiB"``; by default a quarter of what is free.
            pooling: upper line of a max-pooling that no element decides: ``"adaptive"``, the better one at the
                centre, or ``"constant"``, the largest upper bound, as other tools have it.
            iterations: of ``"alpha-crown"``: gradient steps, by default 20 (``"krelu"``: 60); 0 gives the bounds
                of crown.
            learning_rate: of ``"alpha-crown"``: of its first step, by default 0.5; falls by 2 % a step.
            alpha: of ``"alpha-crown"``: ``"per spec"``, lower slopes of its own for every bound, or
                ``"shared"``, for all lower and for all upper bounds of a sample.
            intermediate: of ``"alpha-crown"``: the method of the intermediate bounds, ``"crown"``,
                ``"crown-ibp"`` (intervals) or ``"alpha-crown"``, which optimises them too; of ``"krelu"``
                also ``"krelu"``, which lets constraints on earlier layers tighten them.
            threshold: of ``"alpha-crown"``: a lower bound above it and an upper bound below it are good
                enough and optimised no further; by default all are.
            k, ns, s, cover, least: of ``"krelu"``: groups of ``k`` neurons, 3; see
                :func:`pycert.krelu.select_groups`.
            rows: of ``"krelu"`` and ``"lp"``: how many constraints a group has at most, 12 and 0.
            effort: of ``"lipschitz"``: ``"normal"`` or ``"high"``, of its norms (:func:`pycert.ops.masked_norm`).
            norms: of ``"lipschitz"``: ``"gram"``; ``"power"``, which only estimates norms, is refused.
            leaves: of ``"krelu"`` and ``"lp"``: parts, at most, into which the region is branched for one bound, by
                the signs of neurons; 1 (none). With as many as it takes the bound is that of the network itself.
            time_limit: of ``"lp"``: seconds of a sample; what is not solved then keeps the bound of alpha-crown.
                Branching may take as much again; of ``"krelu"`` it limits branching alone.
            cut_rate: of ``"krelu"``: the first step of multipliers, in units of a coefficient's usual size, 0.1.
            directions: of ``"krelu"`` and ``"lp"``: steps of ascent for every sum and difference of neurons that the
                constraints rest on, 0 (crown).
            cuts: of ``"krelu"``: a :class:`pycert.krelu.CutSet` of more constraints.

        Returns:
            ``Bounds``, with ``lower`` and ``upper`` of shape ``[B, *out]``, or ``[B, S]`` with a ``spec``,
            in the units of the outputs and the dtype of the region. Infinite where the arithmetic
            overflows.

        Raises:
            ValueError: unknown names, shapes that do not fit, NaN or infinite weights.
            TypeError: another dtype than the network's.

        Soundness: as ``soundness`` says. Gradient: parameters, centre and eps; optimised slopes, and the
        constraints of ``"krelu"`` and ``"lp"``, count as constants.
        Source: Gowal et al. 2018 (ibp), Wong & Kolter 2018 and Weng et al. 2018 (fastlin), Zhang et al.
        2018 (crown), Zhang et al. 2020 (crown-ibp), Xu et al. 2021 (alpha-crown); rounding errors as in
        docs/soundness.md.
        """
        parsed = parse(method, options, ("method", "spec", "return_linear"))
        if return_linear and method == "ibp":
            raise ValueError("return_linear needs a method with linear bounds, not 'ibp'")
        regions, batch = self._regions(region)
        rows = None if spec is None else self._spec(spec, batch, regions[0][0])
        if method == "lipschitz":
            return self._lipschitz(region, rows, parsed, return_linear)
        if method in JOINT_METHODS:
            return self._joint(regions, rows, method, parsed, return_linear)
        return self._bound(regions, rows, method, parsed, return_linear)

    def _joint(
        self,
        regions: list[Any],
        rows: tuple[Tensor, Tensor | None, int] | None,
        method: str,
        parsed: Options,
        return_linear: bool = False,
    ) -> Bounds:
        """Bounds with constraints on groups of neurons."""
        from pycert import _lp, krelu  # they need this module

        module = _lp if method == "lp" else krelu
        return module.bound_rows(self, regions, rows, parsed, return_linear)

    def _lipschitz(
        self,
        region: Region | tuple[Region, ...],
        rows: tuple[Tensor, Tensor | None, int] | None,
        parsed: Options,
        return_linear: bool = False,
    ) -> Bounds:
        """Bounds by local Lipschitz constants."""
        from pycert.lipschitz.margins import bounds_of_rows  # it needs this module

        if return_linear:
            raise ValueError("return_linear needs a method with linear bounds, not 'lipschitz'")
        if parsed.soundness == "none":
            raise ValueError(
                "method 'lipschitz' is for soundness='real' or 'deployed'; to train, see pycert.train.losses"
            )
        parts = region if isinstance(region, (tuple, list)) else (region,)
        sources = [*self._tensors(), *(value for part in parts for value in vars(part).values())]
        wanted = any(isinstance(value, Tensor) and value.requires_grad for value in sources)
        with torch.set_grad_enabled(torch.is_grad_enabled() and wanted):
            lower, upper = bounds_of_rows(self, region, rows, parsed)
        first = parts[0]
        return Bounds(lower, upper, None, parsed.soundness, self._excludes(parsed.soundness, first.lower))

    def _interval_options(self, soundness: str, device: torch.device) -> Any:
        """Of the engine's interval pass, for those who tighten its boxes on the way."""
        return self._native("ibp", Options(soundness=soundness), False, device)

    def _point_bounds(
        self, regions: list[Region], rows: tuple[Tensor, Tensor | None, int] | None, soundness: str
    ) -> tuple[Tensor, Tensor]:
        """Bounds at single points: what rounding alone makes of the network there."""
        native, _ = self._regions(tuple(regions))
        found = self._bound(native, rows, "crown", Options(soundness=soundness))
        assert found.lower is not None and found.upper is not None
        return found.lower, found.upper

    def _bound(
        self,
        regions: list[Any],
        rows: tuple[Tensor, Tensor | None, int] | None,
        method: str,
        parsed: Options,
        return_linear: bool = False,
        boxes: Boxes | None = None,
        cuts: Any = None,
        first: tuple[dict[int, Tensor], dict[int, Tensor]] | None = None,
    ) -> Bounds:
        """One call of the engine.

        ``cuts``: a ``CutSet``; ``first``: lower slopes and multipliers of cuts, by activation, ``[rows, ...]``, to
        start the ascent with (lower bounds of all rows, then upper ones).
        """
        tensors = self._tensors()
        native = self._native(method, parsed, return_linear, regions[0][0].device, boxes)
        if cuts is not None:
            native.set_rates(_FALL ** (1 / max(1, parsed.iterations)), parsed.cut_rate)
            native.set_cuts(cuts._for_engine(len(regions[0][0]), regions[0][0]))
        if first is not None:
            native.set_first(*first)
        try:
            found = self._program.bound(tensors, regions, native, rows)
        except (RuntimeError, IndexError, ValueError) as error:
            self._explain(error, tensors)
            raise
        lower, upper, A_lower, c_lower, A_upper, c_upper = found
        for value in (lower, upper):
            if value is not None and not math.isfinite(value.detach().sum().item()):
                self._diagnose(tensors)
        linear = None
        if return_linear:
            shape = (regions[0][0].shape[0], c_lower.shape[1] if c_lower is not None else c_upper.shape[1])
            A_lower, c_lower = _without_overflow(A_lower, c_lower, -math.inf)
            A_upper, c_upper = _without_overflow(A_upper, c_upper, math.inf)
            linear = LinearBounds(
                self._shaped(A_lower, shape), c_lower, self._shaped(A_upper, shape), c_upper
            )
        excludes = self._excludes(parsed.soundness, regions[0][0])
        return Bounds(lower, upper, linear, parsed.soundness, excludes)

    def _loss_bound(self, region: Region | tuple[Region, ...], y: Tensor, method: str) -> Tensor:
        """Upper bounds of the cross entropy, see :func:`pycert.train.fused_loss`."""
        regions, batch = self._regions(region)
        rows = self._class_rows(y, batch, regions[0][0])
        parsed = Options(intersect=False, soundness="none")
        tensors = self._tensors()
        native = self._native(method, parsed, False, regions[0][0].device)
        loss = self._program.loss_bound(tensors, regions, native, rows)
        if not math.isfinite(loss.detach().sum().item()):
            self._diagnose(tensors)
        return loss

    def _shaped(self, coefficients: list[Tensor | None], shape: tuple[int, int]) -> Any:
        if not coefficients or all(A is None for A in coefficients):
            return None
        shaped = tuple(
            None if A is None else A.view(*shape, *size)
            for A, size in zip(coefficients, self.graph.inputs, strict=True)
        )
        return shaped[0] if len(shaped) == 1 else shaped

    @_flags.subnormals_kept
    def layer_bounds(
        self, region: Region | tuple[Region, ...], method: str = "crown", **options: Any
    ) -> dict[str, Bounds]:
        """Bounds on every pre-activation: what each activation, pool or maximum reads.

        Args, errors, soundness and gradient as in :meth:`bound`; ``"alpha-crown"`` optimises each of
        them that could still change a relaxation.

        Returns:
            Module path of the layer that computes the value -> ``Bounds``, each ``[B, *shape]``, in
            the order of the network.
        """
        parsed = parse(
            method,
            options,
            ("method",),
            without=("side", "intermediate", "threshold", "leaves", "time_limit"),
        )
        parsed = dataclasses.replace(parsed, intermediate=method if method in INTERMEDIATES else "crown")
        if method in ("forward", "lipschitz", "lp"):
            raise ValueError(
                f"layer_bounds: method {method!r} is not supported; use 'ibp', 'crown-ibp' or 'crown'"
            )
        regions, _ = self._regions(region)
        if method in JOINT_METHODS:
            from pycert import krelu  # it needs this module

            found = krelu.known_boxes(self, regions, dataclasses.replace(parsed, intermediate=method))[0]
        else:
            found = self._layer_boxes(regions, method, parsed)
        excludes = self._excludes(parsed.soundness, regions[0][0])
        return {
            self.graph.nodes[i].path or f"node{i}": Bounds(lower, upper, None, parsed.soundness, excludes)
            for i, (lower, upper) in found.items()
        }

    def _layer_boxes(
        self, regions: list[Any], method: str, parsed: Options, boxes: Boxes | None = None
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Bounds on every pre-activation, by node number."""
        tensors = self._tensors()
        native = self._native(method, parsed, False, regions[0][0].device, boxes)
        try:
            found = self._program.layer_bounds(tensors, regions, native)
        except (RuntimeError, IndexError, ValueError) as error:
            self._explain(error, tensors)
            raise
        if not all(
            math.isfinite((upper.detach() - lower.detach()).sum().item()) for _, lower, upper in found
        ):
            self._diagnose(tensors)
        return {i: (lower, upper) for i, lower, upper in found}

    def estimate(
        self,
        region: Region | tuple[Region, ...],
        method: str = "crown",
        *,
        spec: Tensor | None = None,
        **options: Any,
    ) -> Cost:
        """Predicted memory and work of :meth:`bound` with the same arguments, from one interval pass.

        Returns:
            ``Cost(bytes, flops)``: peak bytes beyond the network and floating-point operations, each
            within a factor of two on the networks of benchmarks/bench_estimate.py.
        """
        parsed = parse(method, options, ("method", "spec"))
        if method in ("lipschitz", *JOINT_METHODS):
            raise ValueError(f"estimate: method {method!r} is not supported")
        regions, batch = self._regions(region)
        rows = None if spec is None else self._spec(spec, batch, regions[0][0])
        size, flops = self._program.estimate(
            self._tensors(), regions, self._native(method, parsed, False, regions[0][0].device), rows
        )
        return Cost(int(size), flops)

    # ---- arguments ----------------------------------------------------------------------------------

    def _tensors(self) -> list[Tensor]:
        self.graph.check()
        self._watch.check()
        with _flags.no_autocast():
            tensors = self.graph.tensors()
        if not all(math.isfinite(tensors[i].detach().sum().item()) for i in self._hidden):
            self._diagnose(tensors)
        return tensors

    def _native(
        self,
        method: str,
        options: Options,
        return_linear: bool,
        device: torch.device,
        boxes: Boxes | None = None,
    ) -> _C.Options:
        training = tuple(bool(norm.training) for norm in self.graph.batch_norms)
        memory = 0 if method == "ibp" and options.memory is None else memory_bytes(options.memory, device)
        key = (method, options, return_linear, training)
        keeps = method == "ibp" and boxes is None
        native = self._options.get(key) if keeps else None
        if native is None:
            ascent = method == "alpha-crown"
            relies_on = options.intermediate if ascent else method
            native = _C.Options(
                method=_ENGINE_METHODS[relies_on],
                slope=SLOPES.index("parallel" if method == "fastlin" else options.slope),
                soundness=SOUNDNESS.index(options.soundness),
                side=SIDES.index(options.side),
                intersect=options.intersect,
                return_linear=return_linear,
                fast=options.precision == "fast",
                memory=max(memory, 2**26) if method == "ibp" else memory,
                training=list(training),
                iterations=options.iterations if ascent else 0,
                learning_rate=options.learning_rate,
                shared=options.alpha == "shared",
                intermediate=relies_on == "alpha-crown" and options.iterations > 0,
                threshold=math.inf if options.threshold is None else options.threshold,
            )
            if self._custom:
                native.set_custom(activations.custom_lines, activations.custom_interval)
            native.flat_pools = options.pooling == "constant"
            if boxes is not None:
                native.set_boxes(*boxes)
            if keeps:
                self._options[key] = native
        return native

    def _regions(self, region: Region | tuple[Region, ...]) -> tuple[list[Any], int]:
        given = region if isinstance(region, (tuple, list)) else (region,)
        wanted = self.graph.inputs
        if len(given) != len(wanted):
            raise ValueError(f"region: the network has {len(wanted)} inputs, got {len(given)} regions")
        batch = -1
        for number, (one, shape) in enumerate(zip(given, wanted, strict=True)):
            if not isinstance(one, (LpBall, Box)):
                raise TypeError(f"region must be a pycert.LpBall or pycert.Box, got {type(one).__name__}")
            if tuple(one.lower.shape[1:]) != tuple(shape):
                raise ValueError(
                    f"region: input {number} of the network has shape [B, {', '.join(map(str, shape))}], "
                    f"got {list(one.lower.shape)}"
                )
            if batch not in (-1, one.batch):
                raise ValueError(f"region: all inputs must have the same batch, got {batch} and {one.batch}")
            first = given[0]
            assert isinstance(first, (LpBall, Box))
            if one.lower.dtype != first.lower.dtype or one.lower.device != first.lower.device:
                raise TypeError("region: all inputs must have the same dtype and device")
            batch = one.batch
        _check_device(given[0].lower.device)
        return [one._for_engine() for one in given], batch

    def _spec(self, spec: Tensor, batch: int, like: Tensor) -> tuple[Tensor, Tensor | None, int]:
        count = self.graph.numel(self.graph.output)
        if not isinstance(spec, Tensor):
            raise TypeError(f"spec must be a tensor, got {type(spec).__name__}")
        if spec.dtype != like.dtype or spec.device != like.device:
            raise TypeError(
                f"spec must have the dtype and device of the region ({like.dtype}, {like.device}), "
                f"got {spec.dtype}, {spec.device}"
            )
        if (
            spec.dim() not in (2, 3)
            or spec.shape[-1] != count
            or (spec.dim() == 3 and spec.shape[0] != batch)
        ):
            raise ValueError(
                f"spec must have shape [S, {count}] or [{batch}, S, {count}], got {list(spec.shape)}"
            )
        if spec.shape[-2] == 0:
            raise ValueError("spec must have at least one row, got none")
        if not torch.isfinite(spec.detach()).all():
            raise ValueError("spec must be finite, got NaN or infinite values")
        rows = spec.shape[-2]
        if spec.dim() == 3:
            return spec.reshape(-1, count), None, rows
        return spec, torch.arange(rows, device=spec.device).repeat(batch), rows

    def _class_rows(self, y: Tensor, batch: int, like: Tensor) -> tuple[Tensor, Tensor, int]:
        """Rows f_y - f_j by a table over pairs of classes: no product per sample."""
        classes = self.graph.numel(self.graph.output)
        if classes < 2:
            raise ValueError(f"margins need at least 2 outputs, the network has {classes}")
        if not isinstance(y, Tensor) or y.dtype.is_floating_point or y.dtype == torch.bool:
            raise TypeError("y must be a tensor of integer class labels")
        if y.shape != (batch,):
            raise ValueError(f"y must have shape [{batch}], got {list(y.shape)}")
        if bool(((y < 0) | (y >= classes)).any()):
            raise ValueError(f"y must hold classes 0 to {classes - 1}, got {int(y.min())} to {int(y.max())}")
        eye = torch.eye(classes, dtype=like.dtype, device=like.device)
        others = ~torch.eye(classes, dtype=torch.bool, device=like.device)
        table = (eye.unsqueeze(1) - eye.unsqueeze(0))[others]  # [classes * (classes - 1), classes]
        within = torch.arange(classes - 1, device=like.device)
        source = (y.to(device=like.device, dtype=torch.int64).unsqueeze(1) * (classes - 1) + within).flatten()
        return table, source, classes - 1

    def _excludes(self, soundness: str, like: Tensor) -> tuple[str, ...]:
        if soundness == "none":
            return ()
        of_batch: tuple[str, ...] = ()
        if any(norm.training for norm in self.graph.batch_norms):
            of_batch = ("BatchNorm in training mode: statistics other than those of this batch",)
        if soundness != "deployed":
            return of_batch
        found = _flags.uncovered(like.device.type, like.dtype, self._convolves)
        if found and _flags.warn_once(found):
            warnings.warn(
                "torch may run this network in ways that soundness='deployed' does not cover: "
                + "; ".join(found)
                + " (see `pycert doctor`)",
                stacklevel=5,
            )
        return found + of_batch

    def _explain(self, error: Exception, tensors: list[Tensor]) -> None:
        """Names the parameter whose shape is another than at the trace, where the engine failed."""
        for slot, value, shape in zip(self.graph.slots, tensors, self._shapes, strict=True):
            if value.shape != shape:
                raise ValueError(
                    f"'{slot.path}' has shape {list(value.shape)}, and another one when the network was traced: "
                    "make a new BoundedModule"
                ) from error

    def _diagnose(self, tensors: list[Tensor]) -> None:
        """Names the layer whose weights made a result infinite; an overflow leaves infinite bounds."""
        for slot, value in zip(self.graph.slots, tensors, strict=True):
            if value.dtype.is_floating_point and not torch.isfinite(value.detach()).all():
                raise ValueError(f"'{slot.path}' has NaN or infinite values")

    def extra_repr(self) -> str:
        return f"{len(self.graph.nodes)} operators"


def _without_overflow(
    coefficients: list[Tensor | None], constant: Tensor | None, none: float
) -> tuple[list[Tensor | None], Tensor | None]:
    """Functions of which a number is infinite or NaN become the constant ``none``."""
    parts = [A for A in coefficients if A is not None]
    if constant is None or all(math.isfinite(t.detach().sum().item()) for t in (constant, *parts)):
        return coefficients, constant
    finite = [A.detach().flatten(2).isfinite().all(2) for A in parts]
    known = torch.stack([constant.detach().isfinite(), *finite]).all(0)
    kept = [
        None if A is None else torch.where(known.view(*known.shape, 1), A.flatten(2), 0).view_as(A)
        for A in coefficients
    ]
    return kept, torch.where(known, constant, none)


def _check_device(device: torch.device) -> None:
    """The device's kernels must be there before anything is computed with it."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"region: bounds are computed on cpu or cuda, got {device}")
    if device.type == "cuda" and not _C.has_cuda():
        raise ValueError(
            f"region is on {device}, but this build of pycert is without CUDA kernels: install a torch with CUDA and "
            "the CUDA toolkit and build pycert again (PYCERT_CUDA=1 says what is missing)"
        )
    if device.type == "cuda":
        _C.check_cuda_kernels()
        _choices.load()


def _hidden_slots(graph: Graph) -> list[int]:
    """Slots whose NaN no bound would show: an operator of bounded range stands behind them."""
    ops = {node.op for node in graph.nodes}
    bounded = {"sigmoid", "tanh", "clamp", "custom", "softsign", "sin", "cos", "limit"} | (
        {"max2", "min2"} if {"max2", "min2"} <= ops else set()
    )
    before = [False] * len(graph.nodes)
    for i in range(len(graph.nodes) - 1, -1, -1):
        node = graph.nodes[i]
        for source in node.inputs:
            before[source] |= before[i] or node.op in bounded
    slots = {s for node, found in zip(graph.nodes, before, strict=True) if found for s in node.params}
    return sorted(s for s in slots if s >= 0)


@_flags.subnormals_kept
def margins(
    bm: BoundedModule,
    region: Region | tuple[Region, ...],
    y: Tensor,
    method: str = "crown-ibp",
    **options: Any,
) -> Tensor:
    """Lower bounds of ``f_y - f_j`` for every other class.

    Args:
        bm: the network; its output has one score a class.
        region: as in :meth:`BoundedModule.bound`, batch ``B``.
        y: ``[B]``, integer class labels.
        method, options: as in :meth:`BoundedModule.bound`, without ``spec`` and ``side``. The
            ``threshold`` of ``"alpha-crown"`` is 0: margins proved positive are not made larger
            (``math.inf`` optimises all).

    Returns:
        ``[B, n_out - 1]``, ``j`` ascending without ``y``, in the units of the outputs.

    Raises:
        ValueError, TypeError: labels out of range or of another type; as in ``bound``.

    Soundness and gradient: as in ``bound``.
    """
    parsed = dataclasses.replace(parse(method, options, ("method",), without=("side",)), side="lower")
    if parsed.threshold is None:
        parsed = dataclasses.replace(parsed, threshold=0.0)
    regions, batch = bm._regions(region)
    rows = bm._class_rows(y, batch, regions[0][0])
    if method == "lipschitz":
        lower = bm._lipschitz(region, rows, parsed).lower
    elif method in JOINT_METHODS:
        lower = bm._joint(regions, rows, method, parsed).lower
    else:
        lower = bm._bound(regions, rows, method, parsed).lower
    assert lower is not None
    return lower


__all__ = ["METHODS", "BoundedModule", "Bounds", "Cost", "LinearBounds", "margins"]
