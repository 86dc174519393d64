import collections
import json

import pytest
import torch

from bench import cli
from bench.config.suites import profile_configs
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


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1067)),
        ((640, 480), (1067, 800)),
        ((427, 640), (800, 1199)),
        ((800, 800), (800, 800)),
        # The longest edge binds.
        ((200, 640), (417, 1333)),
        ((3000, 1000), (1333, 444)),
    ],
)
def test_resize(size, expected):
    assert sizes.resized(size) == expected


@pytest.mark.detectron2
def test_resize_is_detectron2s():
    from detectron2.data.transforms import ResizeShortestEdge

    for height, width in sizes.image_sizes("val2017"):
        expected = ResizeShortestEdge.get_output_shape(height, width, 800, 1333)
        assert sizes.resized((height, width)) == expected


def test_padded():
    assert sizes.padded((800, 1067), 32) == (800, 1088)
    assert sizes.padded((417, 1333), 32) == (448, 1344)


@pytest.mark.parametrize("attention", ["longformer", "srformer", "performer", "full"])
@pytest.mark.parametrize("method", detectors.METHODS)
def test_the_quick_count_is_the_count(attention, method):
    module = detector(attention, method)
    count = sizes.counter(module, proposals=20)
    for size in ((800, 1344), (416, 1344), (1120, 800), (128, 160)):
        assert count(size) == flops.count(module, image_size=size, proposals=20).total


def test_a_detector_that_is_not_made_of_areas_is_counted_size_by_size(monkeypatch):
    module = detector()
    true = flops.count

    def crooked(*args, image_size, **options):
        report = true(*args, image_size=image_size, **options)
        object.__setattr__(report, "total", report.total + image_size[0] ** 2 * image_size[1])
        return report

    monkeypatch.setattr(flops, "count", crooked)
    size = (800, 1088)
    expected = crooked(module, image_size=size).total
    assert sizes.counter(module)(size) == expected


def test_count_over_is_the_mean_of_the_counts_of_all_images(monkeypatch):
    images = {(480, 640): 3, (640, 480): 1, (100, 640): 2, (481, 640): 1}
    monkeypatch.setattr(sizes, "image_sizes", lambda _: images)
    module = detector()
    report = sizes.count_over(module, "made up", proposals=20)
    each = [
        flops.count(module, image_size=sizes.resized(size), proposals=20).total
        for size, number in images.items()
        for _ in range(number)
    ]
    assert report.images == 7
    # 480x640 and 481x640 pad to one size.
    assert len(report.by_size) == 3
    assert report.mean == pytest.approx(sum(each) / 7)
    assert report.deviation == pytest.approx(torch.tensor(each).double().std(correction=0).item())
    assert (report.minimum, report.maximum) == (min(each), max(each))
    assert report.one_size == flops.count(module, proposals=20).total
    assert sum(number for _, _, number in report.histogram(5)) == 7
    assert report.histogram(5)[0][0] == min(each)
    assert report.histogram(5)[-1][1] == max(each)
    real = sum(
        n * a * b
        for (a, b), n in collections.Counter(map(sizes.resized, each_size(images))).items()
    )
    whole = sum(size.images * size.image_size[0] * size.image_size[1] for size in report.by_size)
    assert report.padded_pixels == pytest.approx(1 - real / whole)


def each_size(images):
    return [size for size, number in images.items() for _ in range(number)]


def brute_force(grid, window, reach):
    """Padded queries and padded products of one grid, pair by pair."""
    rows, columns = (-(-side // window) * window for side in grid)
    places = [(r, c) for r in range(rows) for c in range(columns)]
    real = [r < grid[0] and c < grid[1] for r, c in places]
    good = every = 0
    for (r, c), is_token in zip(places, real, strict=True):
        for dr in range(-reach, reach + 1):
            for dc in range(-reach, reach + 1):
                for a in range(window):
                    for b in range(window):
                        key = (r // window + dr) * window + a, (c // window + dc) * window + b
                        inside = 0 <= key[0] < grid[0] and 0 <= key[1] < grid[1]
                        every += 1
                        good += is_token and inside
    return 1 - sum(real) / len(real), 1 - good / every


@pytest.mark.parametrize(("attention", "reach"), [("longformer", 1), ("swin", 0)])
def test_window_padding_pair_by_pair(attention, reach):
    vil = detector(attention).vil
    stages = sizes.window_padding(vil, {(224, 160): 1})
    # Stage 4 has full attention, and so no windows.
    assert [stage.stage for stage in stages] == ["stage1", "stage2", "stage3"]
    grids = [(56, 40), (28, 20), (14, 10)]
    for stage, grid in zip(stages, grids, strict=True):
        queries, products = brute_force(grid, 4, reach)
        assert stage.attention == attention
        assert stage.window == 4
        assert stage.padded_queries == pytest.approx(queries)
        assert stage.padded_products == pytest.approx(products)


def test_products_of_windows_are_those_that_longformer_declares():
    vil = detector().vil
    place = next(vil.attention_places())
    grid, window = (13, 9), place.module.window
    computed = 1
    for side in grid:
        computed *= sizes._products(side, window=window, reach=place.module.reach)[1]
    tokens = 1 + 13 * 9
    dim = place.module.dim
    queries = 16 * 12
    attention = 2 * dim * (computed + queries * 1 + tokens)
    assert place.module.multiply_adds(grid) == attention + 6 * tokens * dim**2


def test_an_image_size_for_all_costs_the_same_for_all():
    with torch.device("meta"):
        vil = ViL(TINY, attention="linformer", image_size=(96, 128))
        module = detectors.build(vil, fpn_channels=16)
    report = sizes.count_over(module)
    assert report.fixed_size == (96, 128)
    assert report.deviation == report.padded_pixels == 0
    assert report.mean == flops.count(module, image_size=(96, 128)).total


def test_padding_of_the_published_backbone_grows_with_depth():
    (config,) = profile_configs(["ViL"], backbone="small")
    report = sizes.count_row(config)
    assert report.images == 5000
    assert len(report.by_size) == 55
    shares = [stage.padded_products for stage in report.windows]
    assert len(shares) == 4
    assert shares == sorted(shares)
    assert report.minimum < report.mean < report.maximum <= report.one_size


def test_an_unknown_data_set():
    with pytest.raises(InputError, match=r"data set for --sizes 'val2014'.* allowed: val2017"):
        sizes.image_sizes("val2014")


def test_command(capsys, tmp_path):
    arguments = ["--attention", "swin", "--backbone", "quick", "--sizes", "val2017"]
    assert cli.main(["audit", *arguments, "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    for words in ("5,000 image sizes of val2017", "multiply-adds", "stage4", "####"):
        assert words in out
    assert (tmp_path / "sizes.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.glob("*.csv")} == {"sizes.csv", "windows.csv"}
    assert cli.main(["audit", *arguments, "--format", "json"]) == 0
    (line,) = json.loads(capsys.readouterr().out)
    assert sum(size["images"] for size in line["by_size"]) == line["images"] == 5000
    assert line["unit"] == "multiply-adds"
