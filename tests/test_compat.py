"""``pycert.compat.auto_LiRPA``: the calls of auto_LiRPA, answered by pycert's engine."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import pycert
from pycert.compat.auto_LiRPA import (
    BoundDataParallel,
    BoundedModule,
    BoundedParameter,
    BoundedTensor,
    CrossEntropyWrapper,
    PerturbationL0Norm,
    PerturbationLinear,
    PerturbationLpNorm,
    PerturbationSynonym,
    register_custom_op,
)
from pycert.compat.auto_LiRPA import _options as options_of_compat
from pycert.compat.auto_LiRPA.eps_scheduler import (
    AdaptiveScheduler,
    BiLinearScheduler,
    FixedScheduler,
    LinearScheduler,
    SmoothedScheduler,
)
from pycert.compat.auto_LiRPA.operators import Bound
from pycert.compat.auto_LiRPA.perturbations import Perturbation
from pycert.compat.auto_LiRPA.utils import get_spec_matrix, sync_params

METHODS = {
    "IBP": "ibp",
    "CROWN-IBP": "crown-ibp",
    "IBP+backward": "crown-ibp",
    "CROWN": "crown",
    "backward": "crown",
    "crown": "crown",
    "forward": "forward",
    "forward+backward": "crown",
    "alpha-CROWN": "alpha-crown",
    "CROWN-Optimized": "alpha-crown",
}


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    )


def inputs(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


def bounded(net: nn.Module, x: torch.Tensor, **perturbation):
    return BoundedModule(net, x), BoundedTensor(x, PerturbationLpNorm(**(perturbation or {"eps": 0.1})))


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_those_of_the_engine(name):
    net, x = mlp(), inputs(4, 1, 2, 3)
    module, x_bounded = bounded(net, x)
    rows = get_spec_matrix(x, torch.tensor([0, 1, 2, 0]), 3)
    own = pycert.BoundedModule(net, x)
    extra = {"intermediate": "alpha-crown"} if "alpha" in METHODS[name] else {}
    region = pycert.Box(x - 0.1, x + 0.1)
    for spec in (None, rows):
        lower, upper = module.compute_bounds(x=(x_bounded,), C=spec, method=name)
        wanted = own.bound(region, METHODS[name], spec=spec, soundness="none", intersect=False, **extra)
        assert torch.allclose(lower, wanted.lower, atol=1e-6)
        assert torch.allclose(upper, wanted.upper, atol=1e-6)


def test_intermediate_bounds_stay_of_the_method_that_came_first():
    net, x = mlp(), inputs(2, 1, 2, 3)
    module, x_bounded = bounded(net, x, eps=0.5)
    ibp_first = module.compute_bounds(x=(x_bounded,), method="CROWN-IBP")
    module(x_bounded)
    module.compute_bounds(IBP=True, method=None)
    again = module.compute_bounds(IBP=False, method="backward")
    crown = module.compute_bounds(x=(x_bounded,), method="backward")
    assert torch.equal(again[0], ibp_first[0])
    assert not torch.equal(again[0], crown[0])


def test_one_side_and_reuse():
    module, x = bounded(mlp(), inputs(2, 1, 2, 3))
    lower, upper = module.compute_bounds(x=(x,), IBP=True, method=None)
    assert module.compute_bounds(IBP=True, method=None, reuse_ibp=True)[0] is lower
    only = module.compute_bounds(x=(x,), method="CROWN", bound_upper=False)
    assert only[1] is None
    assert only[0].shape == lower.shape
    with pytest.raises(ValueError, match="bound_lower and bound_upper"):
        module.compute_bounds(bound_lower=False, bound_upper=False)
    slopes = module.compute_bounds(x=(x,), method="alpha-CROWN")
    reused = module.compute_bounds(method="backward", reuse_alpha=True)
    assert torch.allclose(slopes[0], reused[0])
    assert upper.shape == slopes[1].shape


@pytest.mark.parametrize("method", ["CROWN", "CROWN-IBP", "alpha-CROWN", "forward"])
def test_linear_functions_give_the_bounds(method):
    x = inputs(2, 1, 2, 3)
    module, x_bounded = bounded(mlp(), x)
    start, end = module.output_name[0], module.input_name[0]
    lower, upper, functions = module.compute_bounds(
        x=(x_bounded,), method=method, return_A=True, needed_A_dict={start: {end}}
    )
    found = functions[start][end]
    assert found["lA"].shape == (2, 3, 1, 2, 3)
    assert found["unstable_idx"] is None
    least = (found["lA"] * x.unsqueeze(1) - 0.1 * found["lA"].abs()).flatten(2).sum(2) + found["lbias"]
    most = (found["uA"] * x.unsqueeze(1) + 0.1 * found["uA"].abs()).flatten(2).sum(2) + found["ubias"]
    assert torch.allclose(least, lower, atol=1e-5)
    assert torch.allclose(most, upper, atol=1e-5)


def test_linear_functions_of_a_hidden_layer():
    net, x = mlp(), inputs(2, 1, 2, 3)
    module, x_bounded = bounded(net, x)
    hidden = module.relus[1].inputs[0].name
    end = module.input_name[0]
    _, _, functions = module.compute_bounds(
        x=(x_bounded,), method="CROWN", return_A=True, needed_A_dict={hidden: end}
    )
    found = functions[hidden][end]
    value = net[:4](x)
    at = (found["lA"] * x.unsqueeze(1)).flatten(2).sum(2) + found["lbias"]
    assert (at <= value + 1e-5).all()
    with pytest.raises(NotImplementedError, match="in terms of the inputs"):
        module.compute_bounds(x=(x_bounded,), return_A=True, needed_A_dict={module.output_name[0]: [hidden]})
    with pytest.raises(ValueError, match="no node"):
        module.compute_bounds(x=(x_bounded,), return_A=True, needed_A_dict={"/nowhere": [end]})


@pytest.mark.parametrize("method", ["IBP", "CROWN", "CROWN-IBP", "alpha-CROWN", "forward"])
def test_a_hidden_node_can_be_the_final_one(method):
    net, x = mlp(), inputs(2, 1, 2, 3)
    module, x_bounded = bounded(net, x)
    own = BoundedModule(net[:4], x)
    hidden, end = module.relus[1].inputs[0].name, module.input_name[0]
    assert torch.allclose(module(x_bounded, final_node_name=hidden), net[:4](x), atol=1e-6)
    wanted = own.compute_bounds(x=(x_bounded,), method=method)
    found = module.compute_bounds(
        x=(x_bounded,), method=method, final_node_name=hidden, return_A=True, needed_A_dict={hidden: [end]},
        average_A=True,
    )  # fmt: skip
    assert torch.allclose(found[0], wanted[0], atol=1e-6)
    assert torch.allclose(found[1], wanted[1], atol=1e-6)
    if method != "IBP":
        assert found[2][hidden][end]["lA"].shape == (2, 8, 1, 2, 3)
    box = -torch.ones(1, 8), torch.zeros(1, 8)  # of a later node: without meaning
    given = {hidden: box, module.relus[0].inputs[0].name: (-torch.ones(1, 8), torch.zeros(1, 8))}
    if method not in ("forward", "IBP"):
        lower, _ = module.compute_bounds(method=method, final_node_name=hidden, interm_bounds=given)
        assert torch.allclose(lower, net[3].bias.expand(2, 8), atol=1e-6)
    with pytest.raises(ValueError, match=r"must have shape \[2, 8\], got \[3, 8\]"):
        module.compute_bounds(interm_bounds={hidden: (torch.zeros(3, 8), torch.zeros(3, 8))})
    with pytest.raises(ValueError, match="'/nowhere' is no node"):
        module.compute_bounds(x=(x_bounded,), final_node_name="/nowhere")


def test_node_names_and_structure_are_the_exporters():
    module, _ = bounded(mlp(), inputs(2, 1, 2, 3))
    kinds = [type(node).__name__ for node in module.nodes()]
    assert kinds == ["BoundInput"] + ["BoundParams"] * 6 + [
        "BoundFlatten", "BoundLinear", "BoundRelu", "BoundLinear", "BoundRelu", "BoundLinear"
    ]  # fmt: skip
    assert module.input_name[0] == "/0"
    assert module.final_node().name == module.output_name[0]
    assert module.final_node().is_final_node
    layers, split = module.get_split_nodes()
    assert [layer.name for layer in layers] == [relu.inputs[0].name for relu in module.relus]
    assert split[layers[0].name] == [(module.relus[0], 0)]
    assert module["/1"].param is module.net[1].weight
    assert isinstance(module["/0"], Bound)


def test_names_fall_back_to_the_graph_where_the_exporter_fails(monkeypatch):
    def fail(*_):
        raise RuntimeError("no exporter")

    monkeypatch.setattr("pycert.compat.auto_LiRPA._introspection._export", fail)
    x = inputs(2, 1, 2, 3)
    module, x_bounded = bounded(mlp(), x)
    with pytest.warns(UserWarning, match="node names are not available"):
        start, end = module.output_name[0], module.input_name[0]
    _, _, functions = module.compute_bounds(x=(x_bounded,), return_A=True, needed_A_dict={start: [end]})
    assert functions[start][end]["lA"].shape == (2, 3, 1, 2, 3)
    other = BoundedModule(mlp(), x)
    with pytest.warns(UserWarning, match="node names are not available"):
        other.load_state_dict(module.state_dict())


@pytest.mark.parametrize("method", ["IBP", "CROWN", "alpha-CROWN"])
def test_saved_bounds_hold_and_are_taken_back(method, tmp_path):
    net, x = mlp(), inputs(3, 1, 2, 3)
    module, x_bounded = bounded(net, x, eps=0.3)
    wanted = module.compute_bounds(x=(x_bounded,), method=method)
    saved = module.save_intermediate(str(tmp_path / "bounds.pt"))
    assert set(torch.load(tmp_path / "bounds.pt")) == set(saved)
    names = {node.name: number for number, node in enumerate(n for n in module.nodes() if n.perturbed)}
    assert set(saved) == set(names)
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        value = x + 0.3 * (2 * torch.rand(x.shape, generator=generator) - 1)
        for name, layer in zip(list(names)[1:], net, strict=True):
            value = layer(value)
            lower, upper = saved[name]
            assert (lower - 1e-5 <= value).all(), name
            assert (value <= upper + 1e-5).all(), name
    backward = "backward" if method != "IBP" else "CROWN-IBP"
    again = module.compute_bounds(x=(x_bounded,), method="CROWN", interm_bounds=saved)
    if method == "CROWN":
        assert torch.allclose(again[0], wanted[0], atol=1e-6)
    if method == "IBP":
        assert torch.allclose(again[0], module.compute_bounds(x=(x_bounded,), method=backward)[0], atol=1e-6)
    reference = module.compute_bounds(x=(x_bounded,), method="CROWN-IBP", reference_bounds=saved)
    plain = module.compute_bounds(x=(x_bounded,), method="CROWN-IBP")
    assert reference[0].sum() >= plain[0].sum() - 1e-5
    with pytest.raises(ValueError, match="no node"):
        module.compute_bounds(x=(x_bounded,), interm_bounds={"/nowhere": saved["/0"]})


def test_given_bounds_decide():
    """A hidden layer that is said to be dead is dead: what is given is taken as it is."""
    net, x = mlp(), inputs(1, 1, 2, 3)
    module, x_bounded = bounded(net, x)
    last = module.relus[1].inputs[0].name
    box = -torch.ones(1, 8), torch.zeros(1, 8)
    for method in ("IBP", "CROWN", "CROWN-IBP", "alpha-CROWN"):
        lower, upper = module.compute_bounds(x=(x_bounded,), method=method, interm_bounds={last: box})
        assert torch.allclose(lower, net[5].bias.expand(1, 3), atol=1e-6)
        assert torch.allclose(upper, net[5].bias.expand(1, 3), atol=1e-6)


def test_parameters_are_shared_and_states_are_compatible():
    net, x = mlp(), inputs(2, 1, 2, 3)
    module, x_bounded = bounded(net, x)
    assert list(dict(module.named_parameters())) == list(dict(net.named_parameters()))
    assert all(a is b for a, b in zip(module.parameters(), net.parameters(), strict=True))
    state = module.state_dict()
    assert list(state) == [f"/{number}.param" for number in range(1, 7)]
    other_net = nn.Sequential(nn.Flatten(), *(type(m)(*_size(m)) for m in net[1:]))
    other = BoundedModule(other_net, x)
    other.load_state_dict(state)
    assert torch.equal(other(x), net(x))
    fresh = BoundedModule(mlp(), x)
    with torch.no_grad():
        net[1].weight.add_(1.0)
    fresh.load_state_dict(net.state_dict())  # the network's own names
    assert torch.equal(fresh(x), net(x))
    target = mlp()
    sync_params(target, module)
    assert torch.equal(target(x), net(x))
    before = module.compute_bounds(x=(x_bounded,), method="IBP")[0]
    with torch.no_grad():
        net[5].bias.add_(1.0)
    assert torch.allclose(module.compute_bounds(x=(x_bounded,), method="IBP")[0], before + 1)


def _size(layer: nn.Module) -> tuple[int, ...]:
    return (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else ()


def test_to_moves_network_and_nodes():
    x = inputs(2, 1, 2, 3)
    module, _ = bounded(mlp(), x)
    node = module["/1"]
    assert module.double() is module
    assert module.net[1].weight.dtype == node.param.dtype == torch.float64
    lower, _ = module.compute_bounds(x=(BoundedTensor(x.double(), PerturbationLpNorm(eps=0.1)),))
    assert lower.dtype == torch.float64


def test_modes_are_the_modules_own():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).train()
    x = inputs(8, 3)
    module, x_bounded = bounded(net, x, eps=0.0)
    evaluated = module(x)
    assert net.training
    assert torch.allclose(module.compute_bounds(x=(x_bounded,), method="IBP")[0], evaluated, atol=1e-5)
    module.train()
    trained = module(x)
    assert not torch.allclose(trained, evaluated)
    lower, upper = module.compute_bounds(x=(x_bounded,), method="CROWN-IBP")
    assert torch.allclose(lower, trained, atol=1e-4)
    assert torch.allclose(upper, trained, atol=1e-4)
    module.eval()
    assert net.training  # the network keeps its mode


@pytest.mark.parametrize("method", ["IBP", "CROWN-IBP"])
def test_batch_statistics_are_those_of_the_clean_input(method):
    """A region that is not symmetric, as x - eps cut at 0 is: its midpoint is another input."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()
    x = inputs(8, 3)
    module = BoundedModule(net, x)
    module.train()
    x_bounded = BoundedTensor(x, PerturbationLpNorm(x_L=x, x_U=x + 0.4))
    with torch.no_grad():
        lower, upper = module.compute_bounds(x=(x_bounded,), method=method)
        score = net[0](x)
        spread = (score.var(0, unbiased=False) + net[1].eps).sqrt()
        low = (score + 0.4 * net[0].weight.clamp(max=0).sum(1) - score.mean(0)) / spread
        high = (score + 0.4 * net[0].weight.clamp(min=0).sum(1) - score.mean(0)) / spread
    assert torch.allclose(lower, low, atol=1e-4)
    assert torch.allclose(upper, high, atol=1e-4)


