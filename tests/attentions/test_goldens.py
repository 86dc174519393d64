import json
from pathlib import Path

import numpy as np
import pytest
import torch

import attentions

GOLDENS = Path(__file__).parents[1] / "goldens"
FILES = sorted(
    path for path in GOLDENS.glob("*.npz") if not path.name.startswith(("backbone_", "convert_"))
)
DTYPES = {torch.float64: 1e-5, torch.float32: 1e-4}
# Those of the authors' code of other mechanisms are kept in float64.
AUTHORS = {torch.float64: 1e-10, torch.float32: 1e-5}


def read(path, dtype):
    """Meta data, and arrays by their group and name, floating ones as `dtype`."""
    groups = {"": {}, "param": {}, "grad": {}}
    with np.load(path) as file:
        meta = json.loads(str(file["meta"]))
        for key in set(file.files) - {"meta"}:
            group, _, name = key.rpartition("/")
            value = torch.from_numpy(file[key])
            groups[group][name] = value.to(dtype) if value.is_floating_point() else value
    return meta, groups[""], groups["param"], groups["grad"]


def build(meta, parameters, dtype, **options):
    module = attentions.build(
        meta["attention"],
        dim=meta["dim"],
        num_heads=meta["num_heads"],
        num_global=meta["num_global"],
        **meta["options"],
        **options,
    )
    for name, index in module.state_dict().items():
        if not index.is_floating_point():
            assert torch.equal(index, parameters[name]), name
    module.load_state_dict(parameters)
    return module.to(dtype).eval()


def assert_equal(actual, golden, tolerance, what):
    error = (actual - golden).abs().max() / golden.abs().max()
    assert error < tolerance, f"{what}: {error:.1e} of the largest value"


def test_every_mechanism_without_a_library_has_a_golden():
    covered = {read(path, torch.float32)[0]["attention"] for path in FILES}
    published = {"full", "global", "linformer", "longformer", "performer", "srformer"}
    assert covered == published | {"agent", "biformer", "mila", "rala"}


@pytest.mark.parametrize("implementation", ["fast", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path, dtype, implementation):
    meta, arrays, parameters, gradients = read(path, dtype)
    tolerance = (AUTHORS if path.name.startswith("authors_") else DTYPES)[dtype]
    module = build(meta, parameters, dtype, implementation=implementation)
    x = arrays["x"].requires_grad_()
    y = module(x, (meta["nx"], meta["ny"]))
    y.backward(arrays["grad_y"])
    own = dict(module.named_parameters())
    assert own.keys() == gradients.keys()
    assert_equal(y, arrays["y"], tolerance, "y")
    assert_equal(x.grad, arrays["grad_x"], tolerance, "grad_x")
    for name, golden in gradients.items():
        assert_equal(own[name].grad, golden, tolerance, f"gradient of {name}")
