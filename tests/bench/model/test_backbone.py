import copy
import gzip
import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import StochasticDepth

import attentions
from bench.measure.flops import count_flops
from bench.measure.predict import predict
from bench.model.attributes import attributes, changed
from bench.model.backbone import AttentionBlock, MlpBlock, ViL
from bench.system.seeding import seed_everything

TESTS = Path(__file__).parents[2]
GOLDENS = sorted((TESTS / "goldens").glob("backbone_*.npz"))
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4}
PREFIX = "backbone.bottom_up."
with gzip.open(Path(__file__).with_name("published_state_keys.json.gz")) as _file:
    PUBLISHED = json.load(_file)
FOUR = (
    "l1,h1,d8,n1,s1,g1,p4,f3,a{a}_l2,h2,d16,n1,s1,g1,p2,f3,a{a}"
    "_l3,h2,d16,n2,s1,g1,p2,f3,a{a}_l4,h4,d32,n1,s1,g0,p2,f3,a{a}"
)
ABSOLUTE, RELATIVE = FOUR.format(a=1), FOUR.format(a=0)
THREE = "l1,h1,d8,n1,g1,p4,f3_l2,h2,d16,n1,g1,p2,f3_l3,h2,d16,n2,g1,p2,f3"
CLASSES = {
    "full": "FullAttention",
    "global": "GlobalAttention",
    "longformer": "LongformerAttention",
    "performer": "PerformerAttention",
    "srformer": "SpatialReductionAttention",
}


def images(height, width, *, batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, height, width, generator=generator).to(dtype)