def test_gradients_reach_input_and_parameters():
    net, x = mlp(), inputs(2, 1, 2, 3)
    module = BoundedModule(net, x)
    x_bounded = BoundedTensor(x, PerturbationLpNorm(eps=0.1))
    x_bounded.requires_grad_()
    lower, upper = module.compute_bounds(x=(x_bounded,), method="CROWN-IBP")
    (upper - lower).sum().backward()
    assert x_bounded.grad.abs().sum() > 0
    assert net[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("ibp", [True, False])
def test_loss_fusion_bounds_the_loss(ibp):
    net, x = mlp(), inputs(5, 1, 2, 3)
    labels = torch.tensor([0, 1, 2, 1, 0])
    module = BoundedModule(CrossEntropyWrapper(net), (x, labels), bound_opts={"loss_fusion": True})
    x_bounded = BoundedTensor(x, PerturbationLpNorm(eps=0.05))
    method = None if ibp else "backward"
    _, upper = module.compute_bounds(x=(x_bounded, labels), IBP=ibp, method=method, bound_lower=False)
    exp = next(node for node in module.modules() if type(node).__name__ == "BoundExp")
    loss = (upper.log() + exp.max_input).squeeze(1)
    rows = get_spec_matrix(x, labels, 3)
    margins = BoundedModule(net, x).compute_bounds(x=(x_bounded,), C=rows, method="IBP")[0]
    from_intervals = torch.log1p((-margins).exp().sum(1))
    assert (loss <= from_intervals + 1e-5).all()
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        point = x + 0.05 * (2 * torch.rand(x.shape, generator=generator) - 1)
        assert (nn.functional.cross_entropy(net(point), labels, reduction="none") <= loss + 1e-5).all()
    loss.sum().backward()
    assert net[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("norm", [1, 2, 3, 8, 1.5, math.inf])
@pytest.mark.parametrize("method", ["IBP", "CROWN", "forward"])
def test_every_norm_holds_on_its_ball(norm, method):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)).double()
    x = inputs(2, 1, 5, 5).double()
    module = BoundedModule(net, x)
    eps = torch.tensor([0.3, 0.6], dtype=torch.float64)
    lower, upper = module.compute_bounds(
        x=(BoundedTensor(x, PerturbationLpNorm(norm=norm, eps=eps)),), method=method
    )
    generator = torch.Generator().manual_seed(4)
    for number in range(200):
        step = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        step = step.sign() if norm > 2 and number % 2 else step
        size = step.flatten(1).norm(norm, dim=1)
        out = net(x + step * (eps / size).view(2, 1, 1, 1))
        assert (lower <= out + 1e-9).all()
        assert (out <= upper + 1e-9).all()


