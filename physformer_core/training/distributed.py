"""Several processes as one run: who is who, what they tell each other, and models copied (DDP) or divided (FSDP2).

``torchrun`` starts the processes and starts them again. What one of them cannot do, none does: a user's error on one
rank ends all of them, and is told once. Control messages go over gloo whatever the device, so that a step never waits
for an accelerator because of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import time
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils import _pytree

from physformer_core.errors import ConfigError, DeviceError, PhysFormerError
from physformer_core.hardware import resolve_device
from physformer_core.model.attention import TextKeyValue
from physformer_core.model.transformer import EncodedPrompt, PhysFormerTransformer2DModel

TIMEOUT = timedelta(minutes=15)
"""How long a rank waits for the others, e.g. while the first one writes a checkpoint."""

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_FAULT_KEY = "fault"
_POLL_SECONDS = 0.02


class PeerFailed(PhysFormerError):
    """Another rank failed and has said why: this one has nothing to add."""


class PeerLost(PhysFormerError):
    """Another rank ended without a word: killed, or its machine is gone."""


def launched() -> bool:
    """Whether this process was started as one of several (by ``torchrun``, or with the same variables)."""
    return all(name in os.environ for name in _VARIABLES)


def restarts() -> int:
    """How often ``torchrun --max-restarts`` has started the processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of its run; alone if nothing is given.

    Args:
        rank: Its number, from 0.
        world_size: How many there are.
        local_rank, local_world_size: The same on this machine.
        store: What all of them can read and write, whatever state their connections are in.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    store: dist.Store | None = None

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.world_size == 1

    def device(self, name: str) -> torch.device:
        """The device called ``name`` for this rank: each takes the accelerator of its number on its machine.

        Raises:
            DeviceError: If it does not exist here.
            ConfigError: If several ranks would share one.
        """
        if self.alone:
            return resolve_device(name)
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        device = resolve_device(name)
        if device.type == "cpu":
            return device
        if device.type != "cuda":
            raise ConfigError(f"several processes cannot train on {device.type}", hint="--device cpu, or one process")
        if device.index is not None and self.local_world_size > 1:
            raise ConfigError(
                f"--device {name} is one device, but {self.local_world_size} processes run here",
                hint="--device cuda gives each process its own",
            )
        index = device.index if device.index is not None else self.local_rank
        if index >= torch.cuda.device_count():
            raise DeviceError(
                f"{self.local_world_size} processes run here, but there are {torch.cuda.device_count()} GPUs",
                hint=f"torchrun --nproc-per-node {torch.cuda.device_count()}",
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        return device

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a CPU tensor over the ranks; all must call it."""
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; all must ask."""
        return bool(self.sum(torch.tensor(int(flag))).item()) if not self.alone else flag

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What one rank fails at, all fail at; all must enter.

        Raises:
            PhysFormerError: The failing rank's own; `PeerFailed` on the others.
        """
        fault: PhysFormerError | None = None
        try:
            yield
        except PhysFormerError as error:
            if self.alone:
                raise
            fault = error
        if self.alone:
            return
        lowest = torch.tensor(self.rank if fault is not None else self.world_size)
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        if fault is not None and int(lowest) == self.rank:
            raise fault
        if int(lowest) < self.world_size:
            raise PeerFailed(f"rank {int(lowest)} failed")

    def share_json(self, value: Any) -> Any:
        """The first rank's value on every rank; plain JSON values alone."""
        if self.alone:
            return value
        content = torch.tensor(list(json.dumps(value).encode()) if self.is_main else [], dtype=torch.uint8)
        size = torch.tensor(content.numel())
        dist.broadcast(size, 0)
        content = content if self.is_main else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(content, 0)
        return json.loads(bytes(content.tolist()))

    def share_tensors(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The first rank's CPU tensors on every rank, one at a time: no rank holds them all."""
        if self.alone:
            yield from tensors.items()
            return
        layout = {name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()}
        for name, (dtype, shape) in self.share_json(layout).items():
            tensor = tensors[name].contiguous() if self.is_main else torch.empty(shape, dtype=getattr(torch, dtype))
            dist.broadcast(tensor, 0)
            yield name, tensor

    def _note_fault(self) -> bool:
        """Notes in the store that a rank failed, and returns whether it was the first to."""
        if self.store is None:
            return True
        try:
            return self.store.add(_FAULT_KEY, 1) == 1
        except RuntimeError:  # the store went with the process that kept it
            return True


@contextlib.contextmanager
def joined(timeout: timedelta = TIMEOUT) -> Iterator[Ranks]:
    """This process with the others that ``torchrun`` started, connected; alone if it did not.

    Args:
        timeout: How long to wait for others, to begin with and in every exchange.

    Raises:
        PeerLost: If another rank ended without saying why.
        PeerFailed: If it did say why.
        ConfigError: If the variables of the launch make no sense.
    """
    if not launched():
        yield Ranks()
        return
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    except ValueError as error:
        raise ConfigError(f"RANK and WORLD_SIZE must be numbers ({error})", hint="start with torchrun") from None
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        kept, rank, world_size = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
        store = dist.PrefixStore(_agree_on_attempt(kept, rank, world_size, timeout), kept)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except RuntimeError as error:
        raise PeerLost(
            f"rank {rank} cannot reach the other processes of the run: {str(error).splitlines()[0][-160:]}",
            hint="each machine must reach the others' ports; MASTER_ADDR names the first one",
        ) from error
    ranks = Ranks(rank=rank, world_size=world_size, local_rank=local[0], local_world_size=local[1], store=store)
    try:
        yield ranks
    except PeerFailed:
        raise
    except PhysFormerError as error:
        # A fault of the user's is often every rank's: one of them is enough to tell it.
        if ranks._note_fault():
            raise
        raise PeerFailed("another rank failed") from error
    except RuntimeError as error:
        first = ranks._note_fault()
        if not _is_lost_connection(error):
            raise
        if not first:
            raise PeerFailed("another rank failed") from error
        raise PeerLost(
            f"rank {rank} lost another process of the run: {str(error).splitlines()[0][-160:]}",
            hint="torchrun names the one that ended first; --resume auto goes on from the last checkpoint",
        ) from error
    except BaseException:
        ranks._note_fault()
        raise
    dist.destroy_process_group()


def _agree_on_attempt(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name for this start of the processes, the same on all ranks and never used before.

    torchrun keeps one store for all its restarts, and in it the addresses of processes that are dead. Counting restarts
    would not do: each machine counts its own. So every rank says a word of its own, and the first one answers it.

    Raises:
        RuntimeError: Not all ranks came within the time.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    own = secrets.token_hex(8)

    def read(key: str) -> str:
        return store.get(key).decode() if store.check([key]) else ""

    missing = set(range(1, world_size)) if rank == 0 else {rank}
    store.set(f"physformer/hello/{rank}", own)
    while True:
        for other in list(missing):
            if rank == 0:
                # A word may be that of a dead process; then it is answered in vain, and the next one is answered too.
                store.set(f"physformer/answer/{other}", f"{read(f'physformer/hello/{other}')} {own}")
                if read(f"physformer/heard/{other}") == own:
                    missing.remove(other)
            else:
                word, _, attempt = read(f"physformer/answer/{rank}").partition(" ")
                if word == own:
                    store.set(f"physformer/heard/{rank}", attempt)
                    return f"physformer/{attempt}"
        if not missing:
            return f"physformer/{own}"
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {sorted(missing)} did not come within {timeout}")
        time.sleep(_POLL_SECONDS)


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether a collective failed because of another rank. gloo says so only in words."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection" in str(error)


def resolve_parallel(name: str, ranks: Ranks) -> str:
    """``none``, ``ddp`` or ``fsdp`` for the choice ``name``; ``auto`` is ``ddp`` where there are several processes.

    Raises:
        ConfigError: If there is nothing to be parallel with.
    """
    if name == "auto":
        return "none" if ranks.alone else "ddp"
    if ranks.alone and not launched():
        raise ConfigError(
            f"--parallel {name} needs several processes",
            hint=f"torchrun --nproc-per-node 2 $(which physformer) train --parallel {name} ...",
        )
    return name


def shard(model: PhysFormerTransformer2DModel, device: torch.device, ranks: Ranks) -> None:
    """Divides weights, gradients and so optimizer state over the ranks (FSDP2), block by block.

    A block's attention is a unit of its own: the text's keys and values come from it before the block runs.
    """
    _register_outputs()
    # Attention and the network return views, which nothing here changes in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (ranks.world_size,))
    for text_block in model.text_blocks:
        fully_shard(text_block, mesh=mesh)
    for network in model.networks():
        for block, attention in zip(network.field_blocks(), network.attentions(), strict=True):
            fully_shard(attention, mesh=mesh)
            register_fsdp_forward_method(attention, "encode_text")
            fully_shard(block, mesh=mesh)
    # The root too gives its whole weights back after its forward: validation reads and swaps them between batches.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(model, "encode_prompt")


def _register_outputs() -> None:
    """FSDP2 finds the tensors in what a module takes and returns through pytree, which must know our classes."""
    for kind in (TextKeyValue, EncodedPrompt):
        if kind not in _pytree.SUPPORTED_NODES:
            _pytree.register_dataclass(kind)


def whole(tensor: Tensor) -> Tensor:
    """A tensor, put together from the parts that the ranks hold; all must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has, as ``like`` is divided and on its device."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    # Nothing is sent: every rank cuts its part out of its own copy.
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def copy_from_first(model: nn.Module, ranks: Ranks) -> None:
    """Gives every rank the first one's weights; before `shard`."""
    if ranks.alone:
        return
    for parameter in model.parameters():
        content = parameter.detach().cpu().contiguous()
        dist.broadcast(content, 0)
        parameter.copy_(content)
