"""`foveate vlmevalkit`: its configuration, our rows as its TSV, its predictions as our answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foveate.cli.options import Columns, ImageRoot, Sources, columns_of
from foveate.errors import ConfigError

if TYPE_CHECKING:
    from foveate.evaluate.generate import RowsRequest

vlmevalkit = typer.Typer(help="To and from VLMEvalKit.", no_args_is_help=True)
OutFile = Annotated[Path, typer.Option("--out", help="File to write.")]


@vlmevalkit.command()
def config(
    out: OutFile,
    model: Annotated[Path | None, typer.Option(help="Checkpoint in GitHub format.")] = None,
    endpoint: Annotated[str | None, typer.Option(help="Address of a server, with /v1.")] = None,
    served_model: Annotated[str | None, typer.Option(help="Name of the model at the endpoint.")] = None,
    name: Annotated[str | None, typer.Option(help="What VLMEvalKit calls the model.")] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="A dataset of VLMEvalKit, NAME or NAME=CLASS; several times.")
    ] = None,
    tsv: Annotated[Path | None, typer.Option(help="A file of `foveate vlmevalkit tsv`.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer of the served model.")] = 1024,
) -> None:
    """Write the file for VLMEvalKit's --config: a checkpoint, with and without thinking, or a served model."""
    from foveate.evaluate.client import endpoints_of
    from foveate.log import print_result
    from foveate.tools.vlmevalkit import checkpoint_models, endpoint_models, write_config

    if (model is None) == (endpoint is None):
        raise ConfigError("give either --model or --endpoint")
    if not dataset and tsv is None:
        raise ConfigError("give --dataset, --tsv or both: what VLMEvalKit asks")
    if model is not None:
        models = checkpoint_models(model.resolve(), name or model.resolve().name)
    else:
        if served_model is None or endpoint is None:
            raise ConfigError("--endpoint needs --served-model")
        models = endpoint_models(endpoints_of([endpoint])[0], served_model, name or served_model, max_tokens)
    write_config(out, models, dataset or (), tsv)
    folder = f"LMUData={tsv.parent.resolve()} " if tsv is not None else ""
    flags = f"{folder}PRED_FORMAT=tsv USE_COT=1 SPLIT_THINK=True"
    print_result(f"{', '.join(models)}: {out}\n{flags} python -m vlmeval.run --config {out} --work-dir outputs")
    print_result("In a clone of VLMEvalKit it is run.py in place of -m vlmeval.run.")


@vlmevalkit.command()
def tsv(sources: Sources, out: OutFile, image_root: ImageRoot = None, columns: Columns = None) -> None:
    """Turn rows into a TSV; put it into $LMUData (by default ~/LMUData)."""
    from foveate.log import print_result
    from foveate.tools.vlmevalkit import write_tsv

    print_result(f"{out}: {write_tsv(out, _source(sources, image_root, columns))} rows")


@vlmevalkit.command()
def answers(
    predictions: Annotated[Path, typer.Argument(help="What VLMEvalKit predicted, a .tsv file.")],
    sources: Sources,
    out: Annotated[Path, typer.Option(help="Folder to write, for `foveate eval --generated`.")],
    image_root: ImageRoot = None,
    columns: Columns = None,
) -> None:
    """Turn VLMEvalKit's predictions into our answers."""
    from foveate.log import print_result
    from foveate.tools.vlmevalkit import import_predictions

    print_result(f"{out}: {import_predictions(predictions, _source(sources, image_root, columns), out)} rows")


def _source(sources: list[Path], image_root: Path | None, columns: list[str] | None) -> RowsRequest:
    from foveate.evaluate.generate import RowsRequest

    mapping = dict(columns_of(columns) or {})
    return RowsRequest(tuple(map(str, sources)), None, str(image_root) if image_root else None, mapping)
