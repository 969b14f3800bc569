"""Random networks of every supported layer, random regions, and points inside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pycert

Builder = Callable[[torch.Generator], tuple[nn.Module, tuple[int, ...]]]
BUILDERS: dict[str, Builder] = {}


def network(build: Builder) -> Builder:
    """Registers a builder: generator -> (module, shape of one input)."""
    BUILDERS[build.__name__] = build
    return build


def make(name: str, seed: int, dtype: torch.dtype = torch.float32, scale: float | None = None):
    """Network ``name`` in evaluation mode with random weights, and the shape of one input.

    ``scale`` multiplies the weights of every layer; by default every third seed draws 10^-6 to
    10^6 for each layer and the others about 1.
    """
    generator = torch.Generator().manual_seed(seed * 1009 + sum(map(ord, name)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module, shape = BUILDERS[name](generator)
        module.eval()(torch.rand(2, *shape))  # sizes the lazy layers
    spread = 6.0 if seed % 3 == 2 else 0.3
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)):
            layer.weight.data.mul_(scale or 10.0 ** uniform(generator, -spread, spread))
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            randomize_batch_norm(layer, generator)
    return module.to(dtype).eval(), shape


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def integer(generator: torch.Generator, low: int, high: int) -> int:
    """A random integer, both ends included."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def randomize_batch_norm(layer: nn.Module, generator: torch.Generator) -> None:
    count = layer.num_features
    if layer.running_mean is not None:
        layer.running_mean.copy_(torch.randn(count, generator=generator))
        layer.running_var.copy_(10.0 ** (2 * torch.rand(count, generator=generator) - 1.5))
    if layer.weight is not None:
        layer.weight.data.copy_(torch.randn(count, generator=generator))
        layer.bias.data.copy_(torch.randn(count, generator=generator))


class Apply(nn.Module):
    """A module out of a function of the input and of submodules kept under the names given."""

    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def silu(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def silu_derivative(x: Tensor) -> Tensor:
    return x.sigmoid() * (1 + x * (-x).sigmoid())


def registered_silu() -> nn.Module:
    bend = 2.399357280515467
    return pycert.register_activation(silu, silu_derivative, [-bend, bend], name="silu of tests/nets.py")


ELEMENTWISE: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "prelu": lambda: nn.PReLU(init=0.3),
    "relu6": nn.ReLU6,
    "hardtanh": lambda: nn.Hardtanh(-0.7, 0.4),
    "clamp": lambda: Apply(lambda self, x: x.clamp(min=-0.5)),
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "abs": lambda: Apply(lambda self, x: x.abs()),
    "custom": registered_silu,
    "elu": lambda: nn.Sequential(nn.ELU(1.7), nn.SELU(), nn.CELU(0.6)),
    "silu": lambda: nn.Sequential(nn.SiLU(), nn.Mish()),
    "gelu": lambda: nn.Sequential(nn.GELU(), nn.GELU(approximate="tanh")),
    "softplus": lambda: nn.Sequential(nn.Softplus(), nn.Softplus(-0.7, 1.0)),
    "hard": lambda: nn.Sequential(nn.Hardswish(), nn.Hardsigmoid()),
    "shrink": lambda: nn.Sequential(nn.Tanhshrink(), nn.Softshrink(0.1), nn.Softsign()),
    "exp_log": lambda: Apply(lambda self, x: (x.exp() + 0.5).log()),
    "roots": lambda: Apply(lambda self, x: 1 / (x * x + 0.3).sqrt()),
    "waves": lambda: Apply(lambda self, x: x.sin() - 2 * x.cos()),
}


def _mlp(activation: str) -> Builder:
    def build(generator: torch.Generator) -> tuple[nn.Module, tuple[int, ...]]:
        sizes = [integer(generator, 1, 12) for _ in range(integer(generator, 2, 4))]
        layers: list[nn.Module] = []
        for i, (inner, outer) in enumerate(zip(sizes[:-1], sizes[1:])):
            layers += [nn.Linear(inner, outer, bias=bool(i % 2)), ELEMENTWISE[activation]()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], 3)), (sizes[0],)

    return build


for _name in ELEMENTWISE:
    BUILDERS["mlp_" + _name] = _mlp(_name)


