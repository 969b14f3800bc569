"""Tracing: parameters stay live, and graphs live as long and in as many places as modules do."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
import threading
import types

import numpy as np
import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import pycert
import pycert.nn
from pycert.errors import UnsupportedOperator
from pycert.graph import trace
from pycert.reference.graph import evaluate
from test_trace import Apply, Block, parameter, prepared, resnet


class Tied(nn.Module):
    """Everything a slot can be: parameters, buffers, attributes, expressions, constants."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize = pycert.nn.Normalize([0.1, 0.3], [0.5, 2.0])
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.scale = parameter(4, 1, 1)
        self.fc = nn.Linear(4, 6)
        self.decoder = nn.Linear(6, 4)
        self.decoder.weight = nn.Parameter(torch.randn(4, 6))
        self.shift = torch.randn(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(self.normalize(x))).relu() * self.scale.exp()
        x = self.fc(x.mean((2, 3))) + self.shift.to(x.dtype)
        return F.linear(self.decoder(x.tanh()), self.fc.weight) + torch.arange(6.0).to(x)


SHAPE = (2, 5, 4)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return prepared(Tied())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def traced(net: nn.Module, *shape: int):
    return trace(net, torch.empty(1, *(shape or SHAPE), dtype=torch.float64))


def assert_agree(graph, net: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(evaluate(graph, x), net(x), rtol=1e-12, atol=1e-12)


def test_an_optimiser_step_is_seen(net, x):
    graph = traced(net)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
    before = evaluate(graph, x)
    net(x).square().sum().backward()
    optimiser.step()
    assert_agree(graph, net, x)
    assert not torch.allclose(before, evaluate(graph, x))


def test_gradients_reach_every_parameter(net, x):
    graph = traced(net)
    weights = torch.randn(6, dtype=torch.float64)
    expected = torch.autograd.grad((net(x) @ weights).sum(), list(net.parameters()))
    found = torch.autograd.grad((evaluate(graph, x) @ weights).sum(), list(net.parameters()))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_load_state_dict_is_seen(net, x):
    graph = traced(net)
    state = {
        name: torch.rand_like(value) if value.is_floating_point() else value
        for name, value in net.state_dict().items()
    }
    net.load_state_dict(state)
    assert_agree(graph, net, x)


def test_load_state_dict_with_assignment_is_seen(net, x):
    graph = traced(net)
    net.load_state_dict({name: value.clone() * 0.5 for name, value in net.state_dict().items()}, assign=True)
    assert_agree(graph, net, x)


def test_replaced_parameters_buffers_and_attributes_are_seen(net, x):
    graph = traced(net)
    net.conv.weight = nn.Parameter(torch.randn_like(net.conv.weight))
    net.normalize.std = torch.tensor([3.0, 4.0], dtype=torch.float64)
    net.shift = torch.ones(6)
    assert_agree(graph, net, x)


def test_a_change_of_dtype_is_seen(net, x):
    graph = traced(net)
    net.float()
    found = evaluate(graph, x.float(), dtype=torch.float32)
    torch.testing.assert_close(found, net(x.float()), rtol=1e-5, atol=1e-5)


def test_functional_call_is_seen(net, x):
    graph = traced(net)
    other = {name: torch.randn_like(value) for name, value in net.named_parameters()}

    class Evaluate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return evaluate(graph, x)

    found = torch.func.functional_call(
        Evaluate(), {f"net.{name}": value for name, value in other.items()}, (x,)
    )
    torch.testing.assert_close(found, torch.func.functional_call(net, other, (x,)), rtol=1e-12, atol=1e-12)


def test_tracing_inside_functional_call_keeps_no_replaced_parameter(net, x):
    graphs = []

    class Trace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            graphs.append(traced(self.net))
            return x

    other = {f"net.{name}": torch.randn_like(value) for name, value in net.named_parameters()}
    torch.func.functional_call(Trace(), other, (x,))
    assert_agree(graphs[0], net, x)


def test_tied_weights_are_read_from_the_layer_that_uses_them(x):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
    net[2].weight = net[0].weight
    graph = traced(net, 4)
    net[2].weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
    assert_agree(graph, net, x[:, 0, 0])


def test_deepcopy_beside_the_module_refers_to_the_copy(net, x):
    graph = traced(net)
    net_copy, graph_copy = copy.deepcopy((net, graph))
    net.conv.weight.data.zero_()
    assert_agree(graph_copy, net_copy, x)
    owners = {id(module) for module in net_copy.modules()}
    assert all(id(module) in owners for module in graph_copy.batch_norms)
    net_copy.fc.weight.data.mul_(2)
    assert_agree(graph_copy, net_copy, x)


def test_graphs_pickle_with_their_module(net, x):
    graph = traced(net)
    net_copy, graph_copy = pickle.loads(pickle.dumps((net, graph)))
    net_copy.scale.data.mul_(2)
    assert_agree(graph_copy, net_copy, x)


def test_graphs_are_saved_by_torch(net, x):
    buffer = io.BytesIO()
    torch.save(traced(net), buffer)
    buffer.seek(0)
    torch.testing.assert_close(
        evaluate(torch.load(buffer, weights_only=False), x), net(x), rtol=1e-12, atol=1e-12
    )


def test_tracing_leaves_the_module_as_it_was(net, x):
    hooks = [
        net.conv.register_forward_hook(lambda *args: None),
        net.register_forward_pre_hook(lambda *args: None),
    ]
    before = {name: dict(module.__dict__) for name, module in net.named_modules()}
    graph = traced(net)
    for name, module in net.named_modules():
        assert before[name].keys() == module.__dict__.keys()
        assert all(value is module.__dict__[key] for key, value in before[name].items())
    assert len(net.conv._forward_hooks) == 1 and type(net.conv) is nn.Conv2d
    for hook in hooks:
        hook.remove()
    assert_agree(graph, net, x)


def test_threads_trace_and_run_the_same_module(net, x):
    expected, errors = net(x), []

    def work(number: int) -> None:
        try:
            for _ in range(5):
                if number % 2:
                    torch.testing.assert_close(evaluate(traced(net), x), expected, rtol=1e-12, atol=1e-12)
                else:
                    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_tracing_in_any_grad_mode(net, x, context):
    with context():
        graph = traced(net)
    found = evaluate(graph, x)
    assert found.requires_grad
    torch.testing.assert_close(found, net(x), rtol=1e-12, atol=1e-12)


def test_tracing_under_autocast(net, x):
    with torch.autocast("cpu", torch.bfloat16):
        graph = traced(net)
    assert_agree(graph, net, x)


def test_expressions_under_no_grad_pass_no_gradient():
    def forward(m, x):
        with torch.no_grad():
            factor = m.w * 2
        return x * factor + m.w

    net = Apply(forward, w=parameter(3))
    graph = trace(net, torch.empty(1, 3))
    (gradient,) = torch.autograd.grad(evaluate(graph, torch.full((1, 3), 5.0)).sum(), [net.w])
    assert torch.equal(gradient, torch.ones(3))


# ---- wrappers and parametrisations ------------------------------------------------------------


def test_data_parallel_is_taken_off(net, x):
    graph = traced(nn.DataParallel(net))
    assert "conv" in {node.path for node in graph.nodes}
    assert_agree(graph, net, x)


def test_distributed_data_parallel_is_taken_off(net, x):
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(f"{folder}/store", 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            wrapped = nn.parallel.DistributedDataParallel(net)
            graph = traced(wrapped)
            inner = traced(Apply(lambda m, x: m.inner(x) + 1, inner=wrapped))
        finally:
            torch.distributed.destroy_process_group()
    assert all(not slot.path.startswith("module.") for slot in graph.slots)
    assert_agree(graph, net, x)
    torch.testing.assert_close(evaluate(inner, x), net(x) + 1)


def test_compiled_modules_are_taken_off(net, x):
    assert_agree(traced(torch.compile(net)), net, x)
    compiled = copy.deepcopy(net)
    compiled.conv.compile()
    assert_agree(traced(nn.Sequential(torch.compile(compiled))), net, x)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.mT


def test_parametrised_weights_are_live(x):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
    parametrize.register_parametrization(net[0], "weight", Symmetric())
    parametrizations.weight_norm(net[2])
    graph = traced(net, 4)
    for value in net.parameters():
        value.data.add_(torch.randn_like(value))
    assert_agree(graph, net, x[:, 0, 0])
    assert evaluate(graph, x[:, 0, 0]).requires_grad
    assert [node.path for node in graph.nodes] == ["input", "0", "1", "2"]


@pytest.mark.parametrize("training", [True, False])
def test_spectral_norm_is_live_and_not_advanced_by_tracing(x, training):
    net = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4))).double().train(training)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    graph = traced(net, 4)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    net.eval()
    net[0].parametrizations.weight.original.data.mul_(torch.rand(4, 4))
    assert_agree(graph, net, x[:, 0, 0])


