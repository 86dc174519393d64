"""Mechanisms that break one rule of the contract each, named in `BROKEN`, and a sound one."""

import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

BROKEN = {
    "NoNumGlobal": ("constructor", "does not take num_global"),
    "NoDefault": ("constructor", "no default for the option window"),
    "FailsToBuild": ("constructor", r"RuntimeError: no luck \(broken_mechanisms.py, line \d+\)"),
    "Unfilled": ("constructor", r"ValueError: .*Unfilled: gain hold values that are not a number"),
    "Exits": ("constructor", r"its constructor calls sys\.exit: 3"),
    "Positional": ("keywords", "dim, num_heads, num_global can be given by position"),
    "Swallows": ("keywords", "a misspelt option goes unnoticed"),
    "WrongArchOption": ("keywords", "arch_option names 'window'"),
    "NoPosition": ("keywords", "takes no position"),
    "DropsGlobals": ("output", r"output \(3, 48, 48\) for input \(3, 50, 48\)"),
    "Doubles": ("output", "torch.float64 for an input of torch.float32"),
    "ReturnsTuple": ("output", "returns tuple, not a tensor"),
    "NotFinite": ("output", "not finite"),
    "EvenOnly": ("odd grids", "grid 5x7: RuntimeError: .* line"),
    "RefusesOdd": ("odd grids", "grid 5x7 is not even"),
    "Spread": ("thin grids", "grid 1x1: the output is not finite"),
    "Thin": ("thin grids", "grid 1x1: IndexError"),
    "NeedsGlobals": ("global tokens", "num_global 0: the output is not finite"),
    "OneGlobal": ("global tokens", "num_global 0: IndexError"),
    "KeepsGrid": ("resolution", "grid 8x12 after 6x8: RuntimeError"),
    "KeepsMean": ("resolution", "another output than without the call before"),
    "NotFixed": ("resolution", "fixed_size is declared, but grid 8x12 is taken"),
    "BatchMean": ("batch", "comes out otherwise than alone"),
    "BatchPeak": ("batch", "where its neighbours are large"),
    "Unused": ("gradients", r"parameter 'spare.weight' got no gradient"),
    "Detached": ("gradients", r"parameter 'value.weight' got no gradient"),
    "Rounded": ("gradients", r"parameter 'gain' got a gradient that is zero everywhere"),
    "Root": ("gradients", "the input got a gradient that is not finite"),
    "ChangesGradient": ("gradients", "changes the gradient of the output in place"),
    "NoGrad": ("gradients", "the output has no gradient"),
    "WrongBackward": ("derivatives", "batch 1, contiguous: the gradient of the input is wrong"),
    "WrongWhileKeeping": ("derivatives", "the gradient of the input is wrong"),
    "InstanceNorm": (
        "derivatives",
        "batch 1, .*: the gradient of the input is wrong",
    ),
    "Noisy": ("calls", "another output after a call in between"),
    "InPlace": ("calls", "it changes its input"),
    "Counts": ("calls", "a call while evaluating changes calls"),
    "Appends": ("calls", "each call keeps 57,600 bytes more than the one before"),
    "Shared": ("instances", "two instances share the parameter 'shared'"),
    "Loose": ("copies", "loaded into another"),
    "Stale": ("copies", "loaded into another after a call, gives another output"),
    "SharedCopy": ("copies", "changing a deep copy changes the original"),
    "SingleOnly": ("precision", "RuntimeError"),
    "Cancels": ("precision", "of the largest value away from float64"),
    "OneDtype": ("autocast", "RuntimeError"),
    "Overflows": ("autocast", "under bfloat16 autocast, the output is not finite"),
    "CompiledOtherwise": ("compile", "compiled, the output is off by"),
    "NoFormula": ("FLOPs", "not in the count: aten._fft"),
    "Distances": ("FLOPs", "not in the count: elements of elementwise operators"),
    "Threaded": ("FLOPs", "not in the count: threads, results of operators out of sight"),
    "KeptElsewhere": ("FLOPs", "after a count: RuntimeError: .* device"),
    "Neighbours": ("FLOPs", "not in the count: squared differences"),
    "WrongCount": ("FLOPs", r"multiply_adds\(\(6, 8\)\) declares 1,"),
    "WrongReference": ("reference", "grid 6x8, num_global 0: the output is off by"),
}


class Sound(nn.Module):
    """Every token gets a learned mixture of itself and the mean of all tokens."""

    def __init__(self, *, dim, num_heads, num_global=1):
        super().__init__()
        self.num_global = num_global
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def mix(self, x, grid):
        value = self.value(x)
        return value + value.mean(dim=1, keepdim=True)

    def forward(self, x, grid):
        return self.proj(self.mix(x, grid))


