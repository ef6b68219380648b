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
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from typing import Any, Concatenate, Generic, Self

import ray
import torch
import torch.distributed as dist
from ray import cloudpickle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.job_submission import JobSubmissionClient
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from foveate.cluster.engine_process import EngineCall, EngineLostError, EngineProcess
from foveate.cluster.local import P, R, W
from foveate.cluster.network import set_network_interface
from foveate.cluster.references import References, restored
from foveate.cluster.weights import Packet
from foveate.cluster.worker_process import WorkerProcess
from foveate.config.cluster import ClusterSettings
from foveate.errors import ConfigError, RankLost, UserError
from foveate.registry import FILE_MODULES
from foveate.rollout.server.process import free_port

logger = logging.getLogger(__name__)

_START = 120.0
"""Seconds in which a cluster has to take its first job."""
_GRACE = 60.0
"""Seconds to learn which rank died, when another one reports that its connection broke: Ray counts a machine as gone
when it has been silent for half a minute."""


class _Actor(WorkerProcess):
    def call(self, packed: bytes, refs: list[ray.ObjectRef]) -> Any:
        method, arguments, keywords = _Unpickler(packed, refs).load()
        result = method(self.worker, *arguments, **keywords)
        return ray.put(result) if isinstance(result, Packet) else result  # whoever takes it fetches it from here


class _Rank(_Actor):
    """The actor of one rank."""

    def meeting(self) -> str:
        """Where the ranks meet: this machine, at a port that is free now."""
        return f"tcp://{ray.util.get_node_ip_address()}:{free_port()}"

    def join(self, meeting: str, rank: int, cluster: ClusterSettings, build: bytes) -> None:
        """Meet the other ranks, and make the worker."""
        set_network_interface(ray.util.get_node_ip_address())
        patience = timedelta(seconds=cluster.timeout)
        if cluster.kind == "cuda":
            torch.cuda.set_device(0)  # Ray lets a process see no other
        backend = "cpu:gloo,cuda:nccl" if cluster.kind == "cuda" else "gloo"  # weights may rest in host memory
        dist.init_process_group(backend, meeting, patience, cluster.ranks, rank)
        self.make(build)


class _Engine(_Actor):
    """The actor of one engine. Its methods run beside each other."""

    def make(self, build: bytes) -> None:
        super().make(build)
        logger.info("an engine on %s, process %d", ray.util.get_node_ip_address(), os.getpid())


