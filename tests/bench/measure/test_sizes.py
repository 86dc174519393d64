import json

import pytest
import torch

from bench import cli
from bench.errors import InputError
from bench.measure import flops, sizes
from bench.model import detectors
from bench.model.backbone import ViL

TINY = (
    "l1,h1,d12,n1,s1,g1,p4,f4,a1_l2,h2,d24,n1,s1,g1,p2,f4,a1"
    "_l3,h2,d24,n2,s1,g1,p2,f4,a1_l4,h2,d24,n1,s0,g0,p2,f4,a1"
)


def detector(attention="longformer", method="mask_rcnn", image_size=1333):
    with torch.device("meta"):
        vil = ViL(TINY, attention=attention, image_size=image_size)
        return detectors.build(vil, method=method, fpn_channels=16)


def test_the_stored_sizes_are_those_of_val2017():
    stored = sizes.image_sizes("val2017")
    assert sum(stored.values()) == 5000
    assert len(stored) == 603
    # Most images are 640 wide and 480 high, or the other way round; none is larger than 640.
    assert max(stored, key=stored.get) == (480, 640)
    assert max(map(max, stored)) == 640
    # Few sizes are left to count.
    assert len({sizes.padded(sizes.RESIZE.of(*size), 32) for size in stored}) == 55


def test_padded():
    assert sizes.padded((800, 1067), 32) == (800, 1088)
    assert sizes.padded((417, 1333), 32) == (448, 1344)


def test_count_over_is_the_mean_of_the_counts_of_all_images(monkeypatch):
    images = {(480, 640): 3, (640, 480): 1, (100, 640): 2, (481, 640): 1}
    monkeypatch.setattr(sizes, "image_sizes", lambda _: images)
    module = detector()
    report = sizes.count_over(module, "made up", proposals=20)
    each = [
        flops.count_flops(module, image_size=sizes.RESIZE.of(*size), proposals=20).total
        for size, number in images.items()
        for _ in range(number)
    ]
    assert report.images == 7
    # 480x640 and 481x640 pad to one size.
    assert len(report.by_size) == 3
    assert report.mean == pytest.approx(sum(each) / 7)
    assert report.deviation == pytest.approx(torch.tensor(each).double().std(correction=0).item())
    assert (report.minimum, report.maximum) == (min(each), max(each))
    assert report.one_size == flops.count_flops(module, proposals=20).total
    assert sum(number for _, _, number in report.histogram(5)) == 7
    assert report.histogram(5)[0][0] == min(each)
    assert report.histogram(5)[-1][1] == max(each)
    resized = (sizes.RESIZE.of(*size) for size in each_size(images))
    real = sum(height * width for height, width in resized)
    whole = sum(size.images * size.image_size[0] * size.image_size[1] for size in report.by_size)
    assert report.padded_pixels == pytest.approx(1 - real / whole)


def each_size(images):
    return [size for size, number in images.items() for _ in range(number)]


def test_an_image_size_for_all_costs_the_same_for_all():
    with torch.device("meta"):
        vil = ViL(TINY, attention="linformer", image_size=(96, 128))
        module = detectors.build(vil, fpn_channels=16)
    report = sizes.count_over(module)
    assert report.fixed_size == (96, 128)
    assert report.deviation == report.padded_pixels == 0
    assert report.mean == flops.count_flops(module, image_size=(96, 128)).total


def test_an_unknown_data_set():
    with pytest.raises(InputError, match=r"data set for --sizes 'val2014'.* allowed: val2017"):
        sizes.image_sizes("val2014")


def test_command(capsys, tmp_path, monkeypatch):
    images = {(480, 640): 2000, (640, 480): 3000}
    monkeypatch.setattr(sizes, "image_sizes", lambda _: images)
    arguments = ["--attention", "swin", "--backbone", "quick", "--sizes", "val2017"]
    assert cli.main(["profile", *arguments, "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    for words in ("5,000 image sizes of val2017", "multiply-adds", "####"):
        assert words in out
    assert {path.name for path in tmp_path.glob("*.csv")} == {"sizes.csv"}
    assert cli.main(["profile", *arguments, "--format", "json"]) == 0
    (line,) = json.loads(capsys.readouterr().out)
    assert sum(size["images"] for size in line["by_size"]) == line["images"] == 5000
    assert line["unit"] == "multiply-adds"
