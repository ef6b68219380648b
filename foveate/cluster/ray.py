"""Workers on the machines of a Ray cluster: one actor per rank, in one placement group. The only file that imports ray.

Ray places, starts and watches the processes; what they compute together goes through torch.distributed. A process that
dies or hangs ends the group with `RankLost`, and every failure ends all ranks, so that none is left waiting.
"""

from __future__ import annotations

import asyncio
import io
import logging
import os
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Self

import ray
import torch
import torch.distributed as dist
from ray import cloudpickle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.job_submission import JobSubmissionClient
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from foveate.cluster.local import LocalWorkers
from foveate.cluster.network import talk_through
from foveate.config_cluster import ClusterSettings
from foveate.errors import ConfigError, RankLost, UserError
from foveate.log import setup_logging
from foveate.resolve import FILE_MODULES

logger = logging.getLogger(__name__)

_BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
_START = 120.0
"""Seconds in which a cluster has to take its first job."""
_GRACE = 60.0
"""Seconds to learn which rank died, when another one reports that its connection broke: Ray counts a machine as gone
when it has been silent for half a minute."""


class _Rank:
    """The actor of one rank."""

    def __init__(self, folder: str) -> None:
        if os.path.isdir(folder):
            os.chdir(folder)  # relative paths of a recipe mean the same everywhere
        setup_logging()

    def meeting(self) -> str:
        """Where the ranks meet: this machine, at a port that is free now."""
        with socket.socket() as free:
            free.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"

    def join(self, meeting: str, rank: int, cluster: ClusterSettings, build: bytes) -> None:
        """Meet the other ranks, and make the worker."""
        talk_through(ray.util.get_node_ip_address())
        patience = timedelta(seconds=cluster.timeout)
        if cluster.kind == "cuda":
            torch.cuda.set_device(0)  # Ray lets a rank see no other
        else:
            torch.set_num_threads(1)
        dist.init_process_group(
            _BACKENDS[cluster.kind], init_method=meeting, rank=rank, world_size=cluster.ranks, timeout=patience
        )
        self._workers = LocalWorkers(pickle.loads(build)())

    def call(self, method: str, packed: bytes, pixels: list[ray.ObjectRef]) -> Any:
        arguments = _Unpickler(packed, pixels).load()
        return self._workers.call(method, [arguments])[0]

    def process(self) -> int:
        return os.getpid()

    def stacks(self) -> str:
        """What every thread of this rank is doing."""
        frames = sys._current_frames().values()
        return "\n".join("".join(traceback.format_stack(frame)[-6:]) for frame in frames)


