import gc
import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from bench.measure.memory import LIVE_TENSORS, LiveTensors, NotMeasuredError, peak
from tests.processes import python

FLOAT = 4


def test_chain_without_gradients():
    x, w = torch.randn(10, 20), torch.randn(20, 30)

    def fn():
        with torch.no_grad():
            return (x @ w).relu().sum()

    result = peak(fn, device="cpu")
    inputs = FLOAT * (10 * 20 + 20 * 30)
    assert result.before == inputs
    # The product and its relu are alive together, and the sum beside the relu is smaller.
    assert result.bytes == inputs + FLOAT * 2 * 10 * 30
    assert result.kind == LIVE_TENSORS
    assert result.device == "cpu"
    assert result.reserved is None


def test_chain_with_backward():
    x, w = torch.randn(10, 20), torch.randn(20, 30, requires_grad=True)

    def fn():
        w.grad = None
        (x @ w).relu().sum().backward()

    fn()
    # The first gradient is alive when the second run starts and freed by it at once.
    result = peak(fn, device="cpu", live=[x, w])
    inputs, gradient, product = FLOAT * 200 + FLOAT * 600, FLOAT * 600, FLOAT * 300
    assert result.before == inputs + gradient
    # The peak is while the gradient of w is made: beside it are the gradient of the product, the
    # loss and its gradient. What relu kept was freed a step before.
    assert result.bytes == inputs + product + gradient + 2 * FLOAT


def test_saved_activations_stay_until_backward():
    layers = nn.Sequential(*(nn.Sigmoid() for _ in range(5)))
    x = torch.randn(1000, requires_grad=True)
    size = FLOAT * 1000

    def inference():
        with torch.no_grad():
            layers(x)

    # Without gradients one result replaces the other; with them each is kept.
    assert peak(inference, device="cpu").bytes == 3 * size
    assert peak(lambda: layers(x), device="cpu").bytes == 6 * size


def test_views_are_counted_once():
    x = torch.randn(64, 64)
    result = peak(lambda: x.T.flatten()[1:].unsqueeze(0), device="cpu", live=[x, x.T, x[0]])
    assert result.before == FLOAT * 64 * 64
    assert result.bytes == 2 * FLOAT * 64 * 64


def test_what_operators_of_functions_do_is_seen():
    q = torch.randn(1, 1, 40, 8)
    for _ in range(2):
        # What was watched runs unwatched, and the other way round.
        result = peak(lambda: flex_attention(q, q, q), device="cpu", live=[q])
        assert result.bytes > result.before + FLOAT * 40 * 40
        flex_attention(q, q, q)


def test_in_place_operators_cost_nothing():
    x = torch.randn(100)
    assert peak(lambda: x.add_(1).mul_(2), device="cpu").bytes == FLOAT * 100


def test_what_is_freed_before_is_not_in_the_peak():
    def fn():
        for _ in range(10):
            torch.zeros(1000)

    assert peak(fn, device="cpu").bytes == FLOAT * 1000


def test_what_a_first_call_keeps_is_there_before():
    kept = {}

    def fn():
        # Alive until its successor is there, as a map that a layer keeps for an explanation.
        kept["map"] = torch.zeros(500)

    result = peak(fn, device="cpu", prepare=fn)
    assert (result.before, result.bytes) == (FLOAT * 500, FLOAT * 1000)


def test_what_one_mode_keeps_is_there_in_the_next():
    kept = {}
    watch = LiveTensors()
    first = peak(lambda: kept.setdefault("table", torch.zeros(500)), device="cpu", watch=watch)
    assert (first.before, first.after) == (0, FLOAT * 500)
    # It neither makes the table nor hands it to an operator.
    second = peak(lambda: torch.zeros(100), device="cpu", watch=watch)
    assert (second.before, second.bytes, second.after) == (FLOAT * 500, FLOAT * 600, FLOAT * 500)


