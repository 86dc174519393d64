import pytest

from bench.config import variants
from bench.config.suites import load_suite
from bench.errors import InputError


def test_a_setting_is_found_by_its_path_or_its_name():
    # Another setting's name is the whole path of this one.
    assert variants.parse("seed=0,1,2").path == "seed"
    assert variants.parse("drop_path=0.05,0.1").path == "model.drop_path"
    assert variants.parse("model.drop_path=0.05,0.1").name == "drop_path"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("drop_path=0,0.0,0.1", (0.0, 0.1)),
        ("lr=1e-3,0.001,1e-4", (1e-3, 1e-4)),
        ("steps=10,20,10", (10, 20)),
        ("min_sizes=[64],[96,128]", ([64], [96, 128])),
    ],
)
def test_each_value_is_tried_once_as_the_configuration_has_it(text, values):
    found = variants.parse(text).values
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


def test_rows_are_called_by_their_value_and_have_it():
    suite = load_suite("quick", rows=["ViL", "full"])
    runs = variants.expand(suite, variants.parse("drop_path=0,1e-1")).runs
    assert [(run.row, run.model.drop_path) for run in runs] == [
        ("ViL (drop_path=0.0)", 0.0),
        ("ViL (drop_path=0.1)", 0.1),
        ("full (drop_path=0.0)", 0.0),
        ("full (drop_path=0.1)", 0.1),
    ]


def test_costs_are_of_each_size_of_a_search():
    suite = load_suite("quick", rows=["ViL"])
    search = variants.parse("data.fixed_size=[64,96],[100,128]")
    runs = variants.expand(suite, search, ["data.path=a #b"]).runs
    assert [run.profile.image_size for run in runs] == [(64, 96), (128, 128)]
    sized = ["profile.image_size=[64,96]"]
    suite = load_suite("quick", rows=["ViL"], overrides=sized)
    with pytest.raises(InputError, match=r"image_size=\[64, 96\] must be the size"):
        variants.expand(suite, search, sized)


def test_seeds_are_whole_one_after_the_other_and_rows_keep_their_names():
    suite = load_suite("quick", rows=["ViL", "full"])
    seeds = variants.expand(suite, variants.parse("seed=3,5"))
    runs = [("ViL", 3), ("full", 3), ("ViL", 5), ("full", 5)]
    assert [(run.row, run.seed) for run in seeds.runs] == runs
    assert seeds.name_of(seeds.runs[2]) == "ViL (seed 5)"
    assert suite.name_of(suite.runs[0]) == "ViL"


def test_options_of_mechanisms_are_searched_by_their_path():
    search = variants.parse("model.options.window=2,4")
    runs = variants.expand(load_suite("quick", rows=["swin"]), search).runs
    assert [(run.row, run.model.options["window"]) for run in runs] == [
        ("swin (window=2)", 2),
        ("swin (window=4)", 4),
    ]
    assert [variants.value_of(run, search.path) for run in runs] == [2, 4]
    with pytest.raises(InputError, match=r"model.options.window: no attention of row 'full"):
        variants.expand(load_suite("quick", rows=["full"]), search)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("schedule=1x,3x", "'schedule' is not a setting"),
        ("row=a,b", "'row' is not a setting"),
        ("model.options.=1", "'model.options.' is not a setting"),
        ("drop_path", "no values"),
        ("drop_path=[", "no values"),
        ("image_size=[64,64]", "one of data.generated.image_size, profile.image_size"),
    ],
)
def test_wrong_searches_are_one_clear_line(text, said):
    with pytest.raises(InputError) as caught:
        variants.parse(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