def test_other_norms_use_the_dual_norm():
    linear = nn.Linear(4, 3).double()
    x = inputs(2, 4).double()
    module = BoundedModule(linear, x)
    lower, _ = module.compute_bounds(x=(BoundedTensor(x, PerturbationLpNorm(norm=3, eps=0.2)),))
    assert torch.allclose(lower, linear(x) - 0.2 * linear.weight.norm(1.5, dim=1))


def test_own_perturbations_concretise():
    class Simplex(Perturbation):
        """x plus a convex combination of unit vectors, times 0.1."""

        def init(self, x, aux=None, forward=False):
            from pycert.compat.auto_LiRPA.linear_bound import LinearBound

            return LinearBound(lower=x, upper=x + 0.1), x, aux

        def concretize(self, x, A, sign=-1, aux=None):
            ends = 0.1 * (A.amax(-1) if sign > 0 else A.amin(-1))
            return (A @ x.flatten(1).unsqueeze(-1)).squeeze(-1) + ends

    linear, x = nn.Linear(4, 2), inputs(1, 4)
    module = BoundedModule(linear, x)
    lower, upper = module.compute_bounds(x=(BoundedTensor(x, Simplex()),))
    assert torch.allclose(lower, linear(x) + 0.1 * linear.weight.amin(1), atol=1e-6)
    assert torch.allclose(upper, linear(x) + 0.1 * linear.weight.amax(1), atol=1e-6)