def test_hook_based_weight_norm_and_spectral_norm_are_live(x):
    with pytest.warns(FutureWarning):
        net = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.utils.spectral_norm(nn.Linear(4, 4)))
    net = net.double().eval()
    graph = traced(net, 4)
    net[0].weight_g.data.mul_(2)
    net[1].weight_orig.data.add_(1)
    assert_agree(graph, net, x[:, 0, 0])


def test_hook_based_spectral_norm_in_training_mode_is_refused(x):
    net = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4))).double().train()
    with pytest.raises(UnsupportedOperator, match="weight_[uv]"):
        traced(net, 4)


def test_pruned_weights_are_live(x):
    net = nn.Sequential(prune.random_unstructured(nn.Linear(4, 4), "weight", 0.5)).double()
    graph = traced(net, 4)
    net[0].weight_orig.data.mul_(3)
    net[0].weight_mask.zero_()[0, 0] = 1
    assert_agree(graph, net, x[:, 0, 0])


def test_parameters_outside_of_the_module_are_live(x):
    outside = parameter(4)
    net = Apply(lambda m, x: x * outside.exp() + outside)
    graph = trace(net, torch.empty(1, 4))
    outside.data.add_(1)
    sample = torch.randn(2, 4)
    torch.testing.assert_close(evaluate(graph, sample), net(sample))
    assert evaluate(graph, sample).requires_grad


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x * Doubled.apply(m.w),
        lambda m, x: Doubled.apply(x) * m.w,
        lambda m, x: x * torch.tensor(m.w),
        lambda m, x: x * torch.stack([value * 2 for value in m.w]),
        lambda m, x: x * m.state_dict()["w"],
        lambda m, x: x * nn.utils.parameters_to_vector(m.parameters()),
        lambda m, x: x * m.w.data.clamp(min=0.1),
        lambda m, x: torch.func.functional_call(m.fc, {"weight": torch.diag(m.w)}, (x,)),
        lambda m, x: x @ torch.linalg.qr(torch.diag(m.w) + 0.1).Q,
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_ways_to_read_a_parameter_are_live(function):
    net = Apply(function, w=parameter(4))
    object.__setattr__(net, "fc", nn.Linear(4, 4, bias=False))
    graph = trace(net, torch.empty(1, 4))
    net.w.data = torch.randn(4)
    sample = torch.randn(3, 4)
    torch.testing.assert_close(evaluate(graph, sample), net(sample))


