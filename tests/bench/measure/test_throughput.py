"""Batches are doubled as long as that gains and fits; what is found is the best of them."""

from typing import Any

import pytest

from bench.config.suites import profile_configs
from bench.measure import throughput
from bench.measure.worker import WorkerError


class Machine:
    """Answers as a worker does; a call takes a second, and what its images take together."""

    def __init__(self, each: float = 0.0, breaks_at: int = 10**6) -> None:
        self.each, self.breaks_at, self.batch = each, breaks_at, 0

    def ask(self, question: str, *arguments: Any) -> Any:
        if question == "build":
            self.batch = arguments[0]["profile"]["batch_size"]
        if question == "latency":
            if self.batch >= self.breaks_at:
                raise WorkerError("no memory", "out_of_memory")
            seconds = 1.0 + self.each * self.batch
            samples = [seconds * (1 + 0.01 * i) for i in range(21)]
            timing = throughput.percentiles(samples) | {"samples": samples}
            return {"inference": timing, "notes": ["inference: loaded machine"]}
        return {"not_available": "made up"}

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("machine", "most", "best", "ended"),
    [
        (Machine(), 8, 8, "batch 16 is predicted not to fit"),
        (Machine(each=10.0), 10**6, 2, "batch 4 gained less than 3%"),
        (Machine(breaks_at=4), 10**6, 2, "batch 4 was not measured: no memory"),
    ],
)
def test_the_best_batch_that_fits(
    machine: Machine, most: int, best: int, ended: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "Worker", lambda **_: machine)
    monkeypatch.setattr(throughput, "_need", lambda config, _: config.profile.batch_size)
    (config,) = profile_configs(["ViL"], backbone="quick", image_size=(64, 96))
    found = throughput.measure(
        config, "inference", fits=lambda need: need is not None and need <= most
    )
    assert found["ended"].startswith(ended)
    assert found["best"] >= best
    measured = [one["batch_size"] for one in found["batches"]]
    assert found["notes"] == [f"batch {one}, inference: loaded machine" for one in measured]
    first = found["batches"][0]
    assert first["batch_size"] == 1
    assert [first[name] / first["q1"] for name in ("median", "q3", "p90", "p95")] == pytest.approx(
        [1.10 / 1.05, 1.15 / 1.05, 1.18 / 1.05, 1.19 / 1.05]
    )
