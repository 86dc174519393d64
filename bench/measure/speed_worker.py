"""A process that builds and times mechanisms of one checkout, as `speed.py` asks it to.

It is started in a folder that holds the `attentions` package of the commit to measure; all else is
this checkout's. Requests and answers are one line of JSON each, on standard input and output.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import attentions
from bench.measure import memory
from bench.system.machine import keep_freed_memory

# The machine's peaks: a product of matrices of this side, and bytes that no cache holds.
_SIDE, _COPIED, _PEAK_REPEATS = 1024, 2**27, 5


class Case:
    """One mechanism at one place, in one mode.

    Args:
        spec: keyword arguments of `attentions.build_for`, with its `name`.
        mode: "inference" or "training"; training is forward and backward.
        seed: of weights, input and incoming gradient.
        weights: file of the weights, which both commits share.
        save: write it, else read it.

    Raises:
        ValueError: for parameters that are not in the file.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        mode: str,
        batch_size: int,
        seed: int,
        weights: str,
        save: bool,
    ) -> None:
        torch.manual_seed(seed)
        self.grid = tuple(spec["grid"])
        spec = {**spec, "grid": self.grid}
        self.module: nn.Module = attentions.build_for(**spec)
        self.module.train(mode == "training")
        generator = torch.Generator().manual_seed(seed)
        shape = (batch_size, spec["num_global"] + self.grid[0] * self.grid[1], spec["dim"])
        self.x = torch.randn(shape, generator=generator)
        self.gradient = torch.randn(shape, generator=generator)
        self.training = mode == "training"
        self.x.requires_grad_(self.training)
        if save:
            torch.save(self.module.state_dict(), weights)
            return
        given = torch.load(weights, weights_only=True)
        missing = {name for name, _ in self.module.named_parameters()} - set(given)
        if missing:
            raise ValueError(f"parameters without a counterpart: {sorted(missing)}")
        self.module.load_state_dict(given, strict=False)

    def call(self) -> Tensor:
        """Run it once; gradients are those of this call alone."""
        if not self.training:
            with torch.no_grad():
                return self.module(self.x, self.grid)
        self.x.grad = None
        self.module.zero_grad(set_to_none=True)
        y: Tensor = self.module(self.x, self.grid)
        y.backward(self.gradient)
        return y.detach()

    def results(self, path: str) -> None:
        """Save output and, of training, all gradients, by name."""
        found = {"output": self.call()}
        if self.training:
            named = [("input", self.x), *self.module.named_parameters()]
            found |= {f"gradient of {n}": p.grad for n, p in named if p.grad is not None}
        torch.save(found, path)

    def timed(self) -> dict[str, float]:
        """Seconds of one call: on the clock and of this process's cores."""
        wall, cores = time.perf_counter(), time.process_time()
        self.call()
        return {"wall": time.perf_counter() - wall, "cores": time.process_time() - cores}

    def linear(self) -> dict[str, float]:
        """The linear layers, each alone on what the call gives it: seconds and multiply-adds."""
        given: list[tuple[nn.Linear, Tensor]] = []
        layers = [part for part in self.module.modules() if isinstance(part, nn.Linear)]
        hooks = [
            layer.register_forward_hook(lambda layer, args, _: given.append((layer, args[0])))
            for layer in layers
        ]
        self.call()
        for hook in hooks:
            hook.remove()
        return {
            "seconds": sum(_least(functools.partial(self._alone, *one)) for one in given),
            "multiply_adds": (3 if self.training else 1)
            * sum(x.numel() * layer.out_features for layer, x in given),
        }

    def _alone(self, layer: nn.Module, x: Tensor) -> None:
        with torch.set_grad_enabled(self.training):
            y = layer(x.detach().requires_grad_(self.training))
            if self.training:
                y.backward(y.detach())

    def peak(self) -> int:
        """Bytes at the peak of a call above what was there before it."""
        self.x.grad = None
        self.module.zero_grad(set_to_none=True)
        found = memory.peak(self.call, device="cpu", live=[self.module, self.x, self.gradient])
        return found.bytes - found.before


def peaks() -> dict[str, float]:
    """What this process reaches now: multiply-adds, and bytes read and written, each a second."""
    matrix, source = torch.randn(_SIDE, _SIDE), torch.ones(_COPIED // 4)
    product, target = torch.empty_like(matrix), torch.empty_like(source)

    return {
        "multiply_adds_per_s": _SIDE**3 / _least(lambda: torch.mm(matrix, matrix, out=product)),
        "bytes_per_s": 2 * _COPIED / _least(lambda: target.copy_(source)),
    }


def _least(call: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls."""
    taken = []
    for _ in range(_PEAK_REPEATS):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


def main() -> None:
    """Answer requests until standard input ends."""
    keep_freed_memory()
    # What a mechanism prints must not look like an answer.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    case: Case | None = None
    for line in sys.stdin:
        try:
            request = json.loads(line)
            do, found = request.pop("do"), None
            if do == "build":
                case = Case(**request)
            else:
                found = peaks() if do == "peaks" else getattr(case, do)(**request)
            answer = {"found": found}
        except Exception as error:
            # Whatever a mechanism of either commit raises is the answer to this request.
            case = None
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