def test_what_a_module_keeps_in_other_attributes_is_there_before():
    layer = nn.Linear(4, 4)
    layer.tables, layer.hidden = {"a": [torch.zeros(500)]}, [nn.Linear(9, 9)]
    layer.hidden[0].again = layer.tables
    result = peak(lambda: torch.zeros(100), device="cpu", live=[layer])
    assert result.before == FLOAT * (20 + 500 + 90)


def test_a_storage_that_is_freed_or_made_anew_counts_so():
    x = torch.zeros(500)

    def fn():
        x.untyped_storage().resize_(0)
        torch.zeros(100)
        x.untyped_storage().resize_(FLOAT * 500)

    result = peak(fn, device="cpu", live=[x])
    assert (result.before, result.bytes, result.after) == (FLOAT * 500,) * 3
    y = torch.zeros(100)
    y.untyped_storage().resize_(0)
    assert peak(lambda: torch.zeros(10), device="cpu", live=[y]).bytes == FLOAT * 10
    assert torch.UntypedStorage.resize_.__qualname__.startswith("StorageBase")


def test_tensors_from_numbers_are_new_and_not_from_before():
    def fn():
        torch.tensor([1.0] * 500)
        torch.tensor([1.0] * 500)

    result = peak(fn, device="cpu")
    assert result.before == 0
    assert result.bytes == FLOAT * 500


def test_a_grown_storage_is_counted_as_grown():
    x = torch.zeros(10)
    assert peak(lambda: x.resize_(1000), device="cpu").bytes == FLOAT * 1000


def test_parameters_buffers_gradients_and_optimizer_state_are_there_before():
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    parameters = sum(p.numel() for p in model.parameters()) * FLOAT
    buffers = 2 * 16 * FLOAT + 8
    steps = 4 * FLOAT
    result = peak(lambda: None, device="cpu", live=[model, optimizer])
    # Parameters, their gradients and two moments each.
    assert result.before == result.bytes == 4 * parameters + buffers + steps


