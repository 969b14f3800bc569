"""Runs a forward on stand-ins for values and lowers every torch function it calls to IR nodes."""

from __future__ import annotations

import collections
import contextlib
import inspect
import math
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pycert.errors import UnsupportedOperator
from pycert.graph import names
from pycert.graph.builder import Builder
from pycert.graph.ir import Constant, Pin, Source
from pycert.graph.live import LiveTensors, reads_parameter, tensors_in, widens
from pycert.graph.modules import Forward

#: Finds the lowering of a module that is not lowered by the functions in its forward.
Whole = Callable[["Tracer", nn.Module], "Callable[..., Any] | None"]
#: Lowerings by function name, filled by :func:`lowers` in the modules beside this one.
LOWERINGS: dict[str, Callable[..., Any]] = {}
#: Lowerings that need the function itself, as all movement of data does.
GENERIC: dict[str, Callable[..., Any]] = {}

_HOME = os.path.dirname(os.path.dirname(__file__))
#: Files that are not the user's: torch, the tracer, who calls it, and the module that stands for an ONNX file.
_SKIPPED_FILES = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.join(_HOME, "graph") + os.sep,
    os.path.join(_HOME, "onnx_import") + os.sep,
    os.path.join(_HOME, "bounded.py"),
)
_MOVEMENT = frozenset(("reshape", "gather", "concat"))  # never the main node of a layer


def lowers(*function_names: str, table: dict[str, Callable[..., Any]] = LOWERINGS) -> Callable[..., Any]:
    """Registers a lowering ``(tracer, *args, **kwargs)`` with the arguments of the torch function."""

    def register(lowering: Callable[..., Any]) -> Callable[..., Any]:
        table.update(dict.fromkeys(function_names, lowering))
        return lowering

    return register


class Memory:
    """What a value (the root) and its views share: an in-place change counts the version up."""

    def __init__(self, root: Traced) -> None:
        self.root, self.version = root, 0