class RayWorkers:
    """A worker group on a Ray cluster (`foveate.cluster.base.WorkerGroup`), as a context that ends with its actors.

    Raises ConfigError where there is no cluster, or none that is large enough; RankLost where a rank dies or does not
    answer for `cluster.timeout` seconds; and whatever a user can mend as the rank that met it raised it.
    """

    def __init__(self, cluster: ClusterSettings, build: Callable[[], Any], patience: float = 120.0) -> None:
        """patience: seconds in which the cluster must become large enough."""
        self._patience = patience
        self.size, self.row = cluster.ranks, cluster.sequence_parallel
        self._cluster, self._build = cluster, build
        self._pixels: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._actors: list[Any] = []
        self._group: PlacementGroup | None = None
        self._started = False

    def __enter__(self) -> Self:
        try:
            self._connect()
            self._place()
            meeting = self._results([self._actors[0].meeting.remote()])[0]
            build = cloudpickle.dumps(self._build)  # pyright: ignore[reportPrivateImportUsage]
            joined = [actor.join.remote(meeting, rank, self._cluster, build) for rank, actor in enumerate(self._actors)]
            self._results(joined)
            processes = self._results([actor.process.remote() for actor in self._actors])
            logger.info("%d ranks on %d nodes, processes %s", self.size, self._cluster.nodes, processes)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)
        if self._started:
            ray.shutdown()
        self._actors, self._group, self._started = [], None, False

    def call(self, method: str, per_rank_arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run `method` on every rank with its own arguments; results in the order of ranks. Arguments that are the same
        object travel once, and so does each picture, however often it is sent."""
        assert len(per_rank_arguments) == self.size
        packed: dict[int, tuple[Any, list[Any]]] = {}
        for arguments in per_rank_arguments:
            if id(arguments) not in packed:
                content, pixels = _Pickler.pack(arguments, self._pixels)
                packed[id(arguments)] = ray.put(content), pixels
        pairs = zip(self._actors, per_rank_arguments, strict=True)
        return self._results([actor.call.remote(method, *packed[id(arguments)]) for actor, arguments in pairs])

    def _connect(self) -> None:
        """Join the cluster that RAY_ADDRESS names or that runs on this machine; for one node, start one of our own."""
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        address = os.environ.get("RAY_ADDRESS") or ("auto" if self._cluster.nodes > 1 else None)
        options: dict[str, Any] = {"address": address} if address else {
            "address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1", "num_cpus": self.size,
        }  # fmt: skip
        try:
            ray.init(logging_level=logging.ERROR, **options)
        except ConnectionError as error:
            raise ConfigError(
                f"cluster.nodes is {self._cluster.nodes}, but no Ray cluster runs here; start one by `foveate cluster "
                "up`, let the others join by `foveate cluster join ADDRESS`, or set RAY_ADDRESS"
            ) from error
        self._started = True

    def _place(self) -> None:
        """One bundle per node, and an actor in it for each of its ranks."""
        settings, per_node = self._cluster, self._cluster.gpus_per_node
        own = {"CPU": 1.0, **({"GPU": 1.0} if settings.kind == "cuda" else {})}
        bundle = {name: count * per_node for name, count in own.items()}
        strategy = "STRICT_SPREAD" if settings.nodes > 1 else "STRICT_PACK"
        bundles: list[dict[str, float]] = [bundle] * settings.nodes
        self._group = placement_group(bundles, strategy=strategy)
        if not self._group.wait(0):
            logger.info("waiting for %d nodes with %s on each; %s", settings.nodes, bundle, _what_is_there())
        if not self._group.wait(self._patience):
            raise ConfigError(
                f"cluster.nodes={settings.nodes} with {bundle} on each do not fit what is free in the Ray cluster: "
                f"{_what_is_there()}; let more nodes join, or lower cluster.nodes or cluster.gpus_per_node"
            )
        actor: Any = ray.remote(concurrency_groups={"watch": 1})(_Rank)  # pyright: ignore[reportCallIssue]
        for rank in range(self.size):
            place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=rank // per_node)
            options: dict[str, Any] = {"num_cpus": 1, "num_gpus": own.get("GPU", 0), "scheduling_strategy": place}
            self._actors.append(actor.options(**options).remote(os.getcwd()))

    def _results(self, refs: list[Any]) -> list[Any]:
        """The results of all ranks, or the first failure of any."""
        waiting, deadline = list(refs), time.monotonic() + self._cluster.timeout
        while waiting:
            done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                raise RankLost(self._hung([refs.index(ref) for ref in waiting]))
            try:
                ray.get(done)
            except RayActorError as error:
                raise RankLost(f"rank {refs.index(done[0])} died ({_short(error)})") from error
            except RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise error.cause from None
                self._blame_the_dead(refs, waiting)
                raise
        return ray.get(refs)

    def _blame_the_dead(self, refs: list[Any], waiting: list[Any]) -> None:
        """Raise RankLost where a rank failed only because another one is gone."""
        for ref in ray.wait(waiting, num_returns=len(waiting), timeout=_GRACE)[0] if waiting else ():
            try:
                ray.get(ref)
            except RayActorError as error:
                raise RankLost(f"rank {refs.index(ref)} died ({_short(error)})") from error
            except RayError:
                continue

    def _hung(self, silent: list[int]) -> str:
        """What to say of ranks that do not answer; the stacks of all go to the log."""
        stacks = [actor.stacks.options(concurrency_group="watch").remote() for actor in self._actors]
        answered = set(ray.wait(stacks, num_returns=len(stacks), timeout=_GRACE)[0])
        for rank, ref in enumerate(stacks):
            try:
                logger.error("rank %d:\n%s", rank, ray.get(ref) if ref in answered else "(does not answer at all)")
            except RayError as error:
                logger.error("rank %d: %s", rank, _short(error))
        names = ", ".join(map(str, silent))
        return f"rank {names} did not answer for {self._cluster.timeout:g} s (cluster.timeout); the log has the stacks"


def _what_is_there() -> str:
    there = {name: count for name, count in ray.cluster_resources().items() if name in ("CPU", "GPU")}
    return f"{sum(node['Alive'] for node in ray.nodes())} nodes with {there} in all"


def _short(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


# --------------------------------------------------------------------------------------- pictures travel by reference


class _Pickler(cloudpickle.Pickler):
    """Pickles arguments with tensors of pixels, the only ones with four dimensions, left out: these are put into Ray's
    object store once, and fetched from there at most once per machine."""

    def __init__(self, file: io.BytesIO, known: WeakTensorKeyDictionary) -> None:
        super().__init__(file, protocol=5)
        self._known = known
        self.refs: list[Any] = []

    @classmethod
    def pack(cls, arguments: tuple[Any, ...], known: WeakTensorKeyDictionary) -> tuple[bytes, list[Any]]:
        for name in [name for name in sys.modules if name.startswith(FILE_MODULES)]:
            cloudpickle.register_pickle_by_value(sys.modules[name])  # the ranks cannot import it by that name
        file = io.BytesIO()
        pickler = cls(file, known)
        pickler.dump(arguments)
        return file.getvalue(), pickler.refs

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor) or obj.ndim != 4:
            return None
        if obj not in self._known:
            self._known[obj] = ray.put(obj.numpy())
        self.refs.append(self._known[obj])
        return len(self.refs) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, packed: bytes, refs: list[Any]) -> None:
        super().__init__(io.BytesIO(packed))
        self._pixels = [torch.tensor(array) for array in ray.get(refs)]

    def persistent_load(self, pid: Any) -> Tensor:
        return self._pixels[pid]


# --------------------------------------------------------------------------------------------------------------- jobs


def follow_job(head: str, command: str) -> str:
    """Run a command on the cluster whose dashboard is at `head`, copy its log to standard output, and return how it
    ended: SUCCEEDED, FAILED or STOPPED. Ctrl-C stops it. Raises ConfigError where no cluster answers."""
    try:
        client = JobSubmissionClient(head)
        job = _submit(client, command)
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(
            f"no cluster answers at {head} ({_short(error)}); start one by `foveate cluster up`"
        ) from error
    try:
        asyncio.run(_copy_log(client, job))
    except KeyboardInterrupt:
        client.stop_job(job)
        raise
    return str(client.get_job_status(job).value)


def _submit(client: JobSubmissionClient, command: str) -> str:
    """A cluster that has just been started takes jobs only after a while."""
    deadline = time.monotonic() + _START
    while True:
        try:
            return client.submit_job(entrypoint=command)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(1)


async def _copy_log(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        sys.stdout.write(lines)
        sys.stdout.flush()
