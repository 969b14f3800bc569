"""Shadows of modules: what tracing runs instead of the user's modules, which it never changes.

A shadow is a shallow copy that shares parameters and buffers, has shadows as children, notes where
the forward stands and refuses what a trace cannot follow. Nothing of torch is patched, so that
other threads may run, train and trace the same modules meanwhile.
"""

from __future__ import annotations

import collections
import copy
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pycert.errors import UnsupportedOperator
from pycert.graph.ir import Slot

#: Replaces the forward of a module: takes what the module is called with.
Forward = Callable[..., Any]
#: Wraps the forward of a module standing at a path: ``(module, path, forward) -> forward``.
Wrap = Callable[[nn.Module, str, Forward], Forward]

_QUANTISED = ("torch.ao.nn.", "torch.nn.quantized", "torch.nn.qat", "torch.nn.intrinsic", "torchao.")
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and torch.compile wrappers."""
    while True:
        if isinstance(module, _WRAPPERS):
            module = module.module
        elif type(module).__name__ == "OptimizedModule" and isinstance(
            module._modules.get("_orig_mod"), nn.Module
        ):
            module = module._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return module


def refuse_module(module: nn.Module, path: str) -> None:
    """Raises UnsupportedOperator for modules that cannot be traced whatever they compute."""
    kind = f"{type(module).__module__}.{type(module).__name__}"
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedOperator(path, "torch.jit.ScriptModule", "trace the nn.Module it was made from")
    if kind.startswith(_QUANTISED):
        raise UnsupportedOperator(path, f"quantised module {kind}", "bound the float model it was made from")
    if kind.startswith("torch.distributed.fsdp"):
        raise UnsupportedOperator(path, type(module).__name__, "trace the module before it is sharded")
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
        raise UnsupportedOperator(
            path, f"uninitialised {type(module).__name__}", "run the module once on an example first"
        )


def walk(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``(path, module)`` of a module and all below it, wrappers taken off, each module once.

    First those that are registered, then those that plain attributes, lists, tuples and dicts of them hold.
    """
    seen: set[int] = set()
    waiting = [("", module)]
    for start in waiting:
        for path, found in _registered(*start, seen):
            yield path, found
            waiting.extend(_unregistered(found, path))


def _registered(path: str, module: nn.Module, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    module = unwrap(module)
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _registered(_below(path, name), child, seen)


def _unregistered(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules that a module holds in plain attributes, but for those that cannot be traced: they may not be used."""
    for name, value in module.__dict__.items():
        items: Any = ()
        if isinstance(value, nn.Module):
            items = [(name, value)]
        elif type(value) in (list, tuple):
            items = [(f"{name}.{number}", item) for number, item in enumerate(value)]
        elif type(value) is dict and name != "_modules":
            items = [(f"{name}.{key}", item) for key, item in value.items()]
        for place, item in items:
            if isinstance(item, nn.Module) and _traceable(item):
                yield _below(path, place), item


def _traceable(module: nn.Module) -> bool:
    try:
        for path, inner in _registered("", module, set()):
            refuse_module(inner, path)
    except UnsupportedOperator:
        return False
    return True


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of a module's own parameters, buffers and plain tensor attributes."""
    for found in (module._parameters, module._buffers, module.__dict__):
        for name, value in found.items():
            if isinstance(value, Tensor):
                yield name, value


class Shadows:
    """Shadows of a module tree and, by ``id``, the slots of every live tensor in it."""

    def __init__(self, root: nn.Module, wrap: Wrap) -> None:
        self.slots: dict[int, list[Slot]] = {}
        self.keep: list[Tensor] = []  # ids stay valid as long as the tensors live
        originals = list(walk(root))
        self._shadow_of = {id(module): _empty_like(module) for _, module in originals}
        for path, module in originals:
            refuse_module(module, path)
            for name, value in tensors_of(module):
                self.own(value, Slot(module, name, f"{path}.{name}" if path else name))
            self._fill(module, path, wrap)
        self.root = self._shadow_of[id(unwrap(root))]

    def own(self, value: Tensor, slot: Slot) -> None:
        self.slots.setdefault(id(value), []).append(slot)
        self.keep.append(value)

    def _fill(self, module: nn.Module, path: str, wrap: Wrap) -> None:
        shadow = self._shadow_of[id(module)]
        state = {name: self._plain(value) for name, value in module.__dict__.items()}
        for name in ("_parameters", "_buffers"):
            state[name] = dict(state[name])
        state["_modules"] = {name: self._child(child) for name, child in module._modules.items()}
        for name in _HOOKS:
            state[name] = collections.OrderedDict(
                (key, _observer(hook, path)) for key, hook in module.__dict__[name].items()
            )
        state["_backward_hooks"] = collections.OrderedDict()
        state["_backward_pre_hooks"] = collections.OrderedDict()
        state["_compiled_call_impl"] = None
        shadow.__dict__.update(state)
        self._add_parametrized(module, shadow, path)
        shadow.__dict__["forward"] = wrap(module, path, _forward_of(module, shadow))

    def _child(self, child: nn.Module | None) -> nn.Module | None:
        return None if child is None else self._shadow_of.get(id(unwrap(child)), child)

    def _plain(self, value: Any) -> Any:
        """Shadows in place of modules in an attribute, a list, a tuple or a dict of modules."""
        if isinstance(value, nn.Module):
            return self._child(value)
        if type(value) in (list, tuple) and any(isinstance(item, nn.Module) for item in value):
            return type(value)(self._plain(item) for item in value)
        if type(value) is dict and any(isinstance(item, nn.Module) for item in value.values()):
            return {key: self._plain(item) for key, item in value.items()}
        return value

    def _add_parametrized(self, module: nn.Module, shadow: nn.Module, path: str) -> None:
        if not parametrize.is_parametrized(module):
            return
        for name, chain in module.parametrizations.items():  # type: ignore[union-attr, operator]
            with torch.no_grad():
                # Only shape and dtype matter; in training mode spectral_norm would advance its power iteration.
                value = copy.deepcopy(chain).eval()() if chain.training else getattr(module, name)
            shadow.__dict__[name] = value
            self.own(value, Slot(module, name, f"{path}.{name}" if path else name))


def _empty_like(module: nn.Module) -> nn.Module:
    kind = parametrize.type_before_parametrizations(module)
    return object.__new__(kind)


def _forward_of(module: nn.Module, shadow: nn.Module) -> Forward:
    own = module.__dict__.get("forward")
    if own is None:
        return functools.partial(type(shadow).forward, shadow)
    if isinstance(own, types.MethodType) and own.__self__ is module:
        return types.MethodType(own.__func__, shadow)
    return own


def _observer(hook: Callable[..., Any], path: str) -> Callable[..., Any]:
    """The hook, refused where it changes what the module takes or gives (its own tensors it may set)."""

    def observe(*args: Any, **kwargs: Any) -> None:
        if hook(*args, **kwargs) is not None:
            name = getattr(hook, "__qualname__", type(hook).__name__)
            raise UnsupportedOperator(
                path,
                f"forward hook {name} that changes values",
                "move what it does into the module's forward",
            )

    return observe
