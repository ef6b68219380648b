"""The commands of a cluster: `foveate cluster up`, `foveate cluster join`, `foveate submit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate import api
from foveate.cli.options import Overrides, Recipe
from foveate.config.runs import StageName
from foveate.errors import ConfigError
from foveate.log import print_result

cluster = typer.Typer(help="Machines that train together.", no_args_is_help=True)

Host = Annotated[str, typer.Option(help="This machine's address that the others reach; without it, only itself.")]
Count = Annotated[int | None, typer.Option(min=0, help="How many the cluster may use here; by default all.")]
Block = Annotated[bool, typer.Option(help="Stay, and end the node when this command ends.")]


@cluster.command("up")
def up_command(
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port that the others join at.")] = 6379,
    dashboard: Annotated[int, typer.Option(help="Port of the dashboard and of `foveate submit`, on loopback.")] = 8265,
    cpus: Count = None,
    gpus: Count = None,
    block: Block = False,
) -> None:
    """Start the head of a cluster on this machine. Those alone get in that have its token (~/.ray/auth_token)."""
    from foveate.cluster.commands import LOOPBACK, own_address, start_node

    host = own_address(host)
    join = f"on each other machine: foveate cluster join {host}:{port} --host ITS-ADDRESS"
    print_result(
        f"{join if host != LOOPBACK else 'this machine alone; with --host, others can join'}; stop by: ray stop"
    )
    start_node(head=None, host=host, port=port, cpus=cpus, gpus=gpus, dashboard=dashboard, block=block)


@cluster.command("join")
def join_command(
    address: Annotated[str, typer.Argument(help="HOST:PORT of the head.")],
    host: Host = "127.0.0.1",
    cpus: Count = None,
    gpus: Count = None,
    block: Block = False,
) -> None:
    """Let this machine join a cluster."""
    from foveate.cluster.commands import start_node

    start_node(head=address, host=host, port=0, cpus=cpus, gpus=gpus, dashboard=0, block=block)


Head = Annotated[str, typer.Option(help="Where the dashboard of the cluster is.")]
AT_HEAD = "http://127.0.0.1:8265"


@cluster.command("stop")
def stop_command(
    job: Annotated[str, typer.Argument(help="The name that `foveate submit` gave.")], head: Head = AT_HEAD
) -> None:
    """Stop a run on a cluster: it ends its step, saves and leaves. Submitted again, it resumes."""
    from foveate.cluster.base import REMOTE
    from foveate.cluster.commands import use_token
    from foveate.registry import resolve

    use_token()
    resolve(REMOTE, "stop", "cluster")(head, job)


def submit(
    recipe: Recipe,
    overrides: Overrides = None,
    head: Head = AT_HEAD,
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for all processes; once for each.")] = None,
    pip: Annotated[list[str] | None, typer.Option(help="A package that every node installs; once for each.")] = None,
    upload: Annotated[
        Path | None, typer.Option(help="A folder that every node gets a copy of and runs in, with the recipe in it.")
    ] = None,
    detach: Annotated[bool, typer.Option(help="Return at once; `foveate cluster stop JOB` ends the run.")] = False,
    stage: Annotated[StageName, typer.Option(help="The command that is run.")] = "rl",
) -> None:
    """Run `foveate rl` (or --stage) on a cluster and follow its log.

    Ctrl-C stops the run; the same command continues it."""
    from foveate.cluster.base import REMOTE
    from foveate.cluster.commands import job_command, runtime_env, use_token
    from foveate.registry import resolve

    api.from_recipe(recipe, *(overrides or ()), stage=stage)  # what is wrong with it is said here and now
    use_token()
    prepared = runtime_env(env or [], pip or [], upload)
    command = job_command(stage, recipe, overrides or [], uploaded=upload is not None, installs=bool(pip))
    status = resolve(REMOTE, "job", "cluster")(head, command, prepared, detach)
    if status not in ("SUCCEEDED", "SUBMITTED"):
        raise ConfigError(f"the run ended as {status}; its log is above")