def test_few_elements_and_linear_perturbations():
    linear, x = nn.Linear(4, 2), inputs(1, 4)
    module = BoundedModule(linear, x)
    lower, _ = module.compute_bounds(x=(BoundedTensor(x, PerturbationL0Norm(1)),))
    changes = torch.minimum(linear.weight * (0 - x), linear.weight * (1 - x)).amin(1)
    assert torch.allclose(lower, linear(x) + changes, atol=1e-6)
    A = torch.eye(4)[None, :, :2]  # two elements follow z, two are fixed
    shift = torch.zeros(1, 4)
    ptb = PerturbationLinear(A, A, shift, shift, torch.zeros(1, 2), torch.ones(1, 2))
    lower, _ = module.compute_bounds(x=(BoundedTensor(x, ptb),))
    assert torch.allclose(lower, linear.bias + linear.weight[:, :2].clamp(max=0).sum(1), atol=1e-6)


def test_options_are_known_or_refused(monkeypatch):
    monkeypatch.setattr(options_of_compat, "_warned", set())
    net, x = mlp(), inputs(1, 1, 2, 3)
    with pytest.warns(UserWarning, match="crown_batch_size"):
        BoundedModule(net, x, bound_opts={"conv_mode": "matrix", "crown_batch_size": 4})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BoundedModule(net, x, bound_opts={"crown_batch_size": 4})  # once a key
    with pytest.raises(ValueError, match=r"unknown key 'conv_mod'.*Did you mean 'conv_mode'"):
        BoundedModule(net, x, bound_opts={"conv_mod": "matrix"})
    module = BoundedModule(net, x)
    with pytest.raises(ValueError, match="unknown key 'iterations'"):
        module.set_bound_opts({"optimize_bound_args": {"iterations": 3}})
    with pytest.raises(NotImplementedError, match="enable_beta_crown"):
        module.set_bound_opts({"optimize_bound_args": {"enable_beta_crown": True}})
    with pytest.raises(ValueError, match="activation_bound_option must be one of"):
        module.set_bound_opts({"relu": "steep"})


