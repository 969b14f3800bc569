"""``BoundDataParallel``: one device, or a pointer to distributed training."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class BoundDataParallel(nn.Module):
    """A bounded module on one device, with the calls of auto_LiRPA's wrapper for several.

    Args:
        module: a ``BoundedModule``.
        device_ids: at most one device.

    Raises:
        NotImplementedError: several devices are asked for.
    """

    def __init__(self, module: nn.Module, device_ids: list[Any] | None = None, **_: Any) -> None:
        super().__init__()
        if device_ids is not None and len(device_ids) > 1:
            raise NotImplementedError(
                f"BoundDataParallel: got {len(device_ids)} devices, one is supported. Run one process a device "
                "instead, as `torchrun --nproc-per-node=N script.py` with "
                "torch.nn.parallel.DistributedDataParallel around the network"
            )
        self.module = module

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The network, or with ``method_opt="compute_bounds"`` its bounds."""
        if kwargs.pop("get_property", False):
            return self.get_property(self.module, *inputs, **kwargs)
        for name in ("disable_multi_gpu", "no_replicas"):
            kwargs.pop(name, None)
        return self.module(*inputs, **kwargs)

    @staticmethod
    def get_property(model: nn.Module, node_class: type | None = None, att_name: str | None = None) -> Any:
        """An attribute of the last node of a class."""
        nodes = model.module.nodes() if isinstance(model, BoundDataParallel) else model.nodes()  # type: ignore[operator]
        for node in reversed(list(nodes)):
            if node_class is not None and isinstance(node, node_class):
                return getattr(node, att_name or "lower")
        return None

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.named_parameters(*args, **kwargs)

    def compute_bounds(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        return self.module.compute_bounds(*args, **kwargs)  # type: ignore[operator]