@network
def conv_plain(g):
    height, width = integer(g, 5, 8), integer(g, 5, 8)
    return nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), stride=integer(g, 1, 2), padding=(1, 0)), nn.ReLU(),
        nn.Conv2d(4, 3, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3),
    ), (2, height, width)  # fmt: skip


@network
def conv_grouped_dilated(g):
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=integer(g, 1, 2) * 2), nn.ReLU(),
        nn.Conv2d(4, 2, 2, dilation=(1, 2)), nn.Flatten(), nn.LazyLinear(2),
    ), (2, 6, 5)  # fmt: skip


@network
def conv_padding_modes(g):
    modes = ["reflect", "replicate", "circular"]
    first, second = modes[integer(g, 0, 2)], modes[integer(g, 0, 2)]
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=(1, 2), padding_mode=first), nn.ReLU(),
        nn.Conv2d(3, 2, 3, padding="same", padding_mode=second), nn.LeakyReLU(), nn.Flatten(), nn.LazyLinear(2),
    ), (1, 4, 5)  # fmt: skip


@network
def conv_one_dimensional(g):
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, stride=2, padding=1), nn.ReLU(),
        nn.ConvTranspose1d(4, 2, 3, stride=2, padding=1, output_padding=1), nn.Tanh(),
        nn.Conv1d(2, 2, 2, dilation=2, groups=2), nn.Flatten(), nn.LazyLinear(2),
    ), (2, integer(g, 7, 11))  # fmt: skip


@network
def conv_transposed(g):
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(4, 4, 3, stride=(2, 1), padding=(1, 0), output_padding=(1, 0), groups=2), nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 2, dilation=2), nn.Flatten(), nn.LazyLinear(2),
    ), (1, 5, 4)  # fmt: skip


@network
def batch_norm_conv(g):
    return nn.Sequential(
        nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(),
        nn.Conv2d(3, 2, 2), nn.BatchNorm2d(2, affine=False), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3),
    ), (2, 5, 4)  # fmt: skip


@network
def batch_norm_linear(g):
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Linear(8, 5),
        nn.ReLU(),
        nn.BatchNorm1d(5),
        nn.Linear(5, 3),
    ), (6,)


@network
def pools(g):
    # leaky: after ReLU many lower ends are equal, and which of them max pooling picks is chance
    kernel, stride = [(3, 2), (2, 1), ((3, 2), (2, 1))][integer(g, 0, 2)]
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.LeakyReLU(0.1), nn.MaxPool2d(kernel, stride, padding=1),
        nn.Conv2d(2, 3, 2), nn.ReLU(), nn.AvgPool2d(2, 1, padding=1, count_include_pad=bool(integer(g, 0, 1))),
        nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), nn.LazyLinear(2),
    ), (1, 7, 6)  # fmt: skip


@network
def pools_ceil(g):
    return nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.MaxPool2d(2, 2, ceil_mode=True), nn.ReLU(),
        nn.AvgPool2d(2, 2, ceil_mode=True), nn.MaxPool2d(2, 1, dilation=1), nn.Flatten(), nn.LazyLinear(2),
    ), (1, 8, 10)  # fmt: skip


@network
def max_pool_dilated(g):
    return nn.Sequential(
        nn.Conv2d(1, 2, 2), nn.MaxPool2d(2, 1, dilation=2), nn.Flatten(), nn.LazyLinear(2)
    ), (1, 5, 6)  # fmt: skip


@network
def normalized(g):
    return nn.Sequential(
        pycert.nn.Normalize([0.4, 0.6], [0.2, 0.3]), nn.Conv2d(2, 3, 3, stride=2), nn.ReLU(),
        nn.Dropout(0.5), nn.Identity(), nn.Flatten(), nn.LazyLinear(2),
    ), (2, 5, 7)  # fmt: skip


@network
def residual(g):
    def block(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.second(F.relu(self.first(x))) + x)
        x = F.relu(self.third(x) - 0.5 * self.shortcut(x))
        return self.head(x.mean((2, 3)))

    return Apply(
        block, stem=nn.Conv2d(1, 3, 3, padding=1), first=nn.Conv2d(3, 3, 3, padding=1), second=nn.Conv2d(3, 3, 1),
        third=nn.Conv2d(3, 4, 3, stride=2), shortcut=nn.Conv2d(3, 4, 3, stride=2), head=nn.Linear(4, 3),
    ), (1, 5, 6)  # fmt: skip


