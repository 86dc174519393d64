import copy
import re
import sys

import pytest
import torch

import attentions
from attentions.contract import Attention, Redrawing
from attentions.registry import register
from bench.model.backbone import ViL
from tests.mechanisms import write

EXAMPLES = [
    pytest.param(name, options, id=f"{name}-{'-'.join(map(str, options.values()))}")
    for name in attentions.names()
    for options in getattr(attentions.find(name), "examples", ({},))
]
NAMES = [
    pytest.param(name, getattr(attentions.find(name), "examples", ({},))[0], id=name)
    for name in attentions.names()
]
GRID = (6, 8)
every_example = pytest.mark.parametrize(("name", "options"), EXAMPLES)
every_name = pytest.mark.parametrize(("name", "options"), NAMES)

LINEAR = ("weight", "bias")
LONGFORMER = [
    f"{layer}{end}.{part}"
    for layer in ("query", "kv", "proj")
    for part in LINEAR
    for end in ("", "_global")
]
RELATIVE = [
    "local_relative_position_bias_table",
    "g2l_relative_position_bias",
    "g2g_relative_position_bias",
    "relative_position_index",
]
PUBLISHED_NAMES = [
    ("full", {}, ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]),
    (
        "full",
        {"position": "relative"},
        ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias", *RELATIVE],
    ),
    ("global", {}, LONGFORMER),
    ("global", {"share_weights": False}, LONGFORMER),
    ("longformer", {}, LONGFORMER),
    ("longformer", {"position": "relative"}, LONGFORMER + RELATIVE),
    (
        "srformer",
        {},
        [f"{layer}.{part}" for layer in ("query", "kv", "proj") for part in LINEAR]
        + ["proj_sr.weight"],
    ),
    (
        "performer",
        {},
        [
            "qkv.weight",
            "qkv.bias",
            "proj.weight",
            "proj.bias",
            "fast_attention.projection_matrix",
        ],
    ),
    *(
        (
            "linformer",
            {"share_kv": share},
            [f"{layer}.{part}" for layer in ("query", "kv", "proj") for part in LINEAR]
            + ["proj_k", "proj_v"],
        )
        for share in (False, True)
    ),
]
BAD_OPTIONS = [
    ("full", {"position": "rotary"}, "'rotary'.*absolute, relative"),
    ("full", {"position": "relative", "grid": None}, "grid"),
    ("full", {"implementation": "slow"}, "'slow'.*fast, reference"),
    ("global", {"position": "relative"}, "'relative'.*absolute"),
    ("longformer", {"window": 0}, "window 0"),
    ("longformer", {"padding": "same"}, "'same'.*zero, exact, cyclic"),
    ("longformer", {"neighbours": "none"}, "'none'.*all, self, random"),
    ("srformer", {"reduction": 0}, "reduction 0"),
    ("performer", {"num_features": 0}, "num_features 0"),
    ("performer", {"redraw_interval": -1}, "redraw_interval -1"),
    ("swin", {"window": 0}, "window 0"),
    ("swin", {"shift": 7}, r"shift 7 is outside \[0, 7\)"),
    ("swin", {"shift": -1}, "shift -1"),
    ("swin", {"position": "rotary"}, "'rotary'.*absolute, relative"),
    ("neighborhood", {"kernel": 3, "stride": 4}, r"stride 4 is outside \[1, 3\], the kernel"),
    ("neighborhood", {"dilation": 0}, "dilation 0"),
    ("maxvit", {"partition": "block"}, "'block'.*window, grid"),
    ("twins", {"scope": "all"}, "'all'.*local, global"),
    ("twins", {"position": "relative"}, "'relative'.*absolute"),
    ("vitdet", {"every": 0}, "every 0"),
    ("vitdet", {"position": "relative", "full": True}, "needs the option grid"),
    ("focused_linear", {"power": 0.5}, "power 0.5"),
    ("focused_linear", {"power": float("inf")}, "power inf"),
    ("focused_linear", {"kernel": 4}, "kernel 4 must be odd"),
    ("focused_linear", {"kernel": -1}, "kernel -1"),
    ("pvt_v2", {"size": 0}, "size 0"),
    ("lite_mla", {"kernel": 4}, "kernel 4 must be odd"),
    ("pooling", {"size": 2}, "size 2 must be odd"),
    ("linformer", {"num_features": 0}, "num_features 0"),
    ("agent", {"agents": 0}, "agents 0"),
    ("biformer", {"topk": 0}, "topk 0"),
    ("mila", {"num_heads": 4}, "dim 12 .* dim / num_heads = 3 even"),
    ("rala", {"num_heads": 2}, "dim 12 / num_heads 2 = 6 .* multiple of 4"),
    ("rala", {"kernel": 4}, "kernel 4 must be odd"),
    ("ss2d", {"state": 0}, "state 0 and expand 1 must be positive"),
    ("linformer", {"seq_len": 0}, "seq_len 0"),
]
USERS = """
from torch import nn


class Mean(nn.Module):
    def __init__(self, *, dim, num_heads, num_global=1, gain=1.0):
        super().__init__()
        self.proj = nn.Linear(dim, dim)
        self.gain = gain

    def forward(self, x, grid):
        return self.proj(self.gain * x.mean(dim=1, keepdim=True).expand_as(x))


not_a_class = 3
"""


