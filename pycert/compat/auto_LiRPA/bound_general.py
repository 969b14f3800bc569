"""``BoundedModule`` with the interface of auto_LiRPA; the bounds are those of pycert's engine."""

from __future__ import annotations

import contextlib
import copy
import math
import pathlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pycert.compat.auto_LiRPA import _engine, _introspection, output_constraints, solver_module
from pycert.compat.auto_LiRPA._engine import Question
from pycert.compat.auto_LiRPA._options import BoundOpts
from pycert.compat.auto_LiRPA.bounded_tensor import BoundedParameter, plain
from pycert.compat.auto_LiRPA.operators import Bound, BoundBuffers, BoundExp, BoundInput, BoundParams
from pycert.compat.auto_LiRPA.perturbations import PerturbationLpNorm
from pycert.compat.auto_LiRPA.utils import unpack_inputs
from pycert.errors import UnsupportedOperator
from pycert.reference import graph as reference

#: Rounds of tightening under output constraints.
_ROUNDS = 3
#: Arguments of ``compute_bounds`` that ask for what is not here.
_REFUSED = ("intermediate_constr", "alpha_idx", "cutter", "update_mask")


class BoundedModule(nn.Module):
    """A network that can be bounded, with auto_LiRPA's calls.

    Args:
        model: any module of layers that pycert supports. Parameters stay its own.
        global_input: an example of the input (or a tuple, list or dict of them); only shapes, dtype and
            device are used.
        bound_opts: options; those without meaning here are named once in a warning. Beside auto_LiRPA's:
            ``soundness`` ("none", as there, "real" or "deployed"; docs/soundness.md) and ``memory``.
        device: where the network is moved; ``"auto"`` leaves it where it is.
        verbose: without meaning.
        custom_ops: without meaning; operators are traced through.

    Raises:
        UnsupportedOperator: a layer cannot be bounded.
        ValueError: an unknown option.
        NotImplementedError: perturbed weights, or an option that is known and not supported.

    Soundness: by default that of plain arithmetic, as in auto_LiRPA; ``bound_opts={"soundness": ...}``.
    """

    def __init__(
        self,
        model: nn.Module,
        global_input: Any,
        bound_opts: dict[str, Any] | None = None,
        device: Any = "auto",
        verbose: bool = False,
        custom_ops: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, BoundedModule):
            for name, value in model.__dict__.items():
                object.__setattr__(self, name, value)
            return
        _refuse_perturbed(model)
        if device != "auto":
            model.to(device)
        given = unpack_inputs(global_input, device=None if device == "auto" else device)
        self.training, self.ori_training = False, model.training
        self.device = _device_of(model, given[0]) if device == "auto" else device
        self.verbose = verbose
        self._opts = BoundOpts(bound_opts)
        self.global_input = tuple(plain(value) for value in given)
        object.__setattr__(self, "net", model)
        self._traced: _engine.Network | None = None
        self._trace(self.global_input, tolerant=True)
        self._nodes: _introspection.Nodes | None = None
        self._x: tuple[Any, ...] | None = None
        self._aux: Any = None
        self._inputs: _engine.Inputs | None = None
        self._question: Question | None = None
        self._intermediate: str | None = None
        self._ibp: tuple[Tensor | None, Tensor | None] | None = None
        self._ibp_rows: Any = None  # C of that call
        self._boxes_of: tuple[Any, ...] = ()  # weights and inputs that these belong to
        self._optimised = False
        self._boxes: dict[int, tuple[Tensor, Tensor]] = {}
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        #: Output constraints ``constraints @ f(x) <= thresholds``, ``[B, N, n_out]`` and ``[N]``.
        self.constraints: Tensor | None = None
        self.thresholds: Tensor | None = None
        self.solver_model: Any = None

    # ---- as a module: the network's parameters, the nodes as submodules -----------------------------

    @property
    def _modules(self) -> dict[str, Any]:  # type: ignore[override]
        return self.__dict__["_plain_modules"] if "_nodes" not in self.__dict__ else self._all().by_name

    @_modules.setter
    def _modules(self, value: dict[str, Any]) -> None:
        self.__dict__["_plain_modules"] = value

    net: nn.Module

    def _all(self) -> _introspection.Nodes:
        """The nodes, made when they are first asked for."""
        if self._nodes is None:
            with self._mode(self.ori_training):
                nodes = _introspection.nodes_of(self.net, self.global_input, self._network.engine.graph)
            for node in nodes.by_name.values():
                node.lookup = self._look_up
            self._nodes = nodes
        return self._nodes

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BoundedModule:
        """``to``, ``float``, ``cuda`` and their like: the network's own parameters and buffers move."""
        self.net._apply(fn)
        if self._nodes is not None:
            parameters, buffers = dict(self.net.named_parameters()), dict(self.net.named_buffers())
            for node in self._nodes.by_name.values():
                if isinstance(node, BoundParams):
                    node.param = parameters[str(node.ori_name)]
                elif isinstance(node, BoundBuffers):
                    node.buffer = buffers[str(node.ori_name)]
        self.global_input = tuple(
            fn(value) if value.dtype.is_floating_point else value for value in self.global_input
        )
        self.device = _device_of(self.net, self.global_input[0])
        self._trace(self.global_input, tolerant=True)
        self._forget()
        return self

    def _trace(self, examples: tuple[Any, ...], tolerant: bool = False) -> None:
        """Traces the network; ``tolerant``: where its forward does not run with a batch, waits for an input.

        An example without a batch dimension is such a case: auto_LiRPA takes any that the forward takes.
        """
        self._traced = None
        try:
            with self._mode(False):
                self._traced = _engine.Network(self.net, tuple(plain(value) for value in examples))
        except UnsupportedOperator:
            raise
        except (RuntimeError, ValueError, IndexError):
            if not tolerant:
                raise

    @property
    def _network(self) -> _engine.Network:
        if self._traced is None:
            self._trace(self.global_input if self._x is None else self._x)
        assert self._traced is not None
        return self._traced

    @property
    def final_shape(self) -> torch.Size:
        """Shape of the output, with the example's batch."""
        graph = self._network.engine.graph
        return torch.Size((self.global_input[0].shape[0], *graph.nodes[graph.output].shape))

    def train(self, mode: bool = True) -> BoundedModule:
        """Training or evaluation mode of what this module computes; the network itself keeps its own mode.

        A new module is in evaluation mode, as auto_LiRPA's are.
        """
        self.training = mode
        self._forget()
        return self

    @contextlib.contextmanager
    def _mode(self, training: bool) -> Iterator[None]:
        """The network in a mode, for a while."""
        others = [module for module in self.net.modules() if module.training != training]
        for module in others:
            module.training = training
        try:
            yield
        finally:
            for module in others:
                module.training = not training

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The network's parameters under its own names."""
        yield from self.net.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """The network's buffers under its own names."""
        yield from self.net.named_buffers(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Takes the names of auto_LiRPA's state (``/1.param``) and the network's own (``fc.weight``)."""
        names = {
            node.ori_name: f"{name}.{'param' if isinstance(node, BoundParams) else 'buffer'}"
            for name, node in self._all().by_name.items()
            if isinstance(node, (BoundParams, BoundBuffers))
        }
        own = self.net.state_dict()
        for key in [key for key in state_dict if key.startswith(prefix)]:
            name = key[len(prefix) :]
            if name in names:
                state_dict[prefix + names[name]] = state_dict.pop(key)
            elif name in own:  # unused by the forward, as num_batches_tracked is
                own[name].copy_(state_dict.pop(key))
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ---- introspection ------------------------------------------------------------------------------

    def nodes(self) -> Iterable[Bound]:
        """All nodes: inputs and parameters first, then operators in topological order."""
        return self._all().by_name.values()

    def __getitem__(self, name: str) -> Bound:
        return self._all().by_name[name]

    @property
    def input_name(self) -> list[str]:
        """Names of the inputs, then of the parameters and buffers."""
        return list(self._all().roots)

    @property
    def root_names(self) -> list[str]:
        return list(self._all().roots)

    @property
    def output_name(self) -> list[str]:
        return [self._all().output]

    @property
    def final_name(self) -> str:
        return self._all().output

    def final_node(self) -> Bound:
        """The node of the output."""
        return self[self.final_name]

    def roots(self) -> list[Bound]:
        """Inputs, parameters and buffers."""
        return [self[name] for name in self.root_names]

    @property
    def relus(self) -> list[Bound]:
        """The ReLU nodes in order."""
        return [node for node in self.nodes() if type(node).__name__ == "BoundRelu"]

    def get_splittable_activations(self) -> list[Bound]:
        """Activations that branch and bound could split."""
        return [node for node in self.nodes() if node.nonlinear and node.perturbed]

    get_enabled_opt_act = get_perturbed_optimizable_activations = get_splittable_activations
    optimizable_activations = perturbed_optimizable_activations = splittable_activations = property(
        get_splittable_activations
    )

    def get_layers_requiring_bounds(self) -> list[Bound]:
        """Nodes whose bounds relaxations read: the inputs of activations."""
        found = {node.inputs[0].name: node.inputs[0] for node in self.get_splittable_activations()}
        return [node for node in found.values() if node.perturbed]

    @property
    def layers_requiring_bounds(self) -> list[Bound]:
        return self.get_layers_requiring_bounds()

    def get_split_nodes(self) -> tuple[list[Bound], dict[str, list[tuple[Bound, int]]]]:
        """The inputs of splittable activations, and of each its ``(activation, 0)``."""
        activations = self.get_splittable_activations()
        layers = self.get_layers_requiring_bounds()
        split = {layer.name: [(act, 0) for act in activations if act.inputs[0] is layer] for layer in layers}
        return layers, split

    @property
    def bound_opts(self) -> dict[str, Any]:
        """The options in force; change them by :meth:`set_bound_opts`."""
        return self._opts.values

    def set_bound_opts(self, new_opts: dict[str, Any]) -> None:
        """Changes options; ``optimize_bound_args`` is merged key by key."""
        self._opts.update(new_opts)

    def visualize(self, output_path: str) -> None:
        """Writes the nodes as a graph in the DOT language to ``output_path.dot``."""
        lines = ["digraph {"]
        for node in self.nodes():
            label = f"{node.name}\\n{type(node).__name__}"
            lines.append(f'  "{node.name}" [label="{label}"];')
            lines += [f'  "{source.name}" -> "{node.name}";' for source in node.inputs]
        path = pathlib.Path(f"{output_path}.dot")
        path.write_text("\n".join([*lines, "}"]) + "\n")

    # ---- forward ------------------------------------------------------------------------------------

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """The network, or with ``method_opt="compute_bounds"`` :meth:`compute_bounds`."""
        method = kwargs.pop("method_opt", "forward")
        for name in ("disable_multi_gpu", "no_replicas", "get_property", "node_class", "att_name"):
            kwargs.pop(name, None)
        if method == "compute_bounds":
            return self.compute_bounds(*inputs, **kwargs)
        return self.forward(*inputs, **kwargs)

    def forward(
        self,
        *x: Any,
        final_node_name: str | None = None,
        interm_bounds: Any = None,
        clear_forward_only: bool = False,
        reset_perturbed_nodes: bool = True,
        cache_bounds: bool = False,
    ) -> Tensor:
        """The network's output, or the value of a node; inputs are remembered for the next :meth:`compute_bounds`."""
        self.set_input(*x)
        assert self._x is not None
        values = tuple(plain(value) for value in self._x)
        final = self._final(final_node_name)
        with self._mode(self.training):
            if final is None:
                return self.net(*values)
            graph = self._network.engine.graph
            statistics = reference.clean_statistics(graph, *values)
            return reference.evaluate(graph, *values, until=final, statistics=statistics)

    def set_input(self, *x: Any, **_: Any) -> None:
        """Remembers inputs, and forgets what was computed for the ones before."""
        self._x = tuple(unpack_inputs(x))
        for node, value in zip(self._input_nodes(), self._x):
            node.value = value
            node.perturbation = getattr(value, "ptb", None)
        self._forget()

    def _input_nodes(self) -> list[Any]:
        return [] if self._nodes is None else [self._nodes.by_name[name] for name in self._nodes.inputs]

    def _forget(self) -> None:
        self._inputs, self._question, self._intermediate, self._ibp = None, None, None, None
        self._boxes, self._layers = {}, {}

    def _final(self, final_node_name: str | None) -> int | None:
        """Number of the node that ``final_node_name`` is in pycert's graph, None for the output."""
        if final_node_name is None or final_node_name == self.final_name:
            return None
        node = self._all().by_name.get(final_node_name)
        if node is None or node.link is None:
            raise ValueError(f"final_node_name: {final_node_name!r} is no node that has bounds")
        if self._network.fused or self._constrained():
            raise NotImplementedError(
                f"final_node_name must be the output, {self.final_name!r}, with loss fusion or output "
                f"constraints, got {final_node_name!r}"
            )
        return node.link

    # ---- bounds -------------------------------------------------------------------------------------

    def compute_bounds(
        self,
        x: Any = None,
        aux: Any = None,
        C: Tensor | None = None,
        method: str | None = "backward",
        IBP: bool = False,
        forward: bool = False,
        bound_lower: bool = True,
        bound_upper: bool = True,
        reuse_ibp: bool = False,
        reuse_alpha: bool = False,
        return_A: bool = False,
        needed_A_dict: dict[str, Any] | None = None,
        final_node_name: str | None = None,
        average_A: bool = False,
        interm_bounds: dict[str, Any] | None = None,
        reference_bounds: dict[str, Any] | None = None,
        intermediate_constr: Any = None,
        alpha_idx: Any = None,
        aux_reference_bounds: dict[str, Any] | None = None,
        need_A_only: bool = False,
        cutter: Any = None,
        decision_thresh: Any = None,
        update_mask: Any = None,
        ibp_nodes: Any = None,
        cache_bounds: bool = False,
    ) -> Any:
        """Bounds of the output, or of ``C @ output``.

        Args:
            x: the input or a tuple of them, perturbed ones as ``BoundedTensor``; by default those of the
                last call. With the same inputs, intermediate bounds stay of the method that came first,
                so that ``method="backward"`` after ``IBP=True`` is CROWN-IBP, as in auto_LiRPA.
            aux: handed to perturbations of one's own.
            C: ``[B, S, n_out]`` (or ``[1, S, n_out]``).
            method: ``IBP``, ``CROWN`` (``backward``), ``CROWN-IBP``, ``forward``, ``forward+backward``,
                ``CROWN-Optimized`` (``alpha-CROWN``), in any case; None with ``IBP=True``.
            IBP: intermediate bounds (or, with ``method=None``, all) by intervals.
            forward: with ``method=None``: linear functions propagated forward.
            bound_lower, bound_upper: which side; the other is None.
            reuse_ibp: with ``IBP=True, method=None``: the last call's result, where ``x`` is not given and ``C`` is
                that call's.
            reuse_alpha: after ``CROWN-Optimized``, optimise slopes again where they would be taken over.
            return_A: also return a dictionary of the linear functions that ``needed_A_dict`` asks for.
            needed_A_dict: name of a node -> names of inputs.
            final_node_name: the node that is bounded, by default the output.
            average_A: without meaning: it is about perturbed weights.
            interm_bounds: name of an activation's input -> ``(lower, upper)``, taken as they are.
            reference_bounds, aux_reference_bounds: the same, intersected with what is found.
            decision_thresh: lower bounds above it are not optimised further.
            need_A_only, ibp_nodes, cache_bounds: accepted, without meaning.

        Returns:
            ``(lower, upper)``, each ``[B, *out]``, or ``[B, S]`` with ``C``; with ``return_A`` and linear
            bounds also ``{start: {input: {"lA", "uA", "lbias", "ubias", "unstable_idx"}}}``, ``lA`` of shape
            ``[B, S, *in]``, ``lbias`` ``[B, S]``.

        Raises:
            ValueError: an unknown method or node name, or no input.
            NotImplementedError: ``intermediate_constr``, ``alpha_idx``, ``cutter``, ``update_mask``, names
                that have no linear function here, and a final node with loss fusion or output constraints.
        """
        for name, value in zip(_REFUSED, (intermediate_constr, alpha_idx, cutter, update_mask), strict=True):
            if value is not None:
                raise NotImplementedError(f"compute_bounds: {name} is not supported")
        if not (bound_lower or bound_upper):
            raise ValueError("compute_bounds: at least one of bound_lower and bound_upper must be True")
        final = self._final(final_node_name)
        chosen = _engine.method_of(method, IBP, forward)
        plain_ibp = chosen == "ibp" and method is None and final is None
        if plain_ibp and reuse_ibp and x is None and self._ibp is not None and self._ibp_rows is C:
            return self._ibp
        inputs = self._prepare_inputs(x, aux)
        chosen = self._after(chosen, reuse_alpha)
        question = Question(
            chosen, self._opts.of(chosen), self._rows(C, inputs), bound_lower, bound_upper,
            boxes=self._given_boxes(interm_bounds, reference_bounds, aux_reference_bounds), final=final,
        )  # fmt: skip
        if chosen == "alpha-crown" and not bound_upper and decision_thresh is not None:
            question.options["threshold"] = float(torch.as_tensor(decision_thresh).min())
        if chosen == "ibp" and final is None:
            self._ibp_rows = C
        with self._mode(self.training):
            return self._answer(inputs, question, return_A, needed_A_dict or {})

    def _prepare_inputs(self, x: Any, aux: Any) -> _engine.Inputs:
        if x is not None:
            self.set_input(*(x if isinstance(x, (tuple, list)) else (x,)))
            self._aux = aux
        if self._x is None:
            raise ValueError("compute_bounds: x is needed, since there was no call with inputs before")
        outward = self._opts.values["soundness"] != "none"
        self._inputs = self._network.inputs(self._x, self._aux, outward)  # anew: eps may have been set since
        return self._inputs

    def _after(self, method: str, reuse_alpha: bool) -> str:
        """The method, given what has been computed for the same inputs before."""
        if method == "crown" and self._intermediate == "ibp":
            method = "crown-ibp"
        if method == "crown" and reuse_alpha and self._optimised:
            method = "alpha-crown"
        self._intermediate = "ibp" if method in ("ibp", "crown-ibp") else "crown"
        self._optimised = self._optimised or method == "alpha-crown"
        return method

    def _rows(self, C: Any, inputs: _engine.Inputs) -> Tensor | None:
        if C is None or type(C).__name__ == "eyeC":  # auto_LiRPA's own form of the identity
            return None
        if not isinstance(C, Tensor):
            raise TypeError(f"compute_bounds: C must be a tensor [B, S, outputs], got {type(C).__name__}")
        rows = C.detach().to(inputs.like).flatten(2)
        return rows.expand(inputs.batch, *rows.shape[1:])

    def _given_boxes(self, given: Any, *references: Any) -> Any:
        known = self._boxes_by_number(given)
        reference: dict[int, tuple[Tensor, Tensor]] = {}
        for more in references:
            reference |= self._boxes_by_number(more)
        return (known, reference) if known or reference else None

    def _boxes_by_number(self, boxes: dict[str, Any] | None) -> dict[int, tuple[Tensor, Tensor]]:
        found: dict[int, tuple[Tensor, Tensor]] = {}
        engine = self._network.engine
        wanted = set(engine._program.preactivations)
        for name, box in (boxes or {}).items():
            if name not in self._all().by_name:
                raise ValueError(f"compute_bounds: bounds are given for {name!r}, which is no node")
            link = self[name].link
            if link is not None and link in wanted:
                found[link] = self._shaped(name, link, box[0]), self._shaped(name, link, box[1])
        return found

    def _shaped(self, name: str, link: int, end: Tensor) -> Tensor:
        """One end of a given box, ``[B, *node]``; of batch 1 it is the same for all samples."""
        assert self._inputs is not None
        shape = self._network.engine.graph.nodes[link].shape
        batch, size = self._inputs.batch, math.prod(shape)
        if end.numel() not in (size, batch * size):
            wanted, got = [batch, *shape], list(end.shape)
            raise ValueError(f"compute_bounds: bounds of {name!r} must have shape {wanted}, got {got}")
        return end.detach().to(self._like()).reshape(-1, *shape).expand(batch, *shape).contiguous()

    def _like(self) -> Tensor:
        assert self._inputs is not None
        return self._inputs.like

    def _answer(
        self, inputs: _engine.Inputs, question: Question, return_A: bool, needed: dict[str, Any]
    ) -> Any:
        self._question, self._boxes, self._layers = question, {}, {}
        linear = question.method != "ibp"
        # concretised in plain arithmetic: where more is asked for, the enclosing regions' bounds stand
        exact = question.options["soundness"] == "none" and any(
            ptb is not None and ptb.concretizes for ptb in inputs.perturbations
        )
        question.linear = linear and (return_A or exact)
        if self._network.fused and question.rows is None:
            ibp = question.method == "ibp"
            lower, upper, shift, bounds = _engine.fused_loss(self._network, inputs, question, ibp)
            self._note_shift(shift)
        else:
            engine = self._network.scores or self._network.engine
            if question.final is not None:
                engine = self._network.part(question.final)
            bounds = _engine.answer(engine, inputs.regions, question)
            if linear and exact:
                bounds = _engine.tightened(bounds, inputs)
            lower, upper = bounds.lower, bounds.upper
        if question.method == "ibp" and question.final is None:
            self._ibp = lower, upper
        if question.method == "alpha-crown" and self._constrained():
            lower, upper = self._under_constraints(inputs, question, lower, upper)
        if not (return_A and linear):
            return lower, upper
        return lower, upper, self._linear_functions(inputs, question, bounds, needed)

    def _note_shift(self, shift: Tensor) -> None:
        for node in self.nodes():
            if isinstance(node, BoundExp):
                node.max_input = shift

    def _linear_functions(
        self, inputs: _engine.Inputs, question: Question, bounds: Any, needed: dict[str, Any]
    ) -> dict[str, dict[str, dict[str, Any]]]:
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for start, ends in needed.items():
            node = self[start] if start in self._all().by_name else None
            if node is None or node.link is None:
                raise ValueError(f"needed_A_dict: {start!r} is no node with linear functions")
            if node.link != (self._network.engine.graph.output if question.final is None else question.final):
                boxes = _engine.layer_boxes(self._network.engine, inputs.regions, question)
                known = {number: box for number, box in boxes.items() if number < node.link}
                options = _engine._without_ascent(question.options)
                asked = Question("crown", options, linear=True, boxes=(known, {}))
                linear = _engine.answer(self._network.part(node.link), inputs.regions, asked).linear
            else:
                linear = bounds.linear
            assert linear is not None
            names = (ends,) if isinstance(ends, str) else tuple(ends)
            found[start] = {end: self._one_function(linear, end) for end in names}
        return found

    def _one_function(self, linear: Any, end: str) -> dict[str, Any]:
        inputs = self._all().inputs
        if end not in inputs:
            raise NotImplementedError(
                f"needed_A_dict: linear functions are given in terms of the inputs, {', '.join(inputs)}, "
                f"not of {end!r}"
            )
        number = inputs.index(end) + (2 if self._network.fused else 0)

        def of(A: Any) -> Any:
            return A[number] if isinstance(A, tuple) else A

        return {
            "lA": of(linear.A_lower),
            "uA": of(linear.A_upper),
            "lbias": linear.c_lower,
            "ubias": linear.c_upper,
            "unstable_idx": None,
        }

    # ---- output constraints and solvers ------------------------------------------------------------

    def _constrained(self) -> bool:
        ascent = self._opts.values["optimize_bound_args"]
        return self.constraints is not None and bool(ascent["apply_output_constraints_to"])

    def _under_constraints(
        self, inputs: _engine.Inputs, question: Question, lower: Tensor | None, upper: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Bounds of outputs, and where asked for of inputs, that hold where the output constraints do."""
        if question.options["soundness"] != "none" or len(inputs.regions) != 1 or self._network.fused:
            raise NotImplementedError(
                "output constraints are supported for networks of one input with soundness 'none'"
            )
        assert self.constraints is not None and self.thresholds is not None
        if lower is None or upper is None:
            raise NotImplementedError("output constraints need both bound_lower and bound_upper")
        graph, region = self._network.engine.graph, inputs.regions[0]
        boxes = _engine.layer_boxes(self._network.engine, inputs.regions, question)
        outputs, ends = [], []
        for sample in range(inputs.batch):
            constraints = self.constraints[min(sample, len(self.constraints) - 1)]
            one = output_constraints.sample_of(graph, boxes, region, constraints, self.thresholds, sample)
            for _ in range(_ROUNDS):
                one.tighten()
            rows = None if question.rows is None else question.rows[sample]
            outputs.append(one.output(rows, lower[sample], upper[sample]))
            ends.append((one.lower.view_as(region.lower[0]), one.upper.view_as(region.lower[0])))
        if self._opts.values["optimize_bound_args"]["tighten_input_bounds"]:
            tightened = [torch.stack(parts) for parts in zip(*ends, strict=True)]
            self._all()
            self._input_nodes()[0].perturbation = PerturbationLpNorm(x_L=tightened[0], x_U=tightened[1])
        return torch.stack([low for low, _ in outputs]), torch.stack([high for _, high in outputs])

    def build_solver_module(
        self,
        x: Any = None,
        C: Tensor | None = None,
        interm_bounds: dict[str, Any] | None = None,
        final_node_name: str | None = None,
        model_type: str = "mip",
        solver_pkg: str = "gurobi",
        set_input: bool = True,
    ) -> list[Any]:
        """A Gurobi model of a ReLU network in ``solver_model``; returns the variables of a node.

        Args:
            x: inputs of batch 1; by default those of the last call, whose intermediate bounds are used.
            C: rows ``[1, S, n_out]`` for the output's variables.
            interm_bounds: as in :meth:`compute_bounds`; infinite ones are computed by intervals.
            final_node_name: the node whose variables are wanted, by default the output.
            model_type: ``"lp"`` or ``"mip"``.
            solver_pkg: ``"gurobi"``.
            set_input: without meaning.

        Raises:
            ImportError, ValueError, NotImplementedError, UnsupportedOperator: see ``solver_module.build``.
        """
        if solver_pkg != "gurobi":
            raise NotImplementedError(f"build_solver_module: solver_pkg must be 'gurobi', got {solver_pkg!r}")
        inputs = self._prepare_inputs(x, None)
        if inputs.batch != 1 or len(inputs.regions) != 1:
            raise NotImplementedError("build_solver_module: one input of batch 1 is supported")
        if x is not None or self._question is None:
            self._question = Question("ibp", self._opts.of("ibp"))
        node = self[final_node_name or self.final_name]
        if node.link is None:
            raise ValueError(f"build_solver_module: node {node.name!r} has no counterpart in pycert's graph")
        with self._mode(self.training):
            boxes = _engine.layer_boxes(self._network.engine, inputs.regions, self._question)
            for number, (lower, upper) in self._boxes_by_number(interm_bounds).items():
                low, high = boxes[number]
                boxes[number] = torch.maximum(lower, low), torch.minimum(upper, high)
            rows = None if C is None else C.flatten(2)[0]
            self.solver_model, variables = solver_module.build(
                self._network.engine.graph, node.link, boxes, inputs.values[0], inputs.perturbations[0],
                model_type, rows,
            )  # fmt: skip
        return variables

    # ---- what the last call has used ----------------------------------------------------------------

    def _look_up(self, node: Bound) -> tuple[Tensor | None, Tensor | None]:
        """Bounds of a node from the last call of :meth:`compute_bounds`, computed when asked for."""
        if isinstance(node, (BoundParams, BoundBuffers)):
            value = node.param if isinstance(node, BoundParams) else node.buffer
            return value, value
        if self._question is None or node.link is None:
            return None, None
        state = self._state()
        if state != self._boxes_of:  # boxes of one network and region do not go with others
            self._boxes, self._layers, self._boxes_of = {}, {}, state
        if node.link not in self._boxes:
            inputs = self._prepare_inputs(None, None)
            if self._network.fused:
                raise NotImplementedError(f"bounds of node {node.name!r} are not kept with loss fusion")
            with self._mode(self.training):
                if not self._layers:
                    engine = self._network.engine
                    self._layers = _engine.layer_boxes(engine, inputs.regions, self._question)
                self._boxes[node.link] = _engine.node_box(
                    self._network, inputs, self._question, node.link, self._layers
                )
        lower, upper = self._boxes[node.link]
        if node.output_shape is None:
            return lower, upper
        shape = (lower.shape[0], *node.output_shape[1:])
        return lower.reshape(shape), upper.reshape(shape)

    def _state(self) -> tuple[Any, ...]:
        """What tells whether weights, inputs and their perturbations are those of a moment ago."""
        ptbs = [getattr(value, "ptb", None) for value in self._x or ()]
        ends = [getattr(ptb, name, None) for ptb in ptbs for name in ("eps", "x_L", "x_U")]
        values = [*self.parameters(), *self.buffers(), *(self._x or ()), *ends]
        return tuple(
            (id(v), 0 if v.is_inference() else v._version) if isinstance(v, Tensor) else v for v in values
        )

    def save_intermediate(self, save_path: str | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Bounds of all nodes from the last call, as :meth:`compute_bounds` takes by ``interm_bounds``.

        Nodes without a counterpart in pycert's graph are left out: it has fewer. Before any call, interval
        bounds are computed.
        """
        if self._question is None:
            self.compute_bounds(IBP=True, method=None)
        saved: dict[str, tuple[Tensor, Tensor]] = OrderedDict()
        for node in self.nodes():
            stateful = isinstance(node, BoundInput) and not node.perturbed
            if node.perturbed and not stateful and node.lower is not None and node.upper is not None:
                saved[node.name] = (node.lower, node.upper)
        if save_path is not None:
            torch.save(saved, save_path)
        return saved

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundedModule:
        made = BoundedModule(copy.deepcopy(self.net, memo), self.global_input, device="auto")
        made._opts = copy.deepcopy(self._opts)
        return made

    def extra_repr(self) -> str:
        return f"{len(self._network.engine.graph.nodes)} operators"


def _device_of(model: nn.Module, example: Tensor) -> torch.device:
    first = next(model.parameters(), None)
    return example.device if first is None else first.device


def _refuse_perturbed(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if isinstance(parameter, BoundedParameter) and parameter.ptb is not None:
            raise NotImplementedError(
                f"bounds over perturbed weights are not supported: parameter {name!r} is a BoundedParameter"
            )