@network
def shared_layer(g):
    def unrolled(self, x):
        x = F.relu(self.stem(x))
        for _ in range(3):
            x = F.relu(self.cell(x)) + x / 3
        return self.head(x)

    return Apply(unrolled, stem=nn.Linear(4, 5), cell=nn.Linear(5, 5), head=nn.Linear(5, 2)), (4,)


@network
def two_linears_added(g):
    return Apply(
        lambda self, x: self.head(F.relu(self.a(x) + self.b(x)) - F.relu(self.c(x))),
        a=nn.Linear(5, 6), b=nn.Linear(5, 6), c=nn.Linear(5, 6), head=nn.Linear(6, 3),
    ), (5,)  # fmt: skip


@network
def concatenated(g):
    def dense(self, x):
        for layer in (self.first, self.second):
            x = torch.cat([x, F.relu(layer(x))], dim=1)
        left, right = x.split([3, x.shape[1] - 3], dim=1)
        return self.head(torch.cat([F.pad(left, (1, 0)).flip(1), right[:, 1:]], dim=1))

    return Apply(dense, first=nn.Linear(3, 4), second=nn.Linear(7, 4), head=nn.LazyLinear(2)), (3,)


@network
def shapes(g):
    def reshaped(self, x):
        x = F.relu(self.first(x.permute(0, 2, 1)))
        x = x.transpose(1, 2).reshape(x.shape[0], -1, 2).squeeze(-1)[:, ::2].contiguous()
        return self.head(F.relu(x.view(x.shape[0], -1)))

    return Apply(reshaped, first=nn.Linear(3, 4), head=nn.LazyLinear(2)), (3, 5)


@network
def constants(g):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
            self.gain = nn.Parameter(torch.randn(5))
            self.register_buffer("shift", torch.randn(5))

        def forward(self, x):
            x = F.relu(self.first(x) * self.gain + self.shift) / 7
            return 3 - self.second(x.sub(0.1).mul(1.3))

    return Scaled(), (4,)


@network
def max_min(g):
    def sort_pairs(self, x):
        for layer in (self.first, self.second):
            a, b = layer(x).chunk(2, dim=1)
            x = torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)
        return self.head(x)

    return Apply(sort_pairs, first=nn.Linear(4, 6), second=nn.Linear(6, 6), head=nn.Linear(6, 2)), (4,)


@network
def affine_only(g):
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)), (5,)


@network
def activation_first(g):
    return nn.Sequential(nn.ReLU(), nn.Linear(4, 5), nn.ReLU()), (4,)


@network
def deep_narrow(g):
    layers = [layer for _ in range(6) for layer in (nn.Linear(4, 4), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(4, 2)), (4,)


@network
def wide_linear(g):
    return nn.Sequential(nn.Linear(700, 6), nn.ReLU(), nn.Linear(6, 2)), (700,)


@network
def prelu_channels(g):
    return nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.PReLU(3), nn.Conv2d(3, 2, 2), nn.Sigmoid(), nn.Flatten(), nn.LazyLinear(2)
    ), (1, 4, 5)  # fmt: skip


@network
def gated(g):
    """Products and a quotient of values, broadcasting included."""

    def gate(self, x):
        a, b = self.first(x).chunk(2, dim=1)
        y = a * b + a * self.third(x)[:, :1]
        return self.second(y) / (1 + self.third(x).abs())

    return Apply(gate, first=nn.Linear(4, 6), second=nn.Linear(3, 2), third=nn.Linear(4, 2)), (4,)


@network
def products(g):
    def multiply(self, x):
        a, b = F.relu(self.first(x)).chunk(2, dim=1)
        return self.second(a * b - a * x[:, :1]) * x[:, 1:3]

    return Apply(multiply, first=nn.Linear(4, 6), second=nn.Linear(3, 2)), (4,)


@network
def matrix_products(g):
    def multiply(self, x):
        y = F.relu(self.first(x))
        return (
            self.head((y @ self.second(x).transpose(1, 2)).flatten(1))
            - torch.einsum("bij,bkj->bik", y, y)[:, 0, :2]
        )

    return Apply(multiply, first=nn.Linear(4, 3), second=nn.Linear(4, 3), head=nn.Linear(4, 2)), (2, 4)


@network
def softmax(g):
    return nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 3), nn.LogSoftmax(-1)), (2, 3)