def build(name, options, *, grid=GRID, num_global=2, **more):
    return attentions.build_for(
        name, grid=grid, dim=12, num_heads=3, num_global=num_global, **options, **more
    )


def tokens(module, grid=GRID, batch=2):
    generator = torch.Generator().manual_seed(0)
    count = module.num_global + grid[0] * grid[1]
    return torch.randn(batch, count, module.dim, generator=generator)


@every_name
@pytest.mark.parametrize(
    "shape", [(2, 51, 12), (2, 48, 12), (2, 50, 13), (50, 12), (2, 50, 12, 1)], ids=str
)
def test_a_wrong_shape_is_named_with_the_right_one(name, options, shape):
    module = build(name, options)
    with pytest.raises(ValueError, match=re.escape(str(shape))) as caught:
        module(torch.zeros(shape), GRID)
    assert "6x8" in str(caught.value)
    assert "(B, 50, 12)" in str(caught.value)


@every_name
def test_wrong_sizes_are_named(name, options):
    with pytest.raises(ValueError, match=r"dim 10 .* num_heads 3"):
        attentions.build_for(name, grid=GRID, dim=10, num_heads=3, **options)
    with pytest.raises(ValueError, match="num_global -1"):
        build(name, options, num_global=-1)
    for dropout in ("attn_drop", "proj_drop"):
        with pytest.raises(ValueError, match=f"{dropout} 1.0"):
            build(name, options, **{dropout: 1.0})


def test_global_attention_needs_a_global_token():
    with pytest.raises(ValueError, match="at least 1 global tokens, got num_global 0"):
        build("global", {}, num_global=0)


@pytest.mark.parametrize(("name", "options", "message"), BAD_OPTIONS)
def test_wrong_option_values_are_named_with_the_allowed(name, options, message):
    place = {"seq_len": 50} if name == "linformer" else {}
    with pytest.raises(ValueError, match=message):
        attentions.build(name, **{"dim": 12, "num_heads": 3, "num_global": 2, **place, **options})


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"'longfromer' \(did you mean 'longformer'\?\)") as caught:
        attentions.build("longfromer", dim=12, num_heads=3)
    assert all(name in str(caught.value) for name in attentions.names())
    with pytest.raises(ValueError, match=r"'windw' \(did you mean 'window'\?\).*padding"):
        attentions.build("longformer", dim=12, num_heads=3, windw=3)
    with pytest.raises(ValueError, match="needs the option 'seq_len'"):
        attentions.build("linformer", dim=12, num_heads=3)


def test_names_are_sorted_and_hold_the_published_ones():
    names = attentions.names()
    assert list(names) == sorted(names)
    published = {"full", "global", "linformer", "longformer", "performer", "srformer"}
    assert published <= set(names)


def test_options_leave_out_size_and_place():
    assert attentions.options("srformer") == (
        "attn_drop",
        "implementation",
        "proj_drop",
        "reduction",
    )
    assert not {"seq_len", "grid", "position"} & set(attentions.options("linformer"))
    assert "shift" in attentions.options("swin")
    assert "block_index" not in attentions.options("swin")


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="'full' is already registered"):
        register("full")(torch.nn.Linear)


@every_example
def test_meta_device(name, options):
    with torch.device("meta"):
        module = build(name, options)
        x = torch.zeros(2, 50, 12, requires_grad=True)
        y = module(x, GRID)
        y.sum().backward()
    assert all(value.is_meta for value in module.state_dict().values())
    assert y.is_meta
    assert y.shape == x.shape
    assert x.grad.shape == x.shape


def test_meta_device_with_random_neighbours():
    with torch.device("meta"):
        module = build("longformer", {"window": 3, "neighbours": "random"}).train()
        assert module(torch.zeros(2, 50, 12), GRID).is_meta


@pytest.mark.parametrize(("name", "options", "names"), PUBLISHED_NAMES)
def test_state_dict_has_the_published_names(name, options, names):
    assert sorted(build(name, options).state_dict()) == sorted(names)


def test_shared_weights_are_one_tensor_under_both_names():
    shared = build("longformer", {}).state_dict()
    assert shared["query.weight"].data_ptr() == shared["query_global.weight"].data_ptr()
    own = build("longformer", {"share_weights": False}).state_dict()
    assert own["query.weight"].data_ptr() != own["query_global.weight"].data_ptr()
    shared = build("linformer", {"share_kv": True}).state_dict()
    assert shared["proj_k"].data_ptr() == shared["proj_v"].data_ptr()
    without = build("longformer", {}, num_global=0).state_dict()
    assert not any("global" in name for name in without)


