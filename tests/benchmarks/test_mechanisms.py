"""Every mechanism at the stage shapes of ViL-Small: forward and training, fast and reference.

`pytest tests/benchmarks --benchmark-enable --benchmark-json=out.json` times them at 800x1344;
without `--benchmark-enable`, as in the tests, each runs once on a small image.
"""

import pytest
import torch

import attentions
from bench.measure import speed

# The oracles hold scores of all pairs of tokens: 67,201 squared at the first stage.
MOST_TOKENS = 5000
SMALL = (64, 96)


def cases():
    for case in speed.cases(attentions.names(), positions=("absolute", "relative")):
        for implementation in ("fast", "reference"):
            label = f"{case.mechanism}-{case.stage}-{case.position}-{case.mode}-{implementation}"
            yield pytest.param(case, implementation, id=label)


@pytest.mark.parametrize(("case", "implementation"), list(cases()))
def test_call(benchmark, case, implementation):
    spec = dict(case.spec)
    if benchmark.disabled:
        shrunk = speed.cases([case.mechanism], image_size=SMALL, positions=[case.position])
        spec = next(dict(c.spec) for c in shrunk if c.stage == case.stage)
    rows, columns = spec["grid"]
    tokens = spec["num_global"] + rows * columns
    if implementation == "reference" and tokens > MOST_TOKENS:
        pytest.skip(f"the reference holds scores of {tokens:,} tokens squared")
    if min(rows, columns) < spec.get("reduction", 1):
        pytest.skip(f"grid {rows}x{columns} is smaller than the reduction")
    benchmark.group = f"{case.mechanism}, stage {case.stage}, {case.position}, {case.mode}"
    torch.manual_seed(0)
    module = attentions.build_for(**spec, implementation=implementation)
    x = torch.randn(1, tokens, spec["dim"])

    def infer():
        with torch.no_grad():
            return module(x, (rows, columns))

    def train():
        module.zero_grad(set_to_none=True)
        y = module(x.requires_grad_(), (rows, columns))
        y.backward(torch.ones_like(y))
        return y

    y = benchmark(train if case.mode == "training" else infer)
    assert y.shape == x.shape
    assert y.isfinite().all()