def test_slopes_and_soundness_are_passed_on():
    net, x = mlp(), inputs(2, 1, 2, 3)
    x_bounded = BoundedTensor(x, PerturbationLpNorm(eps=0.3))
    own = pycert.BoundedModule(net, x)
    for option, slope in {
        "same-slope": "parallel",
        "zero-lb": "zero",
        "one-lb": "one",
        None: "adaptive",
    }.items():
        module = BoundedModule(net, x, bound_opts={"activation_bound_option": option})
        lower, _ = module.compute_bounds(x=(x_bounded,))
        wanted = own.bound(pycert.Box(x - 0.3, x + 0.3), slope=slope, intersect=False, soundness="none")
        assert torch.allclose(lower, wanted.lower, atol=1e-6)
    deployed = BoundedModule(net, x, bound_opts={"soundness": "deployed"})
    lower, _ = deployed.compute_bounds(x=(x_bounded,), method="IBP")
    exact = own.double().bound(pycert.LpBall(x.double(), 0.3), "ibp", soundness="real")
    assert (lower.double() <= exact.lower).all()


REFUSED = {
    "cutter": {"cutter": object()},
    "update_mask": {"update_mask": torch.ones(1)},
    "intermediate_constr": {"intermediate_constr": {}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_named(name):
    module, x = bounded(mlp(), inputs(1, 1, 2, 3))
    with pytest.raises(NotImplementedError, match=name):
        module.compute_bounds(x=(x,), **REFUSED[name])


def test_errors_say_what_is_wrong():
    module, x = bounded(mlp(), inputs(1, 1, 2, 3))
    with pytest.raises(ValueError, match="unknown method 'CROWNED'"):
        module.compute_bounds(x=(x,), method="CROWNED")
    with pytest.raises(ValueError, match="x is needed"):
        BoundedModule(mlp(), inputs(1, 1, 2, 3)).compute_bounds()
    with pytest.raises(ValueError, match="1 inputs, x has 2"):
        module.compute_bounds(x=(x, x))
    with pytest.raises(ValueError, match="norm must be at least 1"):
        PerturbationLpNorm(norm=0.5)
    with pytest.raises(NotImplementedError, match="constraints"):
        PerturbationLpNorm(eps=1, constraints=(x, x))
    with pytest.raises(NotImplementedError, match="words"):
        PerturbationSynonym(budget=1)
    with pytest.raises(NotImplementedError, match="torchrun"):
        BoundDataParallel(module, device_ids=[0, 1])
    assert BoundDataParallel(module)(x).shape == (1, 3)


def test_register_custom_op():
    class Plus(torch.autograd.Function):
        @staticmethod
        def symbolic(graph, x):
            return graph.op("custom::Plus", x)

        @staticmethod
        def forward(ctx, x):
            return x + 1

    class Net(nn.Module):
        def forward(self, x):
            return Plus.apply(x)

    assert register_custom_op("custom::Plus", Bound) is None
    x = inputs(1, 3)
    module, x_bounded = bounded(Net(), x)
    lower, _ = module.compute_bounds(x=(x_bounded,))
    assert torch.allclose(lower, x + 0.9)
    with pytest.raises(TypeError, match="register_activation"):
        register_custom_op("custom::Other", "text")
    act = register_custom_op("custom::Cube", lambda x: x * x * x, df=lambda x: 3 * x * x, inflections=[0.0])
    module, x_bounded = bounded(nn.Sequential(act), x)
    lower, _ = module.compute_bounds(x=(x_bounded,), method="IBP")
    assert torch.allclose(lower, (x - 0.1) ** 3, atol=1e-5)


def test_schedules():
    """Against values of the schedules' definitions: linear within an epoch, a power and then a line."""
    linear = LinearScheduler(0.4, "start=2,length=2")
    linear.set_epoch_length(4)
    seen = []
    for _ in range(4):
        linear.step_epoch(verbose=False)
        for _ in range(4):
            linear.step_batch()
            seen.append(linear.get_eps())
    assert seen == pytest.approx([0.0] * 4 + [0.05 * i for i in range(8)] + [0.4] * 4)
    smooth = SmoothedScheduler(0.4, "start=1,length=10,mid=0.5,beta=2")
    smooth.set_epoch_length(10)
    values = []
    for _ in range(120):
        smooth.step_batch()
        values.append(smooth.get_eps())
    assert values[0] == 0
    assert values[100:] == pytest.approx([0.4] * 20)
    steps = [b - a for a, b in zip(values, values[1:101])]
    assert max(steps) == pytest.approx(steps[-1], rel=0.05)  # the line has the greatest slope
    assert values[25] == pytest.approx(values[50] / 4)  # a power of two before it
    assert FixedScheduler(0.1).reached_max_eps()
    both = BiLinearScheduler(0.4, "start=1,length=4")
    both.set_epoch_length(1)
    peak = []
    for _ in range(5):
        both.step_epoch(verbose=False)
        peak.append(both.get_eps())
    assert peak == pytest.approx([0.0, 0.2, 0.4, 0.2, 0.0])
    adaptive = AdaptiveScheduler(0.4, "start=1,min_step=0.01,max_step=0.1")
    adaptive.step_epoch()
    for loss in (3.0, 2.0, 1.0, 0.5):
        adaptive.step_batch()
        adaptive.update_loss(loss)
    assert adaptive.get_eps() == pytest.approx(0.01 + 0.01 + 0.015 + 0.0225)


def test_output_constraints_tighten_soundly():
    """invprop: the preimage of an output constraint, and outputs under it, against a grid."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2 = torch.tensor([[1.0, -1.0], [2.0, -1.0]]), torch.tensor([[1.0, -1.0]])

        def forward(self, x):
            return torch.relu(x.matmul(self.w1.t())).matmul(self.w2.t())

    pytest.importorskip("scipy", reason="output constraints need scipy, of the extra 'solvers'")
    net = Net()
    low, high = torch.tensor([[-1.0, -2.0]]), torch.tensor([[2.0, 1.0]])
    args = {"apply_output_constraints_to": ["BoundMatMul", "BoundInput"], "tighten_input_bounds": True}
    module = BoundedModule(net, torch.empty(1, 2), bound_opts={"optimize_bound_args": args})
    module.constraints, module.thresholds = torch.ones(1, 1, 1), torch.tensor([-1.0])
    x = BoundedTensor(torch.ones(1, 2), PerturbationLpNorm(x_L=low, x_U=high))
    lower, upper = module.compute_bounds(x=(x,), method="alpha-CROWN")
    found = module["/0"].perturbation
    points = torch.cartesian_prod(torch.linspace(-1, 2, 121), torch.linspace(-2, 1, 121))
    out = net(points)
    allowed = points[out[:, 0] <= -1]
    assert (found.x_L <= allowed + 1e-6).all()
    assert (allowed <= found.x_U + 1e-6).all()
    assert found.x_L[0, 0] > 0.9  # x0 >= 1 exactly
    assert lower.item() <= out.min().item()
    assert upper.item() == pytest.approx(-1, abs=1e-5)


def test_solver_needs_gurobi_or_solves(monkeypatch):
    module, x = bounded(mlp(), inputs(1, 1, 2, 3))
    crown = module.compute_bounds(x=(x,), method="CROWN")
    with pytest.raises(NotImplementedError, match="solver_pkg"):
        module.build_solver_module(solver_pkg="scipy")
    try:
        import gurobipy as grb
    except ImportError:
        with pytest.raises(ImportError, match="gurobipy"):
            module.build_solver_module(model_type="lp")
        return
    variables = module.build_solver_module(model_type="lp")
    module.solver_model.setObjective(variables[0], grb.GRB.MINIMIZE)
    module.solver_model.optimize()
    assert module.solver_model.objVal >= crown[0][0, 0].item() - 1e-5


@pytest.mark.slow
def test_install_serves_unchanged_scripts(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "import torch, auto_LiRPA\n"
        "from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm\n"
        "from auto_LiRPA.perturbations import *\n"
        "from auto_LiRPA.operators.relu import BoundRelu\n"
        "from auto_LiRPA.bound_ops import BoundExp\n"
        "from auto_LiRPA.utils import Flatten\n"
        "import pycert.compat.auto_LiRPA as ours\n"
        "assert auto_LiRPA is ours and BoundedModule is ours.BoundedModule\n"
        "net = torch.nn.Linear(2, 1)\n"
        "x = BoundedTensor(torch.zeros(1, 2), PerturbationLpNorm(norm=np.inf, eps=1.0))\n"
        "lower, upper = BoundedModule(net, torch.empty(1, 2)).compute_bounds(x=(x,))\n"
        "assert torch.allclose(upper - lower, 2 * net.weight.abs().sum())\n"
        "print('arguments', *sys.argv[1:])\n"
    )
    command = [sys.executable, "-m", "pycert.compat.auto_LiRPA", str(script), "one", "two"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("arguments one two")
    script.write_text("import auto_LiRPA.nowhere")
    absent = subprocess.run(command[:4], capture_output=True, text=True)
    assert absent.returncode == 1
    assert absent.stderr.splitlines()[-1].endswith(
        "auto_LiRPA.nowhere has no counterpart in pycert; docs/auto_lirpa.md says what is covered"
    )
    missing = subprocess.run([*command[:3], "nowhere.py"], capture_output=True, text=True)
    assert missing.returncode == 2
    assert "no such script" in missing.stderr


def test_perturbed_weights_are_refused_by_name():
    net = mlp()
    net[3].weight = BoundedParameter(net[3].weight.data, PerturbationLpNorm(eps=0.1))
    with pytest.raises(NotImplementedError, match=r"'3\.weight'"):
        BoundedModule(net, inputs(1, 1, 2, 3))
