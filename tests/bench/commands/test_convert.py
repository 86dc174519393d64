"""`python -m bench convert`: what it writes, what it says, and what wrong input gets."""

import json
import re

import pytest
import torch

from bench import cli
from bench.config.suites import profile_configs
from bench.model import detectors, weights
from bench.model.backbone import ViL
from bench.model.weights import DETECTOR_PREFIX, convert_classifier, load_file

PREFIXED = ("--backbone", "quick", "--image-size", "128")


def arch(attention="ViL"):
    (config,) = profile_configs([attention], backbone="quick")
    return config.model.arch


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """Checkpoints of a longformer and of a full classifier for images of 64 pixels."""
    folder = tmp_path_factory.mktemp("classifiers")
    for name in ("longformer", "full"):
        vil = ViL(arch(), attention=name, image_size=64)
        state = {f"module.{key}": value for key, value in vil.state_dict().items()}
        torch.save({"net": state, "epoch": 299}, folder / f"{name}.pth")
    return folder


def words(source, output, *more):
    return ["convert", "--source", str(source), "--output", str(output), *PREFIXED, *more]


def convert(*given):
    return cli.main(words(*given))


@pytest.mark.parametrize("name", ["longformer", "full"])
@pytest.mark.parametrize("attention", ["ViL", "Partial global", "srformer/64", "linformer"])
def test_the_file_holds_the_published_conversion(classifiers, tmp_path, capsys, name, attention):
    source, output = classifiers / f"{name}.pth", tmp_path / "det.pth"
    assert convert(source, output, "--attention", attention) == 0
    (config,) = profile_configs([attention], backbone="quick")
    vil = ViL(config.model.arch, attention=config.model.attention, image_size=128)
    expected = convert_classifier(load_file(source), vil)
    content = torch.load(output, weights_only=True)
    assert set(content) == {"model"}
    assert content["model"].keys() == expected.keys()
    assert all(torch.equal(content["model"][key], expected[key]) for key in expected)
    _paths, *printed = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"{len(expected)} tensors written: ") for line in printed)
    assert max(map(len, printed)) <= 120


def test_a_tensor_of_its_own_goes_before_one_that_serves_its_place_in_any_order():
    source = ViL(arch(), image_size=64, share_weights=False).state_dict()
    vil = ViL(arch(), image_size=128, share_weights=False)
    expected = convert_classifier(source, vil)
    found = convert_classifier(dict(reversed(source.items())), vil)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    place = "layer1.1.attn.proj_global.weight"
    assert torch.equal(found[DETECTOR_PREFIX + place], source[place])


def test_whole_numbers_are_not_resized():
    source = ViL(arch(), image_size=64).state_dict()
    name = "layer1.0.x_pos_embed"
    steps = weights.convert(source | {name: source[name].long()}, ViL(arch(), image_size=128)).steps
    (step,) = (step for step in steps if step.source == name)
    assert step.action == "left out"


def test_a_detector_starts_from_the_file(classifiers, tmp_path):
    output = tmp_path / "det.pth"
    assert convert(classifiers / "longformer.pth", output) == 0
    detector = detectors.build(ViL(arch(), image_size=128), num_classes=3)
    found = detector.load_state_dict(load_file(output), strict=False)
    assert found.unexpected_keys == []
    assert not [name for name in found.missing_keys if name.startswith(DETECTOR_PREFIX)]


def test_the_table_says_what_was_copied_expanded_resized_split_or_left_out(
    classifiers, tmp_path, capsys
):
    assert convert(classifiers / "full.pth", tmp_path / "det.pth", "--attention", "global") == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "layer1.0.cls_token expanded same 1 1x1x32 1x256x32" in lines
    assert "layer1.0.x_pos_embed resized same 1 1x16x16 1x32x16" in lines
    assert any(line.startswith("layer3.*.attn.qkv.weight split layer3.*.attn.{") for line in lines)
    assert any(line.startswith("layer1.… copied same") for line in lines)
    assert re.fullmatch(r"1 of \d+ tensors .* start at random: layer4\.0\.cls_token", lines[-1])

    assert convert(classifiers / "longformer.pth", tmp_path / "b.pth", "--attention", "full") == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "layer3.*.attn.query.weight left out 2 128x128 the backbone has no such tensor" in lines


def test_json_lists_every_tensor(classifiers, tmp_path, capsys):
    output = tmp_path / "det.pth"
    assert convert(classifiers / "full.pth", output, "--format", "json") == 0
    said = json.loads(capsys.readouterr().out)
    written = [step for step in said["steps"] if step["action"] != "left out"]
    assert {DETECTOR_PREFIX + step["target"] for step in written} == set(load_file(output))
    assert said["counts"]["split"] == len([s for s in written if s["action"] == "split"]) > 0
    assert said["arch"] == arch()


def test_relative_positions_are_chosen_for_all_stages(tmp_path, capsys):
    vil = ViL(arch().replace(",a1", ",a0"), image_size=32)
    torch.save(vil.state_dict(), tmp_path / "relative.pth")
    output = tmp_path / "det.pth"
    command = ("--position", "relative", "--format", "json")
    assert convert(tmp_path / "relative.pth", output, *command) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["arch"] == vil.arch
    assert said["untouched"] == []
    index = {step["source"] for step in said["steps"] if step["action"] == "left out"}
    assert all(name.endswith("relative_position_index") for name in index)


def test_overrides_reach_the_backbone(classifiers, tmp_path, capsys):
    narrow = f"model.arch={arch().replace('d128', 'd64')}"
    assert convert(classifiers / "full.pth", tmp_path / "a.pth", narrow, "--format", "json") == 0
    said = json.loads(capsys.readouterr().out)
    shapes = {step["target"]: step["target_shape"] for step in said["steps"]}
    assert shapes["layer3.0.proj.weight"][0] == 64


def test_an_output_is_not_overwritten_unasked(classifiers, tmp_path, refusal):
    output = tmp_path / "det.pth"
    output.write_text("precious")
    assert "--force" in refusal(cli.main, *words(classifiers / "full.pth", output))
    assert output.read_text() == "precious"
    assert convert(classifiers / "full.pth", output, "--force") == 0
    assert load_file(output)


def test_the_source_is_never_overwritten(classifiers, refusal):
    source = classifiers / "full.pth"
    before = source.read_bytes()
    assert "is the source itself" in refusal(cli.main, *words(source, source, "--force"))
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--source", "{tmp}/absent.pth"], "absent.pth: no such file"),
        (["--source", "{tmp}/text.pth"], "text.pth: is damaged, or no checkpoint"),
        (["--backbone", "small"], "no tensor of it fits a stage of --backbone small"),
        (["--attention", "all"], "--attention: 'all' is many rows"),
        (["model.arch=l1,h3,x9_l2_l3"], ">>>x9<<<"),
        (["--output", "{tmp}"], "is a folder"),
        (["--output", "{tmp}/text.pth/det.pth"], "cannot write"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(classifiers, tmp_path, refusal, arguments, said):
    (tmp_path / "text.pth").write_text("hello")
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    command = words(classifiers / "full.pth", tmp_path / "det.pth", *given)
    assert said in refusal(cli.main, *command)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.pth"]