@pytest.mark.parametrize("keep_index", [True, False])
@pytest.mark.parametrize("num_global", [0, 2])
def test_relative_positions_on_a_smaller_grid_are_a_slice(monkeypatch, num_global, keep_index):
    if not keep_index:
        monkeypatch.setattr("attentions.full.LARGEST_INDEX", 0)
    large = build("full", {"position": "relative"}, num_global=num_global)
    assert ("relative_position_index" in large.state_dict()) == keep_index
    rows, columns = small_grid = (4, 5)
    small = build("full", {"position": "relative"}, grid=small_grid, num_global=num_global)
    table = large.local_relative_position_bias_table.detach().unflatten(0, (11, 15))
    sliced = table[6 - rows : 5 + rows, 8 - columns : 7 + columns].flatten(0, 1)
    state = large.state_dict() | {"local_relative_position_bias_table": sliced}
    state.pop("relative_position_index", None)
    small.load_state_dict(state, strict=False)
    x = tokens(large, small_grid)
    torch.testing.assert_close(large(x, small_grid), small(x, small_grid))

    for grid in ((7, 8), (6, 9), (8, 6)):
        with pytest.raises(ValueError, match=f"{grid[0]}x{grid[1]} is larger than 6x8"):
            large(tokens(large, grid), grid)


def test_relative_positions_without_a_grid():
    with pytest.raises(ValueError, match="needs the option grid"):
        attentions.build("full", dim=12, num_heads=3, position="relative")


def test_linformer_knows_one_length():
    module = build("linformer", {})
    with pytest.raises(ValueError, match="made for 50 tokens and got 37"):
        module(tokens(module, (5, 7)), (5, 7))
    # The same length in another grid is the same to it.
    module(tokens(module, (8, 6)), (8, 6))


@pytest.mark.parametrize("interval", [3, 0])
def test_performer_redraws_at_its_interval_when_told_the_step(interval):
    module = build("performer", {"num_features": 5, "redraw_interval": interval})
    matrix = module.fast_attention.projection_matrix
    changed = []
    # Each step is told twice, as by a step of two parts.
    for step in (0, 1, 2, 3, 3, 4, 5, 6, 6, 7):
        before = matrix.clone()
        module.set_training_step(step)
        module(tokens(module), GRID)
        changed.append(not torch.equal(before, matrix))
    assert [at for at, drawn in enumerate(changed) if drawn] == ([3, 7] if interval else [])


@pytest.mark.parametrize("implementation", ["fast", "reference"])
def test_performer_does_not_count_its_calls(implementation):
    options = {"num_features": 5, "redraw_interval": 1, "implementation": implementation}
    module = build("performer", options)
    before = copy.deepcopy(vars(module)), module.fast_attention.projection_matrix.clone()
    for _ in range(3):
        module(tokens(module), GRID)
    assert torch.equal(before[1], module.fast_attention.projection_matrix)
    assert {k: v for k, v in vars(module).items() if not k.startswith("_")} == {
        k: v for k, v in before[0].items() if not k.startswith("_")
    }


def performer_backbone():
    arch = "l1,h1,d4,f3,p4_l2,h1,d4,f3,p2_l3,h1,d4,s0,p2"
    return ViL(arch, attention="performer", image_size=32, num_classes=2, redraw_interval=3)


def test_the_backbone_redraws_at_the_steps_that_it_is_told():
    # A copy, which redraws its own.
    vil = copy.deepcopy(performer_backbone())
    redrawn = [place.module for place in vil.attention_places()][:2]
    assert all(isinstance(module, Redrawing) for module in redrawn)
    images = torch.zeros(1, 3, 32, 32)
    changed = []
    for step in range(7):
        before = [module.fast_attention.projection_matrix.clone() for module in redrawn]
        vil.train().start_training_step(step)
        vil(images)
        after = [module.fast_attention.projection_matrix for module in redrawn]
        changed.append([not torch.equal(*both) for both in zip(before, after, strict=True)])
        # Evaluating in between neither counts nor redraws.
        vil.eval()(images)
        assert vil.state_dict()["calls_since_last_redraw"] == step + 1
    assert changed == [[step in (3, 6)] * 2 for step in range(7)]


def test_a_backbone_without_performers_counts_nothing():
    vil = ViL("l1,h1,d4_l2,h1,d4_l3,h1,d4", image_size=8, num_classes=2)
    assert "calls_since_last_redraw" not in vil.state_dict()