@network
def standardized(g):
    norms = [
        lambda: nn.LayerNorm(5),
        lambda: nn.RMSNorm(5),
        lambda: nn.GroupNorm(2, 2),
        lambda: nn.InstanceNorm1d(2),
    ]
    return nn.Sequential(nn.Linear(3, 5), norms[integer(g, 0, 3)](), nn.ReLU(), nn.Linear(5, 2)), (2, 3)


@network
def attention(g):
    """A block of a transformer: multi-head attention and a GELU network, both residual, with LayerNorm."""

    def block(self, x):
        y = self.before(x)
        q, k, v = (part.transpose(1, 2) for part in self.qkv(y).view(x.shape[0], 3, 3, 2, 2).unbind(2))
        shares = (q @ k.transpose(-2, -1) / 2**0.5).softmax(-1)
        x = x + self.out((shares @ v).transpose(1, 2).reshape(x.shape))
        x = x + self.second(F.gelu(self.first(self.after(x))))
        return self.head(x.mean(1))

    return Apply(
        block, before=nn.LayerNorm(4), qkv=nn.Linear(4, 12), out=nn.Linear(4, 4), after=nn.LayerNorm(4),
        first=nn.Linear(4, 6), second=nn.Linear(6, 4), head=nn.Linear(4, 2),
    ), (3, 4)  # fmt: skip


@network
def fused_attention(g):
    """The functional and the module, with a mask."""

    def attend(self, x):
        y = self.layer(x, x, x, need_weights=False)[0]
        return self.head(F.scaled_dot_product_attention(y, x, x, is_causal=True).flatten(1))

    layer = nn.MultiheadAttention(4, 2, batch_first=True)
    return Apply(attend, layer=layer, head=nn.Linear(8, 2)), (2, 4)


@network
def conv_three_dimensional(g):
    return nn.Sequential(
        nn.Conv3d(2, 4, (2, 3, 2), stride=(1, 2, 1), padding=1, groups=2), nn.BatchNorm3d(4), nn.ReLU(),
        nn.ConvTranspose3d(4, 2, (2, 2, 1), stride=(2, 1, 1), padding=(1, 0, 0), output_padding=(1, 0, 0)), nn.ReLU(),
        nn.Conv3d(2, 2, 2, dilation=(2, 1, 1)), nn.Flatten(), nn.LazyLinear(2),
    ), (2, 3, 4, 2)  # fmt: skip


# Regions.

REGIONS: dict[str, Callable[[torch.Generator, Tensor], pycert.LpBall | pycert.Box]] = {}


def region(build):
    """Registers a builder: (generator, centre [B, *in]) -> region."""
    REGIONS[build.__name__] = build
    return build


def _random_like(g: torch.Generator, x: Tensor) -> Tensor:
    return torch.rand(x.shape, generator=g).to(x.dtype)


@region
def linf(g, x):
    return pycert.LpBall(x, eps=10.0 ** uniform(g, -6, 1), p=math.inf)


@region
def linf_per_sample_clipped(g, x):
    return pycert.LpBall(
        x.clamp(0, 1), eps=_random_like(g, x[(...,) + (0,) * (x.dim() - 1)]), p=math.inf, clip=(0, 1)
    )


@region
def l2(g, x):
    return pycert.LpBall(x, eps=10.0 ** uniform(g, -4, 1), p=2)


@region
def l2_per_sample_clipped(g, x):
    return pycert.LpBall(
        x.clamp(0, 1), eps=_random_like(g, x[(...,) + (0,) * (x.dim() - 1)]), p=2, clip=(0, 1)
    )


@region
def l1(g, x):
    return pycert.LpBall(x, eps=10.0 ** uniform(g, -4, 1), p=1)


@region
def l1_clipped(g, x):
    return pycert.LpBall(x.clamp(0, 1), eps=0.3, p=1, clip=(0, 1))


@region
def point(g, x):
    return pycert.Box(x, x.clone())


@region
def point_ball(g, x):
    return pycert.LpBall(x, eps=0.0, p=[1, 2, math.inf][integer(g, 0, 2)])


@region
def one_sided(g, x):
    return pycert.Box(x, x + 10.0 ** uniform(g, -6, 1) * _random_like(g, x))


@region
def some_coordinates(g, x):
    moved = _random_like(g, x) < 0.3
    return pycert.Box(torch.where(moved, x - 0.2, x), torch.where(moved, x + 0.1, x))


