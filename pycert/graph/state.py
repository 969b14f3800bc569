"""What a trace has followed beside tensors: options, flags, hooks. Where they change, the network is traced again.

Values of parameters and buffers are read anew at every use of a graph. All else that a forward reads from its modules
(a stride, a slope, ``training``, which parameters there are, hooks, numbers in lists) shapes the trace. Whether a
change of it matters cannot be told from outside, so the network is traced again and the traces are compared.
"""

from __future__ import annotations

import collections
import itertools
import operator
import types
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pycert import _C
from pycert.errors import UnsupportedOperator
from pycert.graph.ir import Slot
from pycert.graph.modules import walk

if TYPE_CHECKING:
    from pycert.graph.ir import Graph

_DEPTH = 4  # of containers in containers
_LARGE = 4096  # elements of a container or array beyond which its identity counts alone
_KEPT = 4  # states known to give the trace, as of training and evaluation mode in turn
_IGNORED = frozenset(
    """_backward_hooks _backward_pre_hooks _state_dict_hooks _state_dict_pre_hooks _load_state_dict_pre_hooks
    _load_state_dict_post_hooks _non_persistent_buffers_set _is_full_backward_hook""".split()
)
_ATOMS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.Size,
    np.generic,
)
_OPAQUE = (nn.Module, type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


class _Same:
    """A value that equals itself alone; held, so that nothing else gets its identity."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return getattr(self.value, "__qualname__", type(self.value).__name__)


class Watch:
    """The state of a network's modules when it was traced, and since then wherever the trace was the same."""

    def __init__(self, root: nn.Module, examples: tuple[Tensor, ...], graph: Graph) -> None:
        self.root, self.graph = root, graph
        self._examples = [(tuple(item.shape), item.dtype, item.device) for item in examples]
        self._glance: _Glance | None = None
        self._known: list[dict[str, Any]] = []
        self._keep()

    def __getstate__(self) -> dict[str, Any]:
        """Without what was seen, which names objects by identity: a copy is traced at its first use."""
        return {**self.__dict__, "_glance": None, "_known": []}

    def holds(self) -> bool:
        """Whether the modules are as they were, by a quick look."""
        settled = self._hooks is _no_hooks() and self._dtype == self._present_dtype()
        return settled and self._glance is not None and self._glance.holds()

    def check(self) -> None:
        """Traces again where the modules are not as they were; cheap where they are.

        Raises:
            RuntimeError: the network is not the one that was traced.
            UnsupportedOperator: it can no longer be traced.
        """
        if self.holds():
            return
        now = _state_of(self.root)
        if now not in self._known:
            self._trace_again(now)
        self._keep(now)

    def _keep(self, now: dict[str, Any] | None = None) -> None:
        now = _state_of(self.root) if now is None else now
        self._hooks, self._dtype = _no_hooks(), self._present_dtype()
        self._glance = _Glance(self.root)
        self._known = [now, *(state for state in self._known if state != now)][:_KEPT]

    def _present_dtype(self) -> torch.dtype | None:
        """Of the first parameter or buffer of the graph: casts change tensors in place."""
        for slot in self.graph.slots:
            if isinstance(slot, Slot):
                value = slot.owner._parameters.get(slot.name, slot.owner._buffers.get(slot.name))
                if value is not None and value.dtype in (torch.float32, torch.float64):
                    return value.dtype
        return None

    def _trace_again(self, now: dict[str, Any]) -> None:
        from pycert.graph.trace import same, trace  # they need this module

        what = _difference(self._known[0], now) if self._known else "its modules"
        dtype = self._present_dtype()
        examples = tuple(
            torch.zeros((), dtype=dtype or given, device=device).expand(shape)
            for shape, given, device in self._examples
        )
        message = (
            f"{what} since the network was traced, and with it what it computes: make a new BoundedModule"
        )
        try:
            equal = same(self.graph, trace(self.root, examples))
        except UnsupportedOperator:
            raise
        except Exception as error:
            raise RuntimeError(f"{message} (tracing it again says: {error})") from error
        if not equal:
            raise RuntimeError(message)


class _Glance:
    """A quick look at all modules: the same objects under the same names, containers with the same content."""

    def __init__(self, root: nn.Module) -> None:
        modules = [module for _, module in walk(root)]
        self._modules, self._owns = modules, [module.__dict__ for module in modules]
        self._types = [type(module) for module in modules]
        self._forwards = {found: found.forward for found in self._types}
        self._dicts: list[dict[str, Any]] = []
        self._lists: list[tuple[Any, Any]] = []
        self._deep: list[tuple[Any, Any]] = []
        for own in self._owns:
            self._dicts.append(own)
            for name, value in own.items():
                if type(value) in (dict, collections.OrderedDict) and (
                    name in ("_parameters", "_buffers", "_modules") or not (value or name in _IGNORED)
                ):
                    self._dicts.append(value)
                elif type(value) is list and all(isinstance(item, _ATOMS) for item in value):
                    self._lists.append((value, value.copy()))
                elif name not in _IGNORED and not _unchanging(value):
                    self._deep.append((value, _token(value)))
        # as _C.same_entries reads them: each dict before its keys and values
        self._entries = [item for d in self._dicts for item in (d, *itertools.chain.from_iterable(d.items()))]

    def holds(self) -> bool:
        return (
            _C.same_entries(self._dicts, self._entries)
            and all(map(operator.is_, map(vars, self._modules), self._owns))
            and all(map(operator.is_, map(type, self._modules), self._types))
            and all(found.forward is seen for found, seen in self._forwards.items())
            and all(value == seen for value, seen in self._lists)
            and all(_token(value) == seen for value, seen in self._deep)
        )


def _unchanging(value: Any) -> bool:
    """Whether an object can only be replaced, or is read anew (a module's tensor) or a part of the walk (a module)."""
    if type(value) is tuple:
        return all(isinstance(item, _ATOMS) for item in value)
    return isinstance(value, (*_ATOMS, *_OPAQUE, Tensor))


def _state_of(root: nn.Module) -> dict[str, Any]:
    """By path, what a trace depends on; tensors of modules count by shape and dtype, for their values are live."""
    state: dict[str, Any] = {name: _token(getattr(torch.nn.modules.module, name)) for name in _GLOBAL_HOOKS}
    for path, module in walk(root):
        prefix = f"{path}." if path else ""
        state[path] = _Same(module)
        state[f"{prefix}forward"] = _Same(type(module).forward)
        for name, value in module.__dict__.items():
            if name in ("_parameters", "_buffers"):
                state.update({f"{prefix}{key}": _token(item) for key, item in value.items()})
            elif name not in _IGNORED:
                state[f"{prefix}{name}"] = _token(value)
    return state


def _token(value: Any, depth: int = 0) -> Any:
    """What compares equal as long as a trace that reads ``value`` stays the same."""
    if isinstance(value, _ATOMS):
        return value if value == value else repr(value)
    if isinstance(value, Tensor):  # of a module: read anew; in a container: by reference
        return (tuple(value.shape), value.dtype) if depth == 0 else (_Same(value), _version(value))
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes() if value.size <= _LARGE else _Same(value)
    if depth == _DEPTH or isinstance(value, _OPAQUE):
        return _Same(value)
    if isinstance(value, dict):
        return _Same(value) if len(value) > _LARGE else [(k, _token(v, depth + 1)) for k, v in value.items()]
    if isinstance(value, (list, tuple)):
        return _Same(value) if len(value) > _LARGE else [type(value), *(_token(v, depth + 1) for v in value)]
    if isinstance(value, (set, frozenset)):
        return frozenset(value)
    inner = getattr(value, "__dict__", None)
    return _Same(value) if not inner else [_Same(value), _token(inner, depth + 1)]


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version


def _no_hooks() -> Any:
    """None while torch has no global forward hooks: what is there is compared by value."""
    hooks = torch.nn.modules.module
    return None if not any(getattr(hooks, name) for name in _GLOBAL_HOOKS) else object()


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Names the first thing that changed, a module rather than the one that holds it."""
    for name in sorted((*now, *before), key=lambda name: name.rpartition(".")[2] == "_modules"):
        if name not in before or name not in now:
            return f"'{name}' has been {'set' if name in now else 'removed'}"
        if before[name] != now[name]:
            return f"'{name or 'the network'}' has changed{_values(before[name], now[name])}"
    return "its modules have changed"


def _values(before: Any, now: Any) -> str:
    shown = [_shown(token) for token in (before, now)]
    return f" from {shown[0]} to {shown[1]}" if all(shown) and shown[0] != shown[1] else ""


def _shown(token: Any) -> str:
    if isinstance(token, tuple) and len(token) == 2 and isinstance(token[0], tuple):
        return f"{str(token[1]).removeprefix('torch.')} of shape {list(token[0])}"
    return str(token) if isinstance(token, (bool, int, float, str, _Same, type(None))) else ""