class RayWorkers(Generic[W]):
    """A worker group on a Ray cluster (`foveate.cluster.base.WorkerGroup`), as a context that ends with its actors.

    Raises ConfigError where there is no cluster, or none that is large enough; RankLost where a rank dies or does not
    answer for `cluster.timeout` seconds; and whatever a user can fix as the rank that met it raised it.
    """

    def __init__(self, cluster: ClusterSettings, build: Callable[[], W], patience: float = 120.0) -> None:
        """patience: seconds in which the cluster must become large enough."""
        self._patience = patience
        self.size, self.row = cluster.ranks, cluster.sequence_parallel
        self._cluster, self._build = cluster, build
        self._link = _Link(cluster)
        self._actors: list[Any] = []

    def __enter__(self) -> Self:
        try:
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
        self._actors = []
        self._link.close()

    def call(self, method: Callable[Concatenate[W, ...], R], per_rank_arguments: Sequence[tuple[Any, ...]]) -> list[R]:
        """As `WorkerGroup.call`. Arguments that are one object travel once, and so does each image."""
        assert len(per_rank_arguments) == self.size
        packed: dict[int, tuple[Any, list[Any]]] = {}
        for arguments in per_rank_arguments:
            if id(arguments) not in packed:
                content, refs = _Pickler.pack((method, arguments, {}))
                packed[id(arguments)] = ray.put(content), refs
        pairs = zip(self._actors, per_rank_arguments, strict=True)
        return self._results([actor.call.remote(*packed[id(arguments)]) for actor, arguments in pairs])

    def _place(self) -> None:
        """One bundle per node, and an actor in it for each of its ranks."""
        settings, per_node = self._cluster, self._cluster.gpus_per_node
        bundle = settings.needs(per_node, per_node)
        asked = f"cluster.nodes={settings.nodes} with {bundle} on each"
        strategy = "STRICT_SPREAD" if settings.nodes > 1 else "STRICT_PACK"
        group = self._link.place([bundle] * settings.nodes, strategy, asked, self._patience)
        own = dict.fromkeys(bundle, 1.0)
        self._actors = [_actor(_Rank, group, rank // per_node, own) for rank in range(self.size)]

    def _results(self, refs: list[Any]) -> list[Any]:
        """The results of all ranks, or the first failure of any."""
        waiting, deadline = list(refs), time.monotonic() + self._cluster.timeout
        while waiting:
            done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                raise RankLost(self._hung([refs.index(ref) for ref in waiting]))
            try:
                ray.get(done)
            except RayTaskError as error:
                if isinstance(error.cause, UserError):
                    raise error.cause from None
                self._blame_the_dead(refs, waiting)
                raise
            except RayError as error:
                raise RankLost(f"rank {refs.index(done[0])} died ({_short(error)})") from error
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
        """The message about ranks that do not answer; the stacks of all go to the log."""
        for rank, stack in enumerate(_stacks(self._actors)):
            logger.error("rank %d:\n%s", rank, stack)
        names = ", ".join(map(str, silent))
        return f"rank {names} did not answer for {self._cluster.timeout:g} s (cluster.timeout); the log has the stacks"


class RayEngineProcesses:
    """Engines on a Ray cluster (`foveate.cluster.engine_process.EngineProcesses`), an actor each."""

    def __init__(self, cluster: ClusterSettings, patience: float = 120.0) -> None:
        """Raises ConfigError where the cluster has no room for them within `patience` seconds."""
        self.size, self._cluster = cluster.engines, cluster
        self._actors: dict[int, Any] = {}
        self._link = _Link(cluster)
        self._needs = cluster.needs(1, cluster.engine_tensor_parallel)
        try:
            asked = f"cluster.engines={self.size} with {self._needs} each"
            self._group = self._link.place([self._needs] * self.size, "SPREAD", asked, patience)
        except BaseException:
            self.close()
            raise

    def start(self, number: int, build: Callable[[], EngineProcess]) -> Future[Any]:
        if number in self._actors:
            ray.kill(self._actors[number])
        self._actors[number] = actor = _actor(_Engine, self._group, number, self._needs, beside=4)
        return _future(actor.make.remote(_Pickler.pack(build)[0]))

    def ask(self, number: int, method: EngineCall[P, R], *arguments: P.args, **keywords: P.kwargs) -> Future[R]:
        return _future(self._actors[number].call.remote(*_Pickler.pack((method, arguments, keywords))))

    def share(self, packet: Any) -> Any:
        return packet if isinstance(packet, ray.ObjectRef) else ray.put(packet)

    def end(self, number: int) -> None:
        logger.error("engine %d:\n%s", number, _stacks([self._actors[number]])[0])
        ray.kill(self._actors[number])

    def close(self) -> None:
        wait(
            [self.ask(number, EngineProcess.close) for number in self._actors], timeout=10.0
        )  # in which servers end by themselves
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors = {}
        self._link.close()


def _future(ref: Any) -> Future[Any]:
    """The result of a call, with the errors of `EngineProcesses.ask`."""
    own: Future[Any] = Future()

    def copy(done: Future[Any]) -> None:
        error = done.exception()
        if isinstance(error, RayTaskError) and not isinstance(error.cause, RayError):
            own.set_exception(error.cause if isinstance(error.cause, UserError) else error)
        elif error is not None:
            own.set_exception(EngineLostError(_short(error)))
        else:
            own.set_result(done.result())

    ref.future().add_done_callback(copy)
    return own


class _Link:
    """To the cluster that RAY_ADDRESS names or that runs on this machine; for one node, to one of our own. Places that
    were taken through it are given back when it is closed."""

    def __init__(self, cluster: ClusterSettings) -> None:
        self._group: PlacementGroup | None = None
        self._is_ours = not ray.is_initialized()
        if not self._is_ours:
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        address = os.environ.get("RAY_ADDRESS") or ("auto" if cluster.nodes > 1 else None)
        options: dict[str, Any] = {"address": address} if address else {
            "address": "local", "include_dashboard": False, "_node_ip_address": "127.0.0.1",
            "num_cpus": cluster.ranks + cluster.engines,
        }  # fmt: skip
        try:
            ray.init(logging_level=logging.ERROR, **options)
        except ConnectionError as error:
            start = "start one by `foveate cluster up`, join it by `foveate cluster join ADDRESS`, or set RAY_ADDRESS"
            raise ConfigError(f"cluster.nodes is {cluster.nodes}, but no Ray cluster runs here; {start}") from error
        except Exception as error:  # it gives a node half a minute, which a busy machine exceeds
            ray.shutdown()
            raise RankLost(f"Ray did not start here ({_short(error)})") from error

    def place(self, bundles: list[dict[str, float]], strategy: str, asked: str, patience: float) -> PlacementGroup:
        self._group = group = placement_group(bundles, strategy=strategy)
        if not group.wait(2):
            logger.info("waiting for %s; %s", asked, _what_is_there())
        if not group.wait(patience):
            free = f"what is free in the Ray cluster: {_what_is_there()}"
            raise ConfigError(f"{asked} do not fit {free}; let more nodes join, or ask for less")
        return group

    def close(self) -> None:
        if self._group is not None:
            remove_placement_group(self._group)
        if self._is_ours:
            _REFERENCES.clear()
            ray.shutdown()
        self._group, self._is_ours = None, False


def _actor(kind: type, group: PlacementGroup, bundle: int, needs: dict[str, float], beside: int = 1) -> Any:
    """An actor in a bundle, of which `beside` methods may run at a time, besides those that watch it."""
    place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
    options: dict[str, Any] = {"num_cpus": 1, "num_gpus": needs.get("GPU", 0), "scheduling_strategy": place}
    options |= {"concurrency_groups": {"watch": 1}, "max_concurrency": beside}
    make: Any = ray.remote(**options)(kind)
    return make.remote(os.getcwd(), "cuda" if "GPU" in needs else "cpu")


def _stacks(actors: Sequence[Any]) -> list[str]:
    """The stacks of all threads of each actor."""
    asked = [actor.stacks.options(concurrency_group="watch").remote() for actor in actors]
    answered = set(ray.wait(asked, num_returns=len(asked), timeout=_GRACE)[0])
    found = []
    for ref in asked:
        try:
            found.append(ray.get(ref) if ref in answered else "(does not answer at all)")
        except RayError as error:
            found.append(_short(error))
    return found


def _what_is_there() -> str:
    there = {name: count for name, count in ray.cluster_resources().items() if name in ("CPU", "GPU")}
    return f"{sum(node['Alive'] for node in ray.nodes())} nodes with {there} in all"


def _short(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:200]


# ------------------------------------------------------------------------------ groups and images travel by reference


_PACKING = threading.Lock()


class _Pickler(cloudpickle.Pickler):
    """Pickles a call without groups and pixels (`References`): these are put into Ray's object store once, and fetched
    from there at most once per machine. So is what is in the store already."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.refs: list[Any] = []

    @classmethod
    def pack(cls, content: Any) -> tuple[bytes, list[Any]]:
        for name in [name for name in sys.modules if name.startswith(FILE_MODULES)]:
            cloudpickle.register_pickle_by_value(sys.modules[name])  # the ranks cannot import it by that name
        with _PACKING:
            return _packed_alone(content)

    def persistent_id(self, obj: Any) -> int | None:
        obj = _REFERENCES.of(obj)
        if not isinstance(obj, ray.ObjectRef):
            return None
        self.refs.append(obj)
        return len(self.refs) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, packed: bytes, refs: Sequence[Any]) -> None:
        super().__init__(io.BytesIO(packed))
        self._found = ray.get([*refs])

    def persistent_load(self, pid: Any) -> Any:
        return restored(self._found[pid], lambda content, references: _Unpickler(content, references).load())


def _packed_alone(content: Any) -> tuple[bytes, list[Any]]:
    """As `_Pickler.pack`, within it."""
    pickler = _Pickler(file := io.BytesIO())
    pickler.dump(content)
    return file.getvalue(), pickler.refs


_REFERENCES = References(ray.put, _packed_alone)


# --------------------------------------------------------------------------------------------------------------- jobs


def follow_job(head: str, command: str, runtime_env: dict[str, Any], detach: bool) -> str:
    """Run a command on the cluster whose dashboard is at `head`, copy its log to standard output unless asked to
    `detach`, and return how it ended. Ctrl-C stops it. Raises ConfigError where no cluster answers."""
    client, job = _submit(head, command, runtime_env)
    logger.info("job %s", job)
    if detach:
        return "SUBMITTED"
    try:
        asyncio.run(_copy_log(client, job))
    except KeyboardInterrupt:
        client.stop_job(job)
        asyncio.run(_copy_log(client, job))
        raise
    return str(client.get_job_status(job).value)


def stop_job(head: str, job: str) -> None:
    """Stop a job as Ctrl-C does. Raises ConfigError where no cluster answers, or none of its jobs is called so."""
    try:
        JobSubmissionClient(head).stop_job(job)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"job {job} at {head}: {_short(error)}") from error


def _submit(head: str, command: str, runtime_env: dict[str, Any]) -> tuple[JobSubmissionClient, str]:
    """A cluster that has just been started takes jobs only after a while."""
    deadline = time.monotonic() + _START
    while True:
        try:
            client = JobSubmissionClient(head)
            return client, client.submit_job(entrypoint=command, runtime_env=runtime_env)
        except (OSError, RuntimeError) as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                start = "start one by `foveate cluster up`"
                raise ConfigError(f"no cluster answers at {head} ({_short(error)}); {start}") from error
            time.sleep(1)


async def _copy_log(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        sys.stdout.write(lines)
        sys.stdout.flush()