@region
def huge_beside_tiny(g, x):
    scale = 10.0 ** (12 * _random_like(g, x) - 6)
    return pycert.Box(x * scale - 1e-3 * scale, x * scale + 1e-3 * scale * _random_like(g, x))


@region
def subnormal(g, x):
    tiny = 2.0**-140 if x.dtype == torch.float32 else 2.0**-1060
    return pycert.Box(-tiny * _random_like(g, x), tiny * _random_like(g, x))


@region
def around_zero(g, x):
    return pycert.Box(torch.zeros_like(x), _random_like(g, x))


def centre(name: str, seed: int, shape: tuple[int, ...], batch: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 17 * len(name))
    return torch.randn(batch, *shape, generator=generator).to(dtype)


def box_of(where) -> tuple[Tensor, Tensor]:
    """The least float64 box around the region (rounded to nearest in float64)."""
    if isinstance(where, pycert.Box):
        return where.lower.double(), where.upper.double()
    x = where.x.double()
    eps = torch.as_tensor(where.eps, dtype=torch.float64).reshape(-1, *[1] * (x.dim() - 1))
    lower, upper = x - eps, x + eps
    if where.clip is None:
        return lower, upper
    low, high = (torch.tensor(end, dtype=torch.float64) for end in where.clip)
    return lower.maximum(low), upper.minimum(high)


def points_in(where, seed: int, count: int, dtype: torch.dtype) -> Tensor:
    """``[count, B, *in]`` points of the region: corners, interior points, edges and the centre.

    Values of ``dtype`` that lie in the region exactly as it was asked for, up to float64 rounding
    of ``x`` and ``eps`` where ``dtype`` is float64.
    """
    lower, upper = box_of(where)
    generator = torch.Generator().manual_seed(seed)
    t = torch.rand(count, *lower.shape, generator=generator).double()
    kind = torch.arange(count).reshape(-1, *[1] * lower.dim()) % 4
    t = torch.where(kind == 1, (t < 0.5).double(), t)  # corners
    t = torch.where(kind == 2, (4 * t - 1.5).clamp(0, 1), t)  # edges and faces
    points = lower + t * (upper - lower)
    points = torch.where(t == 1, upper, points).minimum(upper).maximum(lower)
    return inside(where, points, dtype)


def inside(where, points: Tensor, dtype: torch.dtype) -> Tensor:
    """``points`` moved into the region and rounded to ``dtype`` without leaving it."""
    lower, upper = box_of(where)
    if isinstance(where, pycert.LpBall) and where.p != math.inf:
        points = _project(where, points, dtype)
    rounded = points.maximum(lower).minimum(upper).to(dtype)
    infinity = torch.tensor(math.inf, dtype=dtype)
    rounded = torch.where(rounded.double() > upper, rounded.nextafter(-infinity), rounded)
    return torch.where(rounded.double() < lower, rounded.nextafter(infinity), rounded)


def _project(where, points: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales the offsets from the centre into the ball, with room for the rounding to ``dtype`` that follows."""
    x = where.x.double()
    offset = points - x
    norm = torch.linalg.vector_norm(offset.flatten(2), float(where.p), dim=2)
    eps = torch.as_tensor(where.eps, dtype=torch.float64).expand(norm.shape)
    unit = torch.finfo(dtype).eps * (x[0].numel() + 4)
    room = unit * (1 + x.flatten(1).abs().amax(1) / eps.clamp(min=1e-300))
    factor = (eps * (1 - room).clamp(min=0) / norm.clamp(min=1e-300)).clamp(max=1)
    return x + offset * factor.reshape(*factor.shape, *[1] * (x.dim() - 1))


def ends_by_ascent(run: Callable[[Tensor], Tensor], where, steps: int = 5) -> Iterator[Tensor]:
    """Points of the region, float64, that drive every output of ``run`` to its ends by signed steps."""
    lower, upper = box_of(where)
    start = lower / 2 + upper / 2
    outputs = run(start).flatten(1).shape[1]
    for output in range(min(outputs, 4)):
        for sign in (-1.0, 1.0):
            x = start
            for step in range(steps):
                x = x.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(sign * run(x).flatten(1)[:, output].sum(), x)
                moved = x.detach() + gradient.sign() * (upper - lower) / (1 + step)
                x = inside(where, moved.maximum(lower).minimum(upper)[None], torch.float64)[0]
            yield x.detach()