class NoNumGlobal(Sound):
    def __init__(self, *, dim, num_heads):
        super().__init__(dim=dim, num_heads=num_heads)


class NoDefault(Sound):
    def __init__(self, *, window, **common):
        super().__init__(**common)


class FailsToBuild(Sound):
    def __init__(self, **common):
        super().__init__(**common)
        raise RuntimeError("no luck\nat all")


class Exits(Sound):
    def __init__(self, **common):
        super().__init__(**common)
        sys.exit(3)


class Positional(Sound):
    def __init__(self, dim, num_heads, num_global=1):
        super().__init__(dim=dim, num_heads=num_heads, num_global=num_global)


class Swallows(Sound):
    def __init__(self, *, dim, num_heads, num_global=1, **kwargs):
        super().__init__(dim=dim, num_heads=num_heads, num_global=num_global)


class WrongArchOption(Sound):
    arch_option = "window"


class NoPosition(Sound):
    positions = ("absolute", "relative")


class DropsGlobals(Sound):
    def forward(self, x, grid):
        return super().forward(x, grid)[:, self.num_global :]


class Doubles(Sound):
    def forward(self, x, grid):
        return super().forward(x, grid).double()


class ReturnsTuple(Sound):
    def forward(self, x, grid):
        return super().forward(x, grid), None


class NotFinite(Sound):
    def mix(self, x, grid):
        return super().mix(x, grid) / 0