@pytest.fixture
def users_folder(tmp_path, monkeypatch):
    (tmp_path / "users_attention.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)
    # Loading a module puts its folder on the path, and it in the table of modules.
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delitem(sys.modules, "users_attention", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    "source", ["users_attention", "users_attention.py", "{}/users_attention.py"]
)
def test_a_mechanism_of_the_user(users_folder, source):
    name = f"{source.format(users_folder)}:Mean"
    module = attentions.build(name, dim=12, num_heads=3, gain=2.0)
    assert type(module).__name__ == "Mean"
    assert module.gain == 2.0
    assert module(torch.zeros(2, 49, 12), GRID).shape == (2, 49, 12)
    assert attentions.options(name) == ("gain",)
    assert attentions.find(name) is attentions.find(name)
    with pytest.raises(ValueError, match=r"'gian' \(did you mean 'gain'\?\)"):
        attentions.build(name, dim=12, num_heads=3, gian=2.0)

    vil = ViL("l1,h1,d4,p4_l2,h1,d4,s0_l3,h1,d4", attention=name, image_size=32, gain=0.5)
    assert [type(place.module).__name__ for place in vil.attention_places()] == [
        "Mean",
        "FullAttention",
        "Mean",
    ]
    assert vil(torch.zeros(1, 3, 32, 32))["layer3"].shape == (1, 4, 2, 2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.py:Mean", "no such file: missing.py"),
        ("missing_module:Mean", "No module named 'missing_module'"),
        ("users_attention.py:Median", "has no torch module class 'Median'"),
        ("users_attention:not_a_class", "has no torch module class 'not_a_class'"),
        ("broken.py:Mean", "SyntaxError"),
        ("raises.py:Mean", "RuntimeError: two lines"),
        ("exits.py:Mean", "SystemExit: 3"),
        (":Mean", "cannot import ''"),
        ("users_attention:", "has no torch module class ''"),
    ],
)
def test_a_mechanism_that_cannot_be_loaded(users_folder, name, message):
    (users_folder / "broken.py").write_text("class Mean(:\n")
    (users_folder / "raises.py").write_text("raise RuntimeError('two\\nlines')\n")
    (users_folder / "exits.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        attentions.find(name)
    assert "\n" not in str(caught.value)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("torch.backends.cuda.enable_flash_sdp(False)", "flash attention to False"),
        ("torch.set_default_dtype(torch.float64)", "the default dtype to torch.float64"),
        ("torch.backends.cudnn.benchmark = True", "cudnn.benchmark to True"),
    ],
)
def test_a_mechanism_must_not_change_settings_of_torch(tmp_path, line, said):
    """Other rows of the process would be others."""
    name = write(tmp_path / "mine.py", imports=line)
    with pytest.raises(ValueError, match=re.escape(said)):
        attentions.find(name)
    assert torch.get_default_dtype() == torch.float32
    assert torch.backends.cuda.flash_sdp_enabled()
    assert not torch.backends.cudnn.benchmark


def test_a_mechanism_imports_from_beside_itself_first(tmp_path):
    """A folder of another mechanism may have a module of the same name that nothing imported."""
    for folder, width in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "utils_of_tests.py").write_text(f"WIDTH = {width}\n")
    attentions.find(write(tmp_path / "a" / "mine.py"))
    attentions.find(write(tmp_path / "b" / "mine.py", imports="import utils_of_tests"))
    assert sys.modules["utils_of_tests"].WIDTH == 2


def test_a_constructor_that_exits_is_an_error_of_its_row(tmp_path):
    name = write(tmp_path / "mine.py", imports="import sys")
    text = (tmp_path / "mine.py").read_text()
    (tmp_path / "mine.py").write_text(
        text.replace("super().__init__()", "super().__init__(); sys.exit('needs CUDA')")
    )
    with pytest.raises(ValueError, match=r"its constructor calls sys\.exit: needs CUDA"):
        attentions.build(name, dim=4, num_heads=1)


def test_a_mechanism_with_the_base_class_needs_its_two_forms():
    class Nothing(Attention):
        pass

    for implementation, method in (("fast", "attend"), ("reference", "reference")):
        module = Nothing(dim=4, num_heads=1, implementation=implementation)
        with pytest.raises(NotImplementedError, match=f"Nothing.{method}"):
            module(torch.zeros(1, 2, 4), (1, 1))


def test_a_module_without_shapes_is_refused_in_a_line(tmp_path):
    path = tmp_path / "lazy.py"
    path.write_text(
        "from torch import nn\nclass Lazy(nn.Module):\n"
        "    def __init__(self, *, dim, num_heads, num_global=1):\n"
        "        super().__init__()\n        self.a = nn.LazyLinear(dim)\n"
    )
    with pytest.raises(ValueError, match=r"a\.weight, a\.bias have no shape before a first call"):
        attentions.build(f"{path}:Lazy", dim=8, num_heads=2)