def test_modules_in_plain_lists_are_found(x):
    net = Apply(lambda m, x: m.layers[1](m.layers[0](x)), a=nn.Linear(4, 4), b=nn.BatchNorm1d(4))
    net.layers = [net.a, net.b]
    graph = traced(net.double().train(), 4)
    assert [node.path for node in graph.nodes] == ["input", "a", "b"]


def test_a_replaced_forward_is_followed(x):
    net = nn.Sequential(nn.Linear(4, 4)).double()
    net.forward = lambda x: net[0](x) * 2
    assert_agree(traced(net, 4), net, x[:, 0, 0])


def test_modules_with_state_in_their_forward_are_not_changed(x):
    def forward(m, x):
        m.calls += 1
        m.last = x
        return x + m.calls - m.calls

    net = Apply(forward)
    net.calls = 0
    traced(net, 4)
    assert net.calls == 0 and not hasattr(net, "last")


def test_checkpointed_blocks_are_followed(x):
    from torch.utils.checkpoint import checkpoint

    net = Apply(lambda m, x: checkpoint(m.fc, x, use_reentrant=False), fc=nn.Linear(4, 4)).double()
    assert_agree(traced(net, 4), net, x[:, 0, 0])


# ---- what must stay as it was traced ----------------------------------------------------------