def mechanisms(vil):
    return [type(place.module).__name__ for place in vil.attention_places()]


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("implementation", ["fast", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float64", "float32"])
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_golden(path, dtype, implementation):
    with np.load(path) as file:
        meta = json.loads(str(file["meta"]))
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
    vil = ViL(
        meta["arch"],
        attention=meta["attention"],
        image_size=meta["image_size"],
        num_classes=meta["num_classes"],
        implementation=implementation,
    )
    parameters = {
        key.removeprefix("param/"): value for key, value in arrays.items() if "param/" in key
    }
    for name, index in vil.state_dict().items():
        if name.endswith("relative_position_index"):
            assert torch.equal(index, parameters[name]), name
    vil.load_state_dict(parameters)
    vil = vil.to(dtype).eval()
    image = arrays["image"].to(dtype)
    with torch.no_grad():
        results = vil(image) | {"head": vil.classify(image)}
    for name, result in results.items():
        golden = arrays[f"out/{name}"]
        error = (result - golden).abs().max() / golden.abs().max()
        assert error < TOLERANCES[dtype], f"{name}: {error:.1e} of the largest value"


def published_vil(published):
    attention = published["attention"]
    if attention == "longformerhand":
        attention = "global" if published["only_global"] else "longformer"
    with torch.device("meta"):
        return ViL(published["arch"], attention=attention)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_state_dict(name):
    published = PUBLISHED[name]
    vil = published_vil(published)
    expected = {
        key.removeprefix(PREFIX): tuple(shape)
        for key, shape in published["state"].items()
        if key.startswith(PREFIX)
    }
    assert {key: tuple(value.shape) for key, value in vil.state_dict().items()} == expected
    assert count(vil) == published["backbone_params"]


@pytest.mark.parametrize(
    ("arch", "strides"),
    [(ABSOLUTE, (4, 8, 16, 32)), (THREE, (4, 8, 16))],
    ids=["four", "three"],
)
def test_stages(arch, strides):
    vil = ViL(arch, image_size=96, num_classes=3)
    names = [f"layer{i + 1}" for i in range(len(strides))]
    assert vil.stride == strides[-1]
    assert vil.strides == dict(zip(names, strides, strict=True))
    assert list(vil.channels.values()) == [stage.dim for stage in vil.stages]
    maps = vil(images(64, 96))
    assert {name: tuple(value.shape) for name, value in maps.items()} == {
        name: (2, vil.channels[name], 64 // stride, 96 // stride)
        for name, stride in vil.strides.items()
    }
    assert vil.classify(images(64, 96)).shape == (2, 3)


@pytest.mark.parametrize("arch", [ABSOLUTE, RELATIVE, THREE], ids=["a1", "a0", "three"])
@pytest.mark.parametrize("size", [(1, 1), (33, 64), (47, 90), (95, 96)], ids=str)
def test_sizes_that_are_no_multiple_are_padded_and_maps_cropped(arch, size):
    vil = ViL(arch, image_size=96, num_classes=3).eval()
    image = images(*size)
    maps = vil(image)
    height, width = (-(-side // vil.stride) * vil.stride for side in size)
    padded = image.new_zeros(2, 3, height, width)
    padded[..., : size[0], : size[1]] = image
    whole = vil(padded)
    for name, stride in vil.strides.items():
        rows, columns = -(-size[0] // stride), -(-size[1] // stride)
        assert maps[name].shape == (2, vil.channels[name], rows, columns)
        torch.testing.assert_close(maps[name], whole[name][..., :rows, :columns])


@pytest.mark.parametrize("size", [(64, 96), (47, 90)], ids=str)
def test_places_know_the_grid_they_see(size):
    vil = ViL(ABSOLUTE, image_size=96, num_classes=3)
    seen = {}
    for place in vil.attention_places():
        place.module.register_forward_hook(
            lambda _, inputs, __, name=place.name: seen.update({name: inputs[1]})
        )
    vil(images(*size))
    places = list(vil.attention_places())
    assert seen == {place.name: place.grid(size) for place in places}
    for place in places:
        assert vil.get_submodule(place.name) is place.module


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_s0_makes_its_own_stage_dense_alone(stage):
    parts = ABSOLUTE.split("_")
    parts[stage - 1] = parts[stage - 1].replace("s1", "s0")
    vil = ViL("_".join(parts), attention="srformer", image_size=96)
    expected = [
        CLASSES["full" if spec.number == stage else "srformer"]
        for spec in vil.stages
        for _ in range(spec.blocks)
    ]
    assert mechanisms(vil) == expected


def test_stages_may_name_different_mechanisms():
    mix = ["longformer", "srformer", "performer", "full"]
    vil = ViL(ABSOLUTE, attention=mix, image_size=96, window=2, reduction=3, num_features=6)
    assert mechanisms(vil) == [
        CLASSES[name] for name in ("longformer", "srformer", "performer", "performer", "full")
    ]
    modules = [place.module for place in vil.attention_places()]
    assert (modules[0].window, modules[1].reduction, modules[2].num_features) == (2, 3, 6)
    assert vil(images(96, 96))["layer4"].shape == (2, 32, 3, 3)


@pytest.mark.parametrize("arch", [ABSOLUTE, RELATIVE], ids=["a1", "a0"])
@pytest.mark.parametrize("name", ["longformer", "swin"])
def test_single_blocks_of_a_stage_are_dense(name, arch):
    mixed = ViL(arch, attention=name, dense={3: [1]}, image_size=96)
    by_hand = ViL(arch, attention=name, image_size=96)
    by_hand.layer3[3].attn = attentions.build_for(
        "full",
        grid=(6, 6),
        position=mixed.stages[2].position,
        dim=16,
        num_heads=2,
        num_global=1,
    )
    by_hand.load_state_dict(mixed.state_dict())
    assert [place.attention for place in mixed.attention_places()] == [*[name] * 3, "full", name]
    results = []
    for vil in (mixed, by_hand):
        maps = vil(images(90, 47))
        sum(value.square().sum() for value in maps.values()).backward()
        results.append((maps, {key: p.grad for key, p in vil.named_parameters()}))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    size = (64, 96)
    assert count_flops(mixed, image_size=size).total == count_flops(by_hand, image_size=size).total
    costs = [predict(vil, image_size=size, mode="training").total for vil in (mixed, by_hand)]
    assert costs[0] == costs[1] != predict(ViL(arch, attention=name), image_size=size).total


@pytest.mark.parametrize(
    ("mix", "globals_"),
    [
        (["longformer", "longformer", "swin", "full"], "1110"),
        (["swin", "focused_linear", "longformer", "full"], "1110"),
        (["focused_linear", "global", "swin", "swin"], "0123"),
    ],
    ids=lambda value: "-".join(value),
)
@pytest.mark.parametrize("arch", [ABSOLUTE, RELATIVE], ids=["a1", "a0"])
@pytest.mark.filterwarnings("ignore:stage .* has no relative positions")
def test_any_mix_of_mechanisms_over_the_stages(arch, mix, globals_):
    parts = [
        re.sub("g[01]", f"g{few}", part)
        for part, few in zip(arch.split("_"), globals_, strict=True)
    ]
    vil, oracle = (
        ViL("_".join(parts), attention=mix, image_size=96, num_classes=3, implementation=form)
        for form in ("fast", "reference")
    )
    oracle.load_state_dict(vil.state_dict())
    blocks = [1, 1, 2, 1]
    assert [place.stage.attention for place in vil.attention_places()] == [
        name for name, count in zip(mix, blocks, strict=True) for _ in range(count)
    ]
    image = images(47, 90).double()
    results = []
    for module in (vil.double(), oracle.double()):
        maps = module(image)
        sum(value.square().sum() for value in maps.values()).backward()
        results.append((maps, {name: p.grad for name, p in module.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], msg=name)
    outside = ("norm.", "head.")
    reached = {name for name, gradient in results[0][1].items() if gradient is not None}
    assert {name for name, _ in vil.named_parameters() if not name.startswith(outside)} == reached


def test_f_sets_the_parameter_of_each_mechanism():
    arch = ABSOLUTE.replace("f3", "f2")
    parameters = {"longformer": "window", "performer": "num_features", "srformer": "reduction"}
    for name, parameter in parameters.items():
        vil = ViL(arch, attention=name, image_size=96)
        assert {getattr(p.module, parameter) for p in vil.attention_places()} == {2}
    vil = ViL(arch, attention="linformer", image_size=(64, 96))
    assert [place.module.seq_len for place in vil.attention_places()] == [
        1 + 16 * 24,
        1 + 8 * 12,
        1 + 4 * 6,
        1 + 4 * 6,
        2 * 3,
    ]
    assert vil(images(64, 96))["layer1"].shape == (2, 8, 16, 24)
    with pytest.raises(ValueError, match="made for 385 tokens and got 257"):
        vil(images(64, 64))


def test_drop_path_rises_linearly_over_all_blocks():
    vil = ViL(ABSOLUTE, image_size=96, drop_path=0.4)
    for kind in (AttentionBlock, MlpBlock):
        blocks = [block for block in vil.modules() if isinstance(block, kind)]
        assert [block.drop_path.p for block in blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert {block.mode for block in vil.modules() if isinstance(block, StochasticDepth)} == {"row"}


def test_drop_path_drops_residuals_of_single_images_while_training():
    vil = ViL(ABSOLUTE, image_size=32, drop_path=0.99).train()
    torch.manual_seed(0)
    image = images(32, 32, batch=1).expand(64, -1, -1, -1)
    first, last = vil(image)["layer1"], vil(image)["layer4"]
    # The first block's rate is 0; the last one's residuals are nearly all gone, image by image.
    torch.testing.assert_close(first, first[:1].expand_as(first))
    assert len(torch.unique(last.flatten(1), dim=0)) > 1
    vil.eval()
    torch.testing.assert_close(vil(image), vil(image), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(97, 64), (64, 97)], ids=str)
def test_an_image_larger_than_the_positions(size):
    grids = {(97, 64): "32x16", (64, 97): "16x32"}
    vil = ViL(ABSOLUTE, image_size=96)
    with pytest.raises(ValueError, match=f"{grids[size]} needs more .* 24x24"):
        vil(images(*size))
    # Relative positions of windows know no largest image.
    assert ViL(RELATIVE, image_size=96)(images(*size))["layer1"].shape[0] == 2
    dense = ViL(RELATIVE, attention="full", image_size=96)
    with pytest.raises(ValueError, match=f"{grids[size]} is larger than 24x24"):
        dense(images(*size))


def test_image_size_as_height_and_width():
    vil = ViL(ABSOLUTE, image_size=(33, 96))
    embed = vil.layer1[0]
    assert embed.x_pos_embed.shape == (1, 16, 4)
    assert embed.y_pos_embed.shape == (1, 24, 4)
    assert vil(images(64, 96))["layer4"].shape == (2, 32, 2, 3)


@pytest.mark.parametrize("name", ["srformer", "performer", "global"])
def test_a0_without_relative_positions_warns(name):
    arch = RELATIVE.replace("g0", "g1")
    with pytest.warns(UserWarning, match="has no relative positions") as caught:
        vil = ViL(arch, attention=name, image_size=96)
    for stage in (1, 2, 3, 4):
        assert any(f"stage {stage}: {name} " in str(warning.message) for warning in caught)
    assert not any("pos" in key for key in vil.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ViL(arch.replace("a0", "a1"), attention=name, image_size=96)
        ViL(arch, attention="longformer", image_size=96)


def test_an_option_that_no_stage_knows():
    with pytest.raises(ValueError, match=r"'windw' \(did you mean 'window'\?\).*longformer: .*"):
        ViL(ABSOLUTE, windw=3)
    # What ARCH and image_size decide is no option.
    decided = ("dim", "num_heads", "num_global", "grid", "position", "seq_len", "block_index")
    for option in decided:
        with pytest.raises(ValueError, match=f"no stage's attention has an option '{option}'"):
            ViL(ABSOLUTE, attention=["full", "linformer", "swin", "full"], **{option: 8})


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="unknown attention 'longfromer'"):
        ViL(ABSOLUTE, attention="longfromer")
    with pytest.raises(ValueError, match=r"drop_path 1\.0"):
        ViL(ABSOLUTE, drop_path=1.0)
    for size in (0, (96, 0), (96, 96, 96)):
        with pytest.raises(ValueError, match=re.escape(f"image_size {size}")):
            ViL(ABSOLUTE, image_size=size)
    with pytest.raises(ValueError, match="ARCH, character 1"):
        ViL("l1")
    with pytest.raises(ValueError, match="stage 0 is not one of the stages 1 to 4"):
        ViL(ABSOLUTE, dense={0: [0]})


def test_initial_weights():
    vil = ViL(ABSOLUTE, image_size=960)
    for name, value in vil.named_parameters():
        if name.endswith(("norm.weight", "norm_embed.weight")):
            assert (value == 1).all(), name
        if name.endswith("bias") and ".0.proj" not in name:
            assert (value == 0).all(), name
    for name in ("layer1.0.x_pos_embed", "layer3.3.attn.kv.weight", "layer4.2.mlp.fc1.weight"):
        assert vil.get_parameter(name).detach().std() == pytest.approx(0.02, rel=0.1), name


BUFFERED = """
import random
from collections import deque

import numpy as np
import torch
from torch import nn

class Mine(nn.Module):
    def __init__(self, *, dim, num_heads, num_global=1):
        super().__init__()
        self.proj, self.norm = nn.Linear(dim, dim), nn.BatchNorm1d(dim)
        self.register_buffer("bank", torch.zeros(dim))
        self.mean, self.last, self.calls = torch.zeros(dim), deque(maxlen=2), 0
        self.norm.mean = self.mean
        self.own = torch.Generator().manual_seed(0), random.Random(0), np.random.default_rng(0)

    def forward(self, x, grid):
        y = self.norm(self.proj(x).transpose(1, 2)).transpose(1, 2) * (1 + self.bank)
        if self.training:
            torch_s, *others = self.own
            drawn = sum(one.random() for one in (random, np.random, *others))
            y = y * (torch.rand(y.shape, generator=torch_s) + torch.full_like(y, drawn))
            y = y * (self.calls + self.norm.mean + sum(self.last)).exp()
            self.bank = 0.9 * self.bank + 0.1 * y.detach().mean((0, 1))
            self.mean += 0.1 * x.detach().mean((0, 1))
            self.last.append(x.detach().mean((0, 1)))
            self.calls += 0.1
            self.kept = x.detach()
        return y
"""


@pytest.mark.parametrize("attention", ["mine", "performer"])
def test_checkpointing_changes_neither_gradients_nor_what_is_kept(attention, tmp_path):
    if attention == "mine":
        (tmp_path / "mine.py").write_text(BUFFERED)
        attention = f"{tmp_path / 'mine.py'}:Mine"
    torch.manual_seed(0)
    kept = ViL(ABSOLUTE, attention=attention, image_size=64).train()
    again = copy.deepcopy(kept)
    again.grad_checkpointing = True
    for step in range(3):
        for vil in (kept, again):
            seed_everything(step)
            sum(map(torch.sum, vil(images(64, 64)).values())).backward()
    for (name, one), other in zip(kept.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, msg=name)
    for (name, one), other in zip(kept.named_buffers(), again.buffers(), strict=True):
        torch.testing.assert_close(other, one, msg=name)
    assert changed(attributes(kept), attributes(again)).keys() <= {"grad_checkpointing"}


class Own(nn.Module):
    """Gives its layers initial weights of its own, or not."""

    def __init__(self, *, dim, num_heads, num_global=1, change=""):
        super().__init__()
        self.one, self.two = nn.Linear(dim, dim), nn.Linear(dim, dim)
        if change == "bias":
            nn.init.constant_(self.two.bias, -5)
        elif change == "loaded":
            self.two.load_state_dict(self.one.state_dict())
        elif change == "of another":
            with torch.no_grad():
                self.two.weight.copy_(-self.one.weight)
        elif change == "copy":
            self.two = copy.deepcopy(self.one)
        elif change == "frozen":
            self.two.requires_grad_(requires_grad=False)
        elif change == "kept":
            self.register_buffer("start", self.one.weight.detach().clone())
        self.made = [value.clone() for value in self.state_dict().values()]

    def forward(self, x, grid):
        return x


@pytest.mark.parametrize("change", ["", "bias", "loaded", "of another", "copy", "frozen", "kept"])
def test_initial_weights_that_a_mechanism_chose_stay(change):
    torch.manual_seed(0)
    vil = ViL(ABSOLUTE, attention=f"{__file__}:Own", image_size=64, change=change)
    own = next(vil.attention_places()).module
    same = [torch.equal(a, b) for a, b in zip(own.state_dict().values(), own.made, strict=True)]
    assert same == [bool(change)] * len(same)
    if not change:
        assert 0.01 < own.one.weight.std() < 0.03
        assert not own.one.bias.any()
    # Elsewhere torch's layers are as they were.
    assert nn.Linear.reset_parameters.__module__ == "torch.nn.modules.linear"
