"""Devices and processes of a run, as its configuration names them: Fabric, in its precision."""

import dataclasses
import datetime
import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision, Precision
from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning_fabric.strategies import DDPStrategy

from bench.config.schema import RunConfig
from bench.errors import InputError
from bench.system import processes as launch
from bench.system.machine import keep_freed_memory

# How long a process that failed waits for the others to fail too.
_TIMEOUT = datetime.timedelta(seconds=10)
_Decision = TypeVar("_Decision")


def check_device(config: RunConfig, world: launch.World | None = None) -> tuple[str, int | None]:
    """Return the accelerator of a run, "cpu" or "cuda", and the index asked for.

    Raises:
        InputError: for a device that is not there, or another number of processes than devices.
    """
    world = world or launch.world()
    name, _, index = config.device.partition(":")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device={config.device!r}: torch {torch.__version__} sees no CUDA device")
    if index and int(index) >= torch.cuda.device_count():
        raise InputError(f"device={config.device!r}: there are {torch.cuda.device_count()} devices")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu" and config.train.precision == "16-mixed":
        raise InputError("train.precision=16-mixed needs a GPU; the CPU takes 32-true, bf16-mixed")
    if config.train.devices != world.size:
        raise InputError(
            f"train.devices={config.train.devices} and {world.size} process(es): start it with"
            " --devices, torchrun or srun, which set it"
        )
    if index and world.size > 1:
        raise InputError(f"device={config.device!r}: several devices are cuda, without a number")
    if name == "cuda" and world.local_size > torch.cuda.device_count():
        raise InputError(
            f"{world.local_size} processes on this machine, which has"
            f" {torch.cuda.device_count()} CUDA devices"
        )
    return name, int(index) if index else None


def make_fabric(config: RunConfig) -> Fabric:
    """Fabric on the run's device or devices, in its precision.

    Raises:
        InputError: for a device that is not there.
    """
    world = launch.world()
    name, index = check_device(config, world)
    if world.size == 1:
        return _single(config, name, index)
    if name == "cpu":
        keep_freed_memory()
    environments: dict[str, Callable[[], ClusterEnvironment]] = {
        "torchrun": TorchElasticEnvironment,
        "slurm": lambda: SLURMEnvironment(auto_requeue=False),
        "spawn": LightningEnvironment,
    }
    fabric = Fabric(
        accelerator=name,
        devices=world.local_size,
        num_nodes=world.size // world.local_size,
        # The backbone's classification head is not part of the detectors' losses. Buffers are the
        # same in all processes without being sent: what is random in them is drawn from the step,
        # and what follows the data is averaged after each step.
        strategy=DDPStrategy(
            find_unused_parameters=True, broadcast_buffers=False, gradient_as_bucket_view=True
        ),
        plugins=[_precision(config, name), environments[world.launcher]()],
    )
    # Importing it sets its level.
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    # Of tables of one row, whose strides mean nothing.
    warnings.filterwarnings("ignore", message="(?s).*Grad strides do not match bucket view strides")
    fabric.launch()
    _timed_group()
    return fabric


def single_fabric(config: RunConfig) -> Fabric:
    """Fabric on one device here, however many the run has; on the CPU without half precision."""
    cpu = config.device == "cpu" or not torch.cuda.is_available()
    precision = config.train.precision
    if cpu and precision == "16-mixed":
        precision = "32-true"
    recipe = dataclasses.replace(config.train, devices=1, accumulate=1, precision=precision)
    config = dataclasses.replace(config, train=recipe)
    name, index = check_device(config, launch.World())
    return _single(config, name, index)


def alone(config: RunConfig, fabric: Fabric) -> Fabric:
    """Fabric on the device of this process alone."""
    device = fabric.device
    return _single(config, device.type, device.index if device.type == "cuda" else None)


def _single(config: RunConfig, accelerator: str, index: int | None) -> Fabric:
    """Fabric on one device, whatever started this process."""
    if accelerator == "cpu":
        keep_freed_memory()
    return Fabric(
        accelerator=accelerator,
        devices=1 if index is None else [index],
        plugins=[_precision(config, accelerator), LightningEnvironment()],
    )


class _MixedPrecision(MixedPrecision):
    """Mixed precision that does not convert inputs: half is too coarse for coordinates of boxes."""

    def convert_input(self, data: Any) -> Any:
        return data


def _precision(config: RunConfig, accelerator: str) -> Precision:
    precision: Any = config.train.precision
    if precision == "32-true":
        return Precision()
    return _MixedPrecision(precision, device=accelerator)


def decide_in_first(config: RunConfig, decide: Callable[[], _Decision]) -> _Decision:
    """Return what the first process of a run decides, in all of them; it is pickled for that.

    Raises:
        InputError: in all of them, where the first process raises it.
    """
    world = launch.world()
    if world.size == 1:
        return decide()
    fabric = make_fabric(config)
    decided: tuple[_Decision | None, str | None] = None, None
    if world.is_first:
        try:
            decided = decide(), None
        except InputError as error:
            decided = None, str(error)
    found, refused = fabric.broadcast(decided)
    if refused is not None:
        close_group()
        raise InputError(refused)
    return cast(_Decision, found)


def close_group() -> None:
    """Leave the group of the run's processes, at a place that all of them reach.

    A process that ends without it may be aborted by a thread that still handles its last message.
    """
    if torch.distributed.is_initialized():
        _timed_group.cache_clear()
        torch.distributed.destroy_process_group()


@functools.cache
def _timed_group() -> Any:
    """A group of all processes in which a process can wait for a limited time."""
    return torch.distributed.new_group(backend="gloo", timeout=_TIMEOUT)


def all_failed(world: launch.World) -> bool:
    """Whether every process of the run failed, as this one did."""
    if world.size == 1 or not torch.distributed.is_initialized():
        return True
    try:
        torch.distributed.monitored_barrier(group=_timed_group(), timeout=_TIMEOUT)
    except RuntimeError:
        return False
    return True


def device_name(device: torch.device | None) -> str:
    """What a person calls a device; "none" where a run did not come so far."""
    if device is None:
        return "none"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