class Traced(torch.Tensor):
    """Stands for a value of the network: a meta tensor ``[batch, *shape]`` that knows its node.

    ``place``: where the elements of one sample stand in the memory's root; None for all in order.
    ``certain``: False where torch shares memory or copies, depending on strides, as reshape does.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    node: int
    memory: Memory
    version: int
    place: Tensor | None
    certain: bool


class Tracer(TorchFunctionMode):
    """One run of a forward; a torch function mode, so it sees the calls of its own thread only."""

    def __init__(self, batch: int, dtype: torch.dtype, device: torch.device, whole: Whole) -> None:
        super().__init__()
        self._whole = whole
        self.batch, self.dtype, self.device = batch, dtype, device
        self.builder = Builder()
        self.batch_norms: list[nn.Module] = []
        self.eval_only: dict[int, tuple[str, nn.Module]] = {}
        self.differences: dict[tuple[int, int], int] = {}
        self.live = LiveTensors()
        self._stack: list[tuple[str, nn.Module]] = []
        self._base = ""
        self._uses: collections.Counter[str] = collections.Counter()

    # ---- where the forward stands -------------------------------------------------------------

    @property
    def path(self) -> str:
        """Path of the module that runs now."""
        return self._stack[-1][0] if self._stack else ""

    @property
    def module(self) -> nn.Module | None:
        """The module (of the user, not its shadow) that runs now."""
        return self._stack[-1][1] if self._stack else None

    def wrap_forward(self, module: nn.Module, path: str, forward: Forward) -> Forward:
        """The shadow's forward: notes the module, and asks for whole modules with a lowering of their own."""
        replaced = self._whole(self, module)

        def traced_forward(*args: Any, **kwargs: Any) -> Any:
            with self.inside(path, module):
                if replaced is None:
                    return forward(*args, **kwargs)
                return self.lower_module(replaced, *args, **kwargs)

        return traced_forward

    @contextlib.contextmanager
    def inside(self, path: str, module: nn.Module) -> Iterator[None]:
        self._stack.append((path, module))
        try:
            yield
        finally:
            self._stack.pop()

    def lower_module(self, lowering: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._base = self.path
        with torch._C.DisableTorchFunction():
            return lowering(*args, **kwargs)

    def refuse(self, kind: str, hint: str = "") -> NoReturn:
        """Raises UnsupportedOperator for what happens now, with module, type and source line."""
        module, where = self.module, _user_line()
        if module is not None and names.is_layer(module):
            kind = f"{names.layer_type(module).__name__} ({kind})"
        raise UnsupportedOperator(self.path, kind, "; ".join(part for part in (hint, where) if part))

    # ---- what lowerings build with ------------------------------------------------------------

    def emit(
        self,
        op: str,
        inputs: tuple[int, ...],
        shape: tuple[int, ...],
        params: tuple[int, ...] = (),
        helper: bool = False,
        **attrs: Any,
    ) -> int:
        """Appends a node; ``helper`` nodes only prepare the main node of what is being lowered."""
        return self.builder.emit(op, inputs, shape, params, self._name(op, helper), **attrs)

    def reshape(self, node: int, shape: tuple[int, ...], helper: bool = True) -> int:
        before = len(self.builder.nodes)
        result = self.builder.reshape(node, tuple(shape))
        return self._named(before, result, helper)

    def gather(
        self, node: int, index: Tensor, shape: tuple[int, ...], fill: float = 0.0, helper: bool = True
    ) -> int:
        before = len(self.builder.nodes)
        result = self.builder.gather(node, index, tuple(shape), fill=fill)
        return self._named(before, result, helper)

    def concat(self, nodes: list[int], shape: tuple[int, ...], helper: bool = True) -> int:
        before = len(self.builder.nodes)
        return self._named(before, self.builder.concat(nodes, tuple(shape)), helper)

    def shape(self, node: int) -> tuple[int, ...]:
        return self.builder.nodes[node].shape

    def node(self, value: Traced) -> int:
        """The node of a value; read again from the memory's root where that has been changed in place."""
        memory = value.memory
        if value.node < 0:
            self.refuse("the positions of a maximum or minimum", "only its values are bounded")
        if value.version != memory.version:
            if not value.certain or memory.root.version != memory.version:
                self.refuse(
                    "a value that may have been changed in place through another one that may share its memory",
                    "write the change without its in-place form",
                )
            shape, root = tuple(value.shape[1:]), memory.root.node
            value.node = (
                self.reshape(root, shape) if value.place is None else self.gather(root, value.place, shape)
            )
            value.version = memory.version
        return value.node

    def wrap(self, node: int, dtype: torch.dtype | None = None) -> Traced:
        """The stand-in for a node, with memory of its own."""
        shape = (self.batch, *self.shape(node))
        empty = torch.empty(shape, dtype=dtype or self.dtype, device="meta")
        value = torch.Tensor._make_subclass(Traced, empty)
        value.node, value.memory, value.version = node, Memory(value), 0
        value.place, value.certain = None, True
        return value

    def view(
        self,
        node: int,
        base: Traced,
        place: Tensor | None = None,
        certain: bool = True,
        dtype: torch.dtype | None = None,
    ) -> Traced:
        """The stand-in for a node that shares the memory of ``base``: elements ``place`` of a sample of it."""
        value = self.wrap(node, dtype or base.dtype)
        value.memory, value.version = base.memory, base.memory.version
        value.certain = base.certain and certain
        if place is None or base.place is None:
            value.place = base.place if place is None else place.reshape(-1)
        else:
            value.place = base.place[place.reshape(-1)]
        return value

    def stand_in(self, value: Traced) -> Tensor:
        """A constant of the shape, dtype and device of a value."""
        device = "cpu" if self.device.type == "meta" else self.device
        return torch.zeros((), dtype=value.dtype, device=device).expand(value.shape)

    def slot(self, value: Tensor) -> int:
        """Number of the slot that reads a live or constant tensor."""
        if isinstance(value, Traced):
            self.refuse(
                "a weight that depends on the input", "weights must be parameters, buffers or constants"
            )
        source = self.source(value)
        if source is None:
            self._known_device(value)
            source = self.live.remember(value, Constant(value, f"{self.path or 'network'}: constant"))
        return self.live.number(source)

    def source(self, value: Tensor) -> Source | None:
        """What a live tensor is read from; None for constants."""
        return self.live.source(value, self.module, self.path or "network")

    def compute(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``function`` of tensors that do not depend on the input: an expression where one of them is live."""
        if any(self.source(leaf) is not None for leaf in tensors_in((args, kwargs))):
            return self._express(function, names.function_name(function), args, kwargs)
        return function(*args, **kwargs)

    def pin(self, value: Tensor, use: str) -> Tensor:
        """A tensor whose value shapes the trace; refused for parameters, watched for buffers."""
        source = self.source(value)
        if source is not None:
            if isinstance(value, nn.Parameter) or reads_parameter(source):
                self.refuse(f"{use} that depends on a parameter", "its value would be frozen into the trace")
            self.live.pins.append(Pin(source, value.detach().clone()))
        return value

    def needs_eval(self) -> None:
        """Notes that the module that runs now, in evaluation mode, does something else in training mode."""
        module = self.module
        if module is not None and not module.training:
            self.eval_only[id(module)] = (self.path, module)

    # ---- torch functions ----------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = names.function_name(func)
        leaves = list(tensors_in((args, kwargs)))
        if torch._C._functorch.peek_interpreter_stack() is not None:
            self.refuse("a transform of torch.func (vmap, grad)", "write out what it computes")
        if any(isinstance(leaf, Traced) for leaf in leaves):
            return self._lower(func, name, args, kwargs, leaves)
        if name in names.RANDOM or (name in names.DROPOUT and self._drops(args, kwargs)):
            self.refuse(f"random function {name}", "bounds of a random network mean nothing")
        if any(self.source(leaf) is not None for leaf in leaves):
            return self._express(func, name, args, kwargs)
        return func(*args, **kwargs)

    def _lower(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Tensor]
    ) -> Any:
        for leaf in leaves:
            self._known_device(leaf)
        if name in names.METADATA:
            return self._metadata(func, name, args, kwargs)
        if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):  # off where the forward starts
            self.refuse("autocast in the forward", "it rounds values; leave it out")
        first = args[0] if args else kwargs.get("input", kwargs.get("self"))
        if name in names.FORM_OF_SECOND and not isinstance(first, Traced):
            return self.compute(
                func, *(self.stand_in(a) if isinstance(a, Traced) else a for a in args), **kwargs
            )
        self._base = self._path_of(name.strip("_"))
        plain, in_place = names.without_in_place(name)
        in_place = kwargs.pop("inplace", False) or in_place
        if kwargs.pop("out", None) is not None:
            self.refuse(f"{name} with out=", "use the value it returns")
        if plain in GENERIC:
            result = GENERIC[plain](self, func, plain, args, kwargs)
        elif plain in LOWERINGS:
            result = self._call(LOWERINGS[plain], name, args, kwargs)
        else:
            result = self._activation(func, name, first)
        return self._write(first, result, name) if in_place else result

    def _metadata(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "device":
            return self.device
        return func(self.stand_in(args[0])) if name in names.ON_DEVICE else func(*args, **kwargs)

    def _call(
        self, lowering: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return lowering(self, *args, **names.plain_keywords(kwargs))
        except TypeError:
            try:
                inspect.signature(lowering).bind(self, *args, **names.plain_keywords(kwargs))
            except TypeError as error:
                self.refuse(f"{name} with these arguments ({error})", names.hint(name))
            raise

    def _activation(self, func: Any, name: str, value: Any) -> Any:
        registered = names.registered_activation(func)
        if registered is None or not isinstance(value, Traced):
            self.refuse(names.display(func, name), names.hint(name))
        self._base = self._path_of(registered)
        node = self.node(value)
        return self.wrap(self.emit("custom", (node,), self.shape(node), name=registered), value.dtype)

    def _write(self, target: Any, result: Traced, name: str) -> Traced:
        """In-place semantics: ``target`` takes the node of the result, and so does what it is a view of.

        Other views read the root again when they are used. Where it is not certain that memory is
        shared, nobody else knows any more what is there.
        """
        if not isinstance(target, Traced):
            self.refuse(f"{name} of a value into a constant tensor", "use torch.cat, torch.stack or F.pad")
        if result.shape != target.shape:
            self.refuse(f"in-place {name} that changes the shape", "write it without the in-place form")
        memory, root = target.memory, target.memory.root
        follows = target.certain and root.version == memory.version
        memory.version += 1
        target.node, target.version = result.node, memory.version
        if follows and target is not root:
            root.node, root.version = self._insert(root, target), memory.version
        return target

    def _insert(self, root: Traced, part: Traced) -> int:
        """The root's node with the elements of a view of it replaced."""
        shape = self.shape(root.node)
        if part.place is None:
            return self.reshape(part.node, shape)
        index = torch.arange(math.prod(shape), device="cpu")
        index[part.place] = len(index) + torch.arange(len(part.place), device="cpu")
        joined = self.concat([root.node, part.node], (len(index) + len(part.place),))
        return self.gather(joined, index, shape)

    def _express(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in names.METADATA or name in names.FACTORIES:
            return func(*args, **kwargs)
        tensors = list(tensors_in((args, kwargs)))
        if names.without_in_place(name)[1] or kwargs.get("out") is not None:
            target = kwargs.get("out")
            source = self.source(target if isinstance(target, Tensor) else tensors[0])
            named = source.path if source is not None else "a constant"
            self.refuse(
                f"{name} changing '{named}' in the forward",
                "call .eval(), or change it outside of the forward",
            )
        with torch.no_grad():
            result = func(*args, **kwargs)
        if isinstance(result, Tensor) and any(result is leaf for leaf in tensors):
            return result
        path = self._path_of(name)
        if name in names.CASTS and widens(tensors[0], result):
            self.live.remember(result, self.source(tensors[0]) or Constant(tensors[0], path))
        elif not self.live.express(func, self._sources_in((args, kwargs)), result, path):
            for leaf in tensors:
                self.pin(leaf, f"{name}()")
        return result

    def _drops(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a dropout of a constant or a parameter is random; one that could be is watched."""
        training = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
        if not training:
            self.needs_eval()
        return bool(training)

    # ---- inner --------------------------------------------------------------------------------

    def _sources_in(self, value: Any) -> Any:
        """``value`` with sources in place of tensors, as Expression keeps its arguments."""
        if isinstance(value, Tensor):
            self._known_device(value)
            return self.source(value) or Constant(value, f"{self.path or 'network'}: constant")
        if isinstance(value, torch.Size):
            return tuple(value)
        if isinstance(value, (tuple, list)):
            return type(value)(self._sources_in(item) for item in value)
        if isinstance(value, dict):
            return {key: self._sources_in(item) for key, item in value.items()}
        return value

    def _known_device(self, value: Tensor) -> None:
        """Refuses a meta tensor that is neither a value nor live: a trace that was lost."""
        if not value.is_meta or isinstance(value, Traced) or self.device.type == "meta":
            return
        if self.source(value) is None:
            self.refuse(
                "a function that hides from torch_function (a C++ extension, DisableTorchFunction)",
                "write it with torch functions",
            )

    def _path_of(self, name: str) -> str:
        """A layer's own path; inside of a container or user module, that path and the function's name."""
        if self.module is not None and names.is_layer(self.module) and self.path:
            return self.path
        return f"{self.path}.{name}" if self.path else name

    def _name(self, op: str, helper: bool) -> str:
        """``base`` for the main node of a layer or function, ``base.op`` for others, numbered where used again."""
        layer = self.module is not None and names.is_layer(self.module) and self._base == self.path
        helper = helper or (layer and op in _MOVEMENT)
        path = f"{self._base}.{op}" if helper and self._base else self._base or op
        self._uses[path] += 1
        return path if self._uses[path] == 1 else f"{path}#{self._uses[path]}"

    def _named(self, before: int, node: int, helper: bool) -> int:
        """Gives the node a path where a builder's method has appended one."""
        for number in range(before, len(self.builder.nodes)):
            self.builder.nodes[number].path = self._name(self.builder.nodes[number].op, helper)
        return node


def _user_line() -> str:
    """``in FILE, line N`` of the innermost frame outside of torch and of the tracer."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_SKIPPED_FILES) and not file.startswith("<") and "contextlib" not in file:
            return f"in {os.path.basename(file)}, line {frame.f_lineno}"
        frame = frame.f_back
    return ""
