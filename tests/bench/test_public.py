"""The names of `bench` itself."""

import pytest

import bench
from tests.processes import python

ARCH = "l1,h1,d8,n1,s1,g1,p4,f3,a1_l2,h2,d16,n1,s1,g1,p2,f3,a1_l3,h2,d16,n1,s1,g1,p2,f3,a1"


def test_importing_it_imports_no_torch():
    code = "import sys, bench; bench.RunConfig, bench.Record; sys.exit('torch' in sys.modules)"
    python("-c", code)


def test_every_public_name_is_there_and_no_other():
    assert all(callable(getattr(bench, name)) for name in bench.__all__)
    assert set(bench.__all__) == bench._PLACES.keys()
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        bench.nothing  # noqa: B018
    with pytest.raises(ImportError):
        exec("from bench import nothing")


def test_a_backbone_a_detector_and_its_cost():
    vil = bench.ViL(ARCH + "_l4,h2,d16,n1,s1,g0,p2,f3,a1", attention="performer", image_size=64)
    bench.load_published(vil, {k: v + 1 for k, v in vil.state_dict().items()})
    assert set(bench.convert_classifier(vil.state_dict(), vil)) > {"backbone.bottom_up.norm.bias"}
    detector = bench.build_detector(vil, method="retinanet", num_classes=3, fpn_channels=8)
    assert detector.num_classes == 3
    report = bench.count_flops(detector, image_size=(64, 64))
    assert report.total > bench.count_flops(vil, image_size=(64, 64)).total > 0


def test_run_is_a_function_and_a_package(tmp_path):
    code = f"""
import pathlib, bench
config = bench.RunConfig(row="r", data={{"path": "missing"}})
try:
    bench.run(config, output=pathlib.Path({str(tmp_path)!r}))
except ValueError as error:
    print(error)
import bench.run.runner as again
from bench import run
assert run is bench.run and again.run.__module__ == "bench.run.runner"
"""
    assert "missing" in python("-c", code)
    (path,) = (tmp_path / "records").iterdir()
    assert path.name.startswith("r-")


def test_configurations_can_be_written_by_hand():
    config = bench.RunConfig(train={"steps": 3}, data={"min_sizes": [64]})
    assert (config.train.steps, config.data.min_sizes) == (3, (64,))