def test_dropout_put_into_training_mode_is_refused():
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.2)).eval()
    graph = trace(net, torch.empty(1, 3))
    graph.check()
    net.train()
    with pytest.raises(UnsupportedOperator, match="'1'"):
        graph.check()
    net[1].eval()
    graph.check()


def test_dropout_of_probability_zero_is_nothing():
    graph = trace(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.0)).train(), torch.empty(1, 3))
    graph.check()
    assert len(graph.nodes) == 2


def test_a_changed_index_buffer_is_refused():
    net = Apply(lambda m, x: x[:, m.order.flip(0)], order=torch.tensor([2, 0, 1]))
    graph = trace(net, torch.empty(1, 3))
    graph.check()
    net.load_state_dict(net.state_dict())
    graph.check()
    net.order[0] = 1
    with pytest.raises(RuntimeError, match="trace the network again"):
        graph.check()


def test_a_changed_flag_buffer_is_refused():
    net = Apply(lambda m, x: x + 1 if m.flag else x * 2, flag=torch.tensor(True))
    graph = trace(net, torch.empty(1, 3))
    graph.check()
    net.flag.logical_not_()
    with pytest.raises(RuntimeError, match="'flag'"):
        graph.check()


def test_resnets_deepcopy_and_pickle_in_training_mode():
    net = resnet(8, 2).train()
    assert isinstance(net[3], Block)
    graph = trace(net, torch.empty(1, 3, 8, 8))
    net_copy, graph_copy = copy.deepcopy((net, graph))
    assert [type(module) for module in graph_copy.batch_norms] == [nn.BatchNorm2d] * 7
    net_copy.eval()
    assert not any(module.training for module in graph_copy.batch_norms)
    assert all(module.training for module in pickle.loads(pickle.dumps(graph)).batch_norms)


# ---- registered activations -------------------------------------------------------------------


def cubic(x: Tensor) -> Tensor:
    return x * x * x / 8


def cubic_slope(x: Tensor) -> Tensor:
    return 3 * x * x / 8


def test_registered_activations_are_one_operator(x):
    act = pycert.register_activation(cubic, cubic_slope, [0.0], name="cubic_for_tracing")
    inner = Apply(lambda m, x: act(m.fc(x)) + 1, fc=nn.Linear(4, 4))
    net = nn.Sequential(inner, act).double()
    graph = traced(net, 4)
    assert [node.op for node in graph.nodes] == ["input", "linear", "custom", "add_const", "custom"]
    assert [node.path for node in graph.nodes][1:] == ["0.fc", "0.cubic_for_tracing", "0.add", "1"]
    assert graph.nodes[2].attrs == {"name": "cubic_for_tracing"}
    assert_agree(graph, net, x[:, 0, 0])
    assert_agree(pickle.loads(pickle.dumps(graph)), net, x[:, 0, 0])


def test_replaced_added_and_removed_modules_are_refused():
    def refused(change, match):
        net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        bm, region = pycert.BoundedModule(net, torch.empty(1, 2)), pycert.LpBall(torch.zeros(1, 2), eps=1.0)
        bm.bound(region)
        change(net)
        with pytest.raises(RuntimeError, match=match):
            bm.bound(region)

    refused(
        lambda net: net.__setitem__(0, nn.Linear(2, 3)), "^'0' has changed since .* make a new BoundedModule"
    )
    refused(
        lambda net: net.__setitem__(1, nn.Tanh()),
        "^'1' has changed from ReLU to Tanh since .* make a new BoundedModule",
    )
    refused(lambda net: net.append(nn.ReLU()), "^'3' has been set since .* make a new BoundedModule")
    refused(lambda net: net.__delitem__(2), "^'2' has been removed since .* make a new BoundedModule")


# ---- what a trace has followed beside tensors -------------------------------------------------