class EvenOnly(Sound):
    def mix(self, x, grid):
        rows, columns = (side if side == 1 else 2 * (side // 2) for side in grid)
        x[:, self.num_global :].reshape(len(x), rows, columns, x.shape[2])
        return super().mix(x, grid)


class RefusesOdd(Sound):
    def mix(self, x, grid):
        if min(grid) > 1 and (grid[0] % 2 or grid[1] % 2):
            raise ValueError(f"grid {grid[0]}x{grid[1]} is not even")
        return super().mix(x, grid)


class Spread(Sound):
    def mix(self, x, grid):
        value = super().mix(x, grid)
        return value / (1 + value[:, self.num_global :].std(dim=1, keepdim=True))


class Thin(Sound):
    def mix(self, x, grid):
        image = x[:, self.num_global :].unflatten(1, grid)
        return super().mix(x, grid) + image[:, 1, 1, None] + image[:, 0, 0, None]


class NeedsGlobals(Sound):
    def mix(self, x, grid):
        return super().mix(x, grid) + x[:, : self.num_global].mean(dim=1, keepdim=True)


class OneGlobal(Sound):
    def mix(self, x, grid):
        return super().mix(x, grid) + x[:, : self.num_global][:, 0, None]


class KeepsGrid(Sound):
    grid = None

    def mix(self, x, grid):
        self.grid = self.grid or grid
        x[:, self.num_global :].unflatten(1, self.grid)
        return super().mix(x, grid)


class KeepsMean(Sound):
    rows = None

    def mix(self, x, grid):
        self.rows = self.rows or grid[0]
        return super().mix(x, grid) * self.rows / grid[0]


class NotFixed(Sound):
    fixed_size = True


class BatchMean(Sound):
    def mix(self, x, grid):
        return super().mix(x, grid) + x.mean(dim=0)


class BatchPeak(Sound):
    def mix(self, x, grid):
        return super().mix(x / x.abs().max().clamp(min=20), grid)


class Unused(Sound):
    def __init__(self, **common):
        super().__init__(**common)
        self.spare = nn.Linear(3, 3)


class Detached(Sound):
    def mix(self, x, grid):
        return x + super().mix(x, grid).detach()


class Rounded(Sound):
    def __init__(self, **common):
        super().__init__(**common)
        self.gain = nn.Parameter(torch.ones(1))

    def mix(self, x, grid):
        return super().mix(x, grid) * (1 + self.gain.round())


class Root(Sound):
    def mix(self, x, grid):
        return super().mix(x, grid) + (x - x).abs().sqrt()


class NoGrad(Sound):
    @torch.no_grad()
    def forward(self, x, grid):
        return super().forward(x, grid)


class _HalfOfTheGradient(torch.autograd.Function):
    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(_, gradient):
        return gradient / 2


class WrongBackward(Sound):
    def mix(self, x, grid):
        return super().mix(_HalfOfTheGradient.apply(x), grid)


class _GradientInPlace(torch.autograd.Function):
    @staticmethod
    def forward(_, x):
        return x.clone()

    @staticmethod
    def backward(_, gradient):
        return gradient.mul_(4) / 4


class ChangesGradient(Sound):
    def forward(self, x, grid):
        return _GradientInPlace.apply(super().forward(x, grid))


class InstanceNorm(Sound):
    """torch's own wrong gradient on the CPU, for batch 1 and a channels-last gradient."""

    def __init__(self, *, dim, **common):
        super().__init__(dim=dim, **common)
        self.norm = nn.InstanceNorm2d(dim)

    def forward(self, x, grid):
        y = super().forward(x, grid)
        if min(grid) < 2:
            return y
        tokens = x[:, self.num_global :].transpose(1, 2).contiguous().unflatten(2, grid)
        normed = self.norm(tokens).flatten(2).transpose(1, 2)
        return y + torch.nn.functional.pad(normed, (0, 0, self.num_global, 0))


class Noisy(Sound):
    def mix(self, x, grid):
        return super().mix(x, grid) + torch.rand((), device=x.device).to(x.dtype)


class InPlace(Sound):
    def mix(self, x, grid):
        x.mul_(2)
        return super().mix(x.clone(), grid)


class Counts(Sound):
    def __init__(self, **common):
        super().__init__(**common)
        self.register_buffer("calls", torch.tensor(0))

    def mix(self, x, grid):
        self.calls += 1
        return super().mix(x, grid)


class Unfilled(Sound):
    def __init__(self, **common):
        super().__init__(**common)
        self.gain = nn.Parameter(torch.empty(self.proj.out_features))

    def mix(self, x, grid):
        return super().mix(x, grid) * self.gain


class Appends(Sound):
    def __init__(self, **common):
        super().__init__(**common)
        self.seen = []

    def mix(self, x, grid):
        self.seen.append(x.clone())
        return super().mix(x, grid)


class Shared(Sound):
    weight = nn.Parameter(torch.ones(1))

    def __init__(self, **common):
        super().__init__(**common)
        self.shared = Shared.weight

    def mix(self, x, grid):
        return super().mix(x, grid) * self.shared


class Loose(Sound):
    def __init__(self, *, dim, **common):
        super().__init__(dim=dim, **common)
        self.gain = torch.rand(dim)

    def mix(self, x, grid):
        return super().mix(x, grid) * self.gain.to(x.dtype)


class Stale(Sound):
    """Keeps what it makes of its weights while evaluating, and never drops it."""

    kept = None

    def mix(self, x, grid):
        if self.training:
            return super().mix(x, grid) * self.value.weight.mean()
        if self.kept is None:
            self.kept = self.value.weight.mean()
        return super().mix(x, grid) * self.kept


class Fresh(Stale):
    """As timm's LeViT: training drops it, which was kept with its graph."""

    def train(self, mode=True):
        self.kept = None if mode else self.kept
        return super().train(mode)


class RefusesByItsLayers(Sound):
    """Of one size, as a layer of it finds."""

    fixed_size = True

    def __init__(self, *, grid=(6, 8), num_global=1, **common):
        super().__init__(num_global=num_global, **common)
        tokens = num_global + grid[0] * grid[1]
        self.across = nn.Linear(tokens, tokens)

    def mix(self, x, grid):
        return super().mix(x, grid) + self.across(x.transpose(1, 2)).transpose(1, 2)


class SharedCopy(Sound):
    def __deepcopy__(self, memo):
        return self


class SingleOnly(Sound):
    def mix(self, x, grid):
        return super().mix(x, grid) @ torch.ones(x.shape[-1], x.shape[-1], device=x.device)


class Cancels(Sound):
    def mix(self, x, grid):
        return (super().mix(x, grid) + 1e6) - 1e6


class OneDtype(Sound):
    def mix(self, x, grid):
        index = torch.arange(x.shape[1], device=x.device)[:, None].expand(x.shape)
        return torch.zeros_like(x).scatter_add(1, index, super().mix(x, grid))


class Overflows(Sound):
    def mix(self, x, grid):
        value = super().mix(x, grid)
        return value / (value.dtype != torch.bfloat16)


class CompiledOtherwise(Sound):
    def mix(self, x, grid):
        return super().mix(x, grid) * (2 if torch.compiler.is_compiling() else 1)


class ReadsValues(Sound):
    def mix(self, x, grid):
        return super().mix(x, grid) * (2 if x.sum().item() > 1e9 else 1)


class ConstantOfTheCpu(Sound):
    def mix(self, x, grid):
        return super().mix(x, grid) * torch.arange(x.shape[1])[:, None].cos()


class NoFormula(Sound):
    def mix(self, x, grid):
        return super().mix(x, grid) + torch.fft.fft(x, dim=1).real


class Distances(Sound):
    def mix(self, x, grid):
        value = super().mix(x, grid)
        return (value.unsqueeze(1) - x.unsqueeze(2)).abs().mean(-1).softmax(-1) @ value


class Neighbours(Sound):
    def mix(self, x, grid):
        value = super().mix(x, grid)
        apart = [(value - value.roll(i, 1)).pow(2).sum(-1, keepdim=True) for i in (1, 2, 3, 4)]
        return sum((-one).exp() * value.roll(i, 1) for i, one in enumerate(apart))


class Threaded(Sound):
    def mix(self, x, grid):
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(super().mix, x, grid).result()


KEPT = {}


class KeptElsewhere(Sound):
    def mix(self, x, grid):
        mask = KEPT.setdefault(x.shape[1], torch.ones(x.shape[1], 1, device=x.device))
        return super().mix(x, grid) * mask.to(x.dtype)


class WrongCount(Sound):
    def multiply_adds(self, grid):
        return 1


class WrongReference(Sound):
    def __init__(self, *, implementation="fast", **common):
        super().__init__(**common)
        self.sign = 1 if implementation == "fast" else -1

    def mix(self, x, grid):
        return self.sign * super().mix(x, grid)


class InferenceInside(Sound):
    def mix(self, x, grid):
        value = super().mix(x, grid)
        with torch.inference_mode():
            weights = (value @ x.mT).softmax(-1)
        return weights.clone() @ value


class KeepsAverages(Sound):
    """Passes: its weights are normalised by vectors that each call while training makes better."""

    def __init__(self, *, dim, **common):
        super().__init__(dim=dim, **common)
        self.proj = nn.utils.parametrizations.spectral_norm(self.proj)
        self.norm = nn.BatchNorm1d(dim)
        self.register_buffer("center", torch.zeros(dim))

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass

    def mix(self, x, grid):
        if self.training:
            self.center = 0.9 * self.center + 0.1 * x.detach().mean((0, 1))
        y = super().mix(x - self.center, grid)
        return self.norm(y.flatten(0, 1)).view_as(y)


class RoundsInside(Sound):
    """Passes: some of it is in float32, or less, whatever the input is."""

    def mix(self, x, grid):
        turned = torch.polar(torch.ones_like(x, dtype=torch.float32), x.float()).real
        return super().mix(x, grid) + turned.to(x.dtype) + x.bfloat16().sin().to(x.dtype)


class GraphBreak(Sound):
    """Passes, with a warning."""

    def mix(self, x, grid):
        torch._dynamo.graph_break()
        return super().mix(x, grid)


class CountsCalls(Sound):
    """Passes, with a warning: a plain attribute says how often it was trained."""

    calls = 0

    def mix(self, x, grid):
        if self.training and not torch.compiler.is_compiling():
            self.calls += 1
        return super().mix(x, grid)


class TrainsMean(Sound):
    """Passes, with a warning: what training keeps is in no state dict, and used in evaluation."""

    mean = None

    def mix(self, x, grid):
        if self.training and not torch.compiler.is_compiling():
            self.mean = x.detach().mean((0, 1))
        return super().mix(x, grid) + (0 if self.mean is None else self.mean)


class Pools(Sound):
    """Passes, with a warning: sums products in a way that no count follows."""

    def mix(self, x, grid):
        pairs = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(0, 1).transpose(0, 1)
        pooled = nn.functional.avg_pool1d(pairs.flatten(1), 3, 1, 1).unflatten(1, pairs.shape[1:])
        return super().mix(x, grid) + pooled.transpose(0, 1).mean(-1).view_as(x)


class Wide(Sound):
    """Takes only grids of 16 rows and columns or more, and says so."""

    def __init__(self, *, least=16, **common):
        super().__init__(**common)
        if least < 1:
            raise ValueError(f"least {least} is not positive")
        self.least = least

    def mix(self, x, grid):
        if min(grid) < self.least:
            raise ValueError(f"grid {grid[0]}x{grid[1]} is smaller than {self.least}")
        return super().mix(x, grid)


class Chatty(Sound):
    """Prints."""

    def mix(self, x, grid):
        if not torch.compiler.is_compiling():
            print("mixing")
        return super().mix(x, grid)


class WrongWhileKeeping(KeepsAverages):
    def mix(self, x, grid):
        return super().mix(_HalfOfTheGradient.apply(x), grid)