def training_step():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=4), nn.GELU(), nn.Flatten(), nn.Linear(8 * 64, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    images = torch.randn(2, 3, 32, 32)

    def step():
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()

    step()
    return step, model, optimizer, images


def test_the_same_number_each_time():
    step, *live = training_step()
    peaks = {peak(step, device="cpu", live=live) for _ in range(3)}
    assert len(peaks) == 1


def test_agrees_with_the_tracker_of_torch():
    mem_tracker = pytest.importorskip("torch.distributed._tools.mem_tracker")
    step, model, optimizer, images = training_step()
    ours = peak(step, device="cpu", live=[model, optimizer, images])
    tracker = mem_tracker.MemTracker()
    tracker.track_external(model, optimizer, images)
    with tracker:
        step()
    assert ours.bytes == tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def test_storages_know_their_label_and_leave_when_freed():
    x = torch.zeros(10)
    watch = LiveTensors()
    watch.label = "input"
    watch.found_before([x])
    with watch:
        watch.label = "made"
        y = x + 1
        assert {s.label: s.size for s in watch.alive()} == {"input": 40, "made": 40}
        (made,) = watch.storages({"y": y[:3]})
        assert made.label == "made"
        del y
    assert [s.label for s in watch.alive()] == ["input"]
    assert (watch.before, watch.current, watch.peak) == (40, 40, 80)


def test_whole_blocks():
    watch = LiveTensors(block=512)
    with watch:
        kept = torch.zeros(3), torch.zeros(128), torch.zeros(129)
    assert [s.size for s in watch.alive()] == [512, 512, 1024]
    del kept


def test_a_peak_is_told():
    class Watch(LiveTensors):
        seen = ()

        def peaked(self, operator):
            self.seen += (str(operator),)

    x = torch.zeros(10)
    with Watch() as watch:
        y = x + 1
        y.mul_(2)
        y = None
        x.exp()
        x.cos().sum()
    # Neither what works in place nor what is no more than before is a new peak.
    assert watch.seen == ("aten.add.Tensor", "aten.sum.default")


# In a fresh process: peaks in bytes of one call three times, and what the process grew by in it.
FRESH = """
import re
import torch
from bench.measure.memory import peak

def resident():
    # What getrusage says begins with the process that started this one.
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

def layer(x):
    # Held by this frame alone, and free when it returns.
    copies = [x + n for n in range(8)]
    return copies[-1]

def step(x):
    y = layer(x)
    later = [y + n for n in range(12)]

torch.set_num_threads(1)
x = torch.randn(5_000_000)
step(x[:10])
before = resident()
step(x)
grown = resident() - before
peaks = [peak(lambda: step(x), device="cpu", live=[x]) for _ in range(3)]
print(grown, *(found.bytes - found.before for found in peaks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_the_first_peak_of_a_process_is_that_of_all_and_of_the_system():
    grown, first, *others = map(int, python("-c", FRESH).split())
    assert others == [first, first]
    assert first == pytest.approx(grown, rel=0.1)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_sparse_tensor_is_what_it_is_made_of(layout):
    dense = torch.eye(100, 50)
    result = peak(lambda: dense.to_sparse(layout=layout), device="cpu", live=[dense])
    kept = dense.to_sparse(layout=layout)
    indices = {torch.sparse_coo: 2 * 50, torch.sparse_csr: 101 + 2 * 50}[layout] * 8
    assert result.bytes >= result.before + indices + 50 * FLOAT
    assert peak(lambda: None, device="cpu", live=[kept]).before == indices + 50 * FLOAT


def test_the_collector_is_left_as_it_was():
    def fail():
        raise RuntimeError("stopped")

    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="stopped"):
        peak(fail, device="cpu")
    assert gc.isenabled()


def test_other_devices():
    with pytest.raises(ValueError, match="meta; allowed: cpu, cuda"):
        peak(lambda: None, device="meta")


@pytest.mark.gpu
def test_allocator_peak():
    x = torch.zeros(1 << 20, device="cuda")
    result = peak(lambda: x + 1, device="cuda")
    assert result.bytes == result.before + x.nbytes
    assert result.reserved >= result.bytes


def test_what_runs_unseen_alone_is_said_and_other_errors_are_their_own():
    x = torch.randn(4, requires_grad=True)

    def step():
        torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)).sum().backward()

    with pytest.raises(NotMeasuredError, match="where its tensors are watched"):
        peak(step, device="cpu")
    with pytest.raises(ZeroDivisionError):
        peak(lambda: 1 / 0, device="cpu")


@pytest.mark.parametrize("layer", ["attention", "padded", "by head", "encoder", "fallback"])
def test_scores_within_the_fast_path_are_in_the_peak(layer):
    batch, heads, count, channels = 2, 4, 257, 32
    x = torch.randn(batch, count, channels)
    mask = torch.zeros(batch, count, dtype=torch.bool)
    mask[:, 200:] = True
    attention = nn.MultiheadAttention(channels, heads, batch_first=True).eval()
    module = nn.TransformerEncoderLayer(channels, heads, 8, batch_first=True).eval()
    split = x.unflatten(-1, (heads, -1)).mT.contiguous().mT.transpose(1, 2)
    calls = {
        "attention": lambda: attention(x, x, x, need_weights=False),
        "padded": lambda: attention(x, x, x, need_weights=False, key_padding_mask=mask),
        "by head": lambda: attention(x, x, x, average_attn_weights=False),
        "encoder": lambda: module(x),
        # Values of another width.
        "fallback": lambda: F.scaled_dot_product_attention(split, split, split[..., :3]),
    }

    def fn():
        with torch.no_grad():
            calls[layer]()

    result = peak(fn, device="cpu", live=(attention, module, x, split, mask))
    with torch.profiler.profile(profile_memory=True) as profiled:
        fn()
    # All that the allocator gives and takes back, in turn.
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda one: one.start_ns())
    given = [event.nbytes() for event in events if event.name() == "[memory]"]
    most = max(itertools.accumulate(given))
    assert most > FLOAT * batch * heads * count**2
    assert result.bytes - result.before == pytest.approx(most, rel=0.05)