class Stateful(nn.Module):
    """Reads its state from everywhere a module may keep it."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.config, self.numbers, self.array = types.SimpleNamespace(shift=0.5), [2.0], np.array([1.5])
        self.tensors, self.act, self.scale = [torch.tensor([1.0, 2.0])], torch.relu, None
        self.layers = [nn.Linear(2, 2), nn.LeakyReLU(0.1)]
        self.conv, self.norm = nn.Conv1d(1, 1, 1, padding=1), nn.InstanceNorm1d(1, track_running_stats=True)
        self.fc = nn.Linear(4, 2, bias=False)
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        for layer in self.layers:
            x = layer(x)
        x = self.act(x * self.tensors[0] * self.factor + self.config.shift) * self.numbers[0]
        x = self.fc(self.norm(self.conv(x.unsqueeze(1))).flatten(1) * float(self.array[0]))
        return x if self.scale is None else x * self.scale


def _set(path: str, value: object):
    *owners, last = path.split(".")

    def change(net: nn.Module) -> None:
        for name in owners:
            net = net[int(name)] if isinstance(net, list) else getattr(net, name)
        if isinstance(net, (list, np.ndarray)):
            net[int(last)] = value  # type: ignore[operator]
        else:
            setattr(net, last, value)

    return change


@pytest.mark.parametrize(
    "change, match",
    [
        (_set("conv.padding", (0,)), "'conv.padding' has changed"),
        (_set("layers.1.negative_slope", 0.3), "'layers.1.negative_slope' has changed from 0.1 to 0.3"),
        (_set("norm.eps", 0.1), "'norm.eps' has changed"),
        (_set("norm.momentum", 0.9), None),
        (_set("config.shift", 1.0), "'config' has changed"),
        (_set("numbers.0", 3.0), "'numbers' has changed"),
        (_set("array.0", 1.0), "'array' has changed"),
        (_set("act", torch.tanh), "'act' has changed"),
        (_set("scale", 2.0), "'scale' has changed from None to 2.0"),
        (_set("factor", 2.0), "'factor' has been set"),
        (_set("unread", 2.0), None),
        (_set("steps", 7), None),
        (_set("fc.bias", nn.Parameter(torch.ones(2))), "'fc.bias' has changed from None to float32"),
        (_set("conv.bias", None), "'conv.bias' has changed from float32"),
        (
            _set("layers.0.weight", nn.Parameter(torch.ones(2, 2))),
            None,
        ),  # live, as those of registered modules
        (_set("layers.1", nn.ReLU()), "'layers.1' has changed|'layers' has changed"),
        (_set("forward", lambda x: x * 7), "'forward' has changed"),
        (lambda net: net.layers.append(nn.Tanh()), "'layers' has changed"),
        (lambda net: net.tensors[0].mul_(2), None),  # read by reference
        (lambda net: net.fc.register_forward_hook(lambda *_: None), None),
        (lambda net: net.fc.register_forward_hook(lambda m, x, y: 2 * y), "forward hook"),
        (lambda net: net.register_forward_pre_hook(lambda m, x: (2 * x[0],)), "forward hook"),
        (lambda net: net.train(), "training mode"),
    ],
)
def test_a_change_of_the_modules_is_followed_or_refused(change, match):
    torch.manual_seed(0)
    net = Stateful().eval()
    net.norm.running_var.fill_(2.0)
    bm, x = pycert.BoundedModule(net, torch.empty(1, 2)), torch.randn(3, 2)
    for _ in range(2):
        lower, upper = bm.bound(pycert.Box(x, x), "ibp")
    change(net)
    if match is not None:
        for _ in range(2):
            with pytest.raises((RuntimeError, UnsupportedOperator), match=match):
                bm.bound(pycert.Box(x, x), "ibp")
        return
    for again in (bm, copy.deepcopy(bm)):
        lower, upper = again.bound(pycert.Box(x, x), "ibp")
        y = net(x)
        assert bool(((lower <= y) & (y <= upper)).all())


def test_a_layer_traced_in_training_mode_is_refused_in_evaluation_mode():
    net = nn.Sequential(nn.InstanceNorm1d(2, track_running_stats=True)).train()
    bm, x = pycert.BoundedModule(net, torch.empty(1, 2, 3)), torch.randn(2, 2, 3)
    bm.bound(pycert.Box(x, x), "ibp")
    net.eval()
    with pytest.raises(RuntimeError, match="training' has changed from True to False"):
        bm.bound(pycert.Box(x, x), "ibp")
    net.train()
    bm.bound(pycert.Box(x, x), "ibp")


@pytest.mark.parametrize(
    "net, followed",
    [
        (nn.Sequential(nn.Linear(3, 3), nn.Softmax(1), nn.LayerNorm(3)), True),
        (nn.Sequential(nn.Linear(3, 3), nn.RMSNorm(3)), False),  # its eps is that of the dtype
        (Apply(lambda m, x: m.fc(x) + torch.finfo(x.dtype).eps, fc=nn.Linear(3, 3)), False),
    ],
)
def test_another_dtype_is_followed_where_the_network_stays_the_same(net, followed):
    bm = pycert.BoundedModule(net.float(), torch.empty(1, 3))
    net.double()
    x = torch.randn(2, 3, dtype=torch.float64)
    if followed:
        lower, upper = bm.bound(pycert.Box(x, x), "ibp")
        assert bool(((lower <= net(x)) & (net(x) <= upper)).all())
    else:
        with pytest.raises(RuntimeError, match="weight' has changed from float32 of shape .* to float64"):
            bm.bound(pycert.Box(x, x), "ibp")


def test_global_hooks_are_refused_once_they_change():
    net = nn.Sequential(nn.Linear(2, 2))
    bm, x = pycert.BoundedModule(net, torch.empty(1, 2)), torch.randn(1, 2)
    hook = nn.modules.module.register_module_forward_hook(lambda m, x, y: 2 * y)
    try:
        with pytest.raises(RuntimeError, match="hooks' has changed"):
            bm.bound(pycert.Box(x, x), "ibp")
    finally:
        hook.remove()
    bm.bound(pycert.Box(x, x), "ibp")


def test_constants_outside_of_the_module_are_read_by_reference():
    outside, norm = torch.full((2,), 2.0), nn.BatchNorm1d(2).eval()
    net = Apply(lambda m, x: norm(x * outside).clamp(min=outside - 3))
    bm, x = pycert.BoundedModule(net, torch.empty(1, 2)), torch.randn(2, 2)
    outside.fill_(0.5)
    norm.running_mean.fill_(0.3)
    lower, upper = bm.bound(pycert.Box(x, x), "ibp")
    y = net(x)
    assert bool(((lower <= y) & (y <= upper)).all())


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.maximum(x, m.c),
        lambda m, x: torch.cat([x, m.c.expand(len(x), 2)], 1),
        lambda m, x: torch.where(torch.tensor([True, False]), x, torch.full((2,), 0.1, dtype=torch.float64)),
        lambda m, x: x.clamp(min=torch.full((2,), 0.1, dtype=torch.float64)),
    ],
)
def test_float64_constants_that_float32_does_not_hold_are_refused(function):
    net = Apply(function, c=torch.tensor([0.5, 0.75], dtype=torch.float64))
    bm, x = pycert.BoundedModule(net, torch.empty(1, 2)), torch.zeros(1, 2)
    net.c = torch.tensor([0.1, 5.1], dtype=torch.float64)
    with pytest.raises(TypeError, match="parameters of dtype Double"):
        bm.bound(pycert.Box(x, x), "ibp")


class OfItsWeight(nn.Module):
    """Reads a function of another module's weight."""

    def __init__(self, registered: bool) -> None:
        super().__init__()
        inner = nn.Linear(2, 2)
        self.inner, self.others = (inner, []) if registered else (None, [inner])

    def forward(self, x):
        inner = self.inner or self.others[0]
        return x @ inner.weight.t().exp()


@pytest.mark.parametrize("registered", [True, False])
def test_a_copy_of_a_module_in_its_place_is_another_module(registered):
    net, x = OfItsWeight(registered), torch.randn(3, 2)
    bm = pycert.BoundedModule(net, x)
    if registered:
        net.inner = copy.deepcopy(net.inner)
    else:
        net.others[0] = copy.deepcopy(net.others[0])
    for _ in range(2):  # of equal values today
        with pytest.raises(RuntimeError, match="'inner' has changed" if registered else "'others"):
            bm.bound(pycert.Box(x, x), "ibp")


def test_a_new_module_that_is_not_used_changes_nothing():
    net, x = nn.Sequential(nn.Linear(2, 2)), torch.randn(3, 2)
    bm = pycert.BoundedModule(net, x)
    before = bm.bound(pycert.Box(x, x), "ibp")
    net[0].unused = nn.Linear(3, 3)
    assert torch.equal(bm.bound(pycert.Box(x, x), "ibp").lower, before.lower)
