"""Names of the Hugging Face Hub as folders and files on this machine: models, and the parquet files of datasets; and
trained models on their way there.

A name is `owner/name`. Of a model `@revision` may follow, of a dataset `:config` and `@split`
(`hiyouga/geometry3k@train`). Downloads go to huggingface_hub's cache, resume where they were interrupted, and follow
its variables (`HF_HUB_OFFLINE`, `HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT`). What is here already is not downloaded again.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from foveate.errors import DataError, one_line
from foveate.registry import suggestion

logger = logging.getLogger(__name__)

MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken", "README.md", "LICENSE*")
"""Files of a model that are downloaded: no code, and no weights in formats that can run any."""
_NAME = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?::(?P<config>[\w.-]+))?(?:@(?P<at>[\w./-]+))?")
_CONVERTED = "refs/convert/parquet"
"""The branch on which the hub keeps datasets of other formats as parquet."""


def is_hub_name(name: str | Path) -> bool:
    """Whether something has the form of a name on the hub, and names nothing here: there is no folder `owner`."""
    found = _NAME.fullmatch(name) if isinstance(name, str) else None
    return found is not None and not Path(found["repo"].partition("/")[0]).exists()


def model_folder(name: str) -> Path:
    """The folder of a model of the hub, downloaded where it is not here yet. Raises DataError for a model that does not
    exist, is not accessible, or cannot be reached."""
    from huggingface_hub import snapshot_download

    repo, config, revision = _parts(name)
    if config:
        raise DataError(f"{name}: a model has no {config!r}; write owner/name, or owner/name@revision")
    with _explained("model", name, repo):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[*MODEL_FILES]))


def dataset_folder(name: str) -> Path:
    """The folder of all parquet files of a dataset of the hub, downloaded where they are not here yet. Raises DataError
    as `model_folder`."""
    from huggingface_hub import snapshot_download

    repo, config, split = _parts(name)
    if config or split:
        raise DataError(f"{name}: all of the dataset is read; write {repo}")
    with _explained("dataset", name, repo):
        return Path(snapshot_download(repo, repo_type="dataset", allow_patterns=["*.parquet"]))


def dataset_files(name: str) -> list[Path]:
    """The parquet files of a split of a dataset of the hub, downloaded where they are not here yet. Raises DataError as
    `model_folder`, and for a split or configuration that does not exist or has to be chosen."""
    from huggingface_hub import constants, snapshot_download

    repo, config, split = _parts(name)
    with _explained("dataset", name, repo):
        if constants.HF_HUB_OFFLINE:
            here = _cached(name, repo)
            return [here[file] for file in _choose(name, [*here], config, split)]
        revision, files = _listed(repo)
        chosen = _choose(name, files, config, split)
        folder = Path(snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=[*chosen]))
        return [folder / file for file in chosen]


def prepare_upload(name: str) -> None:
    """Make the private model repository `owner/name` where there is none, which also shows that it may be written.
    Raises DataError for a name of another form, without access, and where the hub cannot be reached."""
    from huggingface_hub import HfApi

    if re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name) is None:
        raise DataError(f"{name}: must be owner/name, the model repository to upload to")
    with _explained("model", name, name, writing=True):
        HfApi().create_repo(name, private=True, exist_ok=True)


def upload_model(folder: Path, name: str) -> str:
    """Upload a model folder to the repository `owner/name`, made by `prepare_upload`, and return its address. Raises
    DataError as that."""
    from huggingface_hub import HfApi

    prepare_upload(name)
    with _explained("model", name, name, writing=True):
        done = HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Trained with foveate")
    return done.commit_url.partition("/commit/")[0]


def _parts(name: str) -> tuple[str, str | None, str | None]:
    found = _NAME.fullmatch(name)
    assert found is not None
    return found["repo"], found["config"], found["at"]


# ------------------------------------------------------------------------------------------------------------ datasets


def _listed(repo: str) -> tuple[str | None, list[str]]:
    """The parquet files of a dataset, its own or those that the hub has made, and the revision that has them."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    hub = HfApi()
    for revision in (None, _CONVERTED):
        try:
            files = hub.list_repo_files(repo, repo_type="dataset", revision=revision)
        except RevisionNotFoundError:
            break
        if own := [file for file in files if file.endswith(".parquet")]:
            return revision, own
    raise DataError(f"{repo}: the dataset has no parquet files; download it and name its files")


def _cached(name: str, repo: str) -> dict[str, Path]:
    """The parquet files of a dataset that the cache holds, of its newest revision."""
    from huggingface_hub import scan_cache_dir

    repos = [one for one in scan_cache_dir().repos if (one.repo_id, one.repo_type) == (repo, "dataset")]
    revisions = sorted((one for own in repos for one in own.revisions), key=lambda one: one.last_modified)
    for revision in reversed(revisions):
        paths = {
            file.file_path.relative_to(revision.snapshot_path).as_posix(): file.file_path for file in revision.files
        }
        if found := {path: place for path, place in sorted(paths.items()) if path.endswith(".parquet")}:
            return found
    raise DataError(
        f"{name}: no such file here, and the cache has no parquet file of the dataset {repo}, while HF_HUB_OFFLINE is "
        "set"
    )


def _choose(name: str, files: Sequence[str], config: str | None, split: str | None) -> list[str]:
    """The files of a configuration and a split, by the hub's conventions: `config/split-00000-of-00002.parquet`,
    `config/split/0000.parquet`, `data/split-...`."""
    placed = {file: _place(file) for file in files}
    configs = sorted({place[0] for place in placed.values()})
    if config is None and len(configs) > 1:
        raise DataError(f"{name}: has the configurations {', '.join(configs)}; choose one: owner/name:config@split")
    chosen = config if config is not None else configs[0]
    if chosen not in configs:
        raise DataError(
            f"{name}: no configuration {chosen!r}{suggestion(chosen, configs, then='there')} are {', '.join(configs)}"
        )
    splits = sorted({place[1] for place in placed.values() if place[0] == chosen})
    if split is None and len(splits) > 1:
        raise DataError(f"{name}: has the splits {', '.join(splits)}; choose one: {name}@{splits[-1]}")
    wanted = split if split is not None else splits[0]
    if wanted not in splits:
        raise DataError(
            f"{name}: no split {wanted!r}{suggestion(wanted, splits, then='there')} are {', '.join(splits)}"
        )
    return sorted(file for file, place in placed.items() if place == (chosen, wanted))


def _place(file: str) -> tuple[str, str]:
    """The configuration and the split of a file."""
    path = PurePosixPath(file)
    named = re.match(r"(?P<split>[\w.]+?)(?:-\d+-of-\d+|-[0-9a-f]{16})*$", path.stem)
    folders = [part for part in path.parts[:-1] if part != "data"]
    if path.stem.isdigit() and folders:  # config/split/0000.parquet
        return (folders[-2] if len(folders) > 1 else "default", folders[-1].removeprefix("partial-"))
    return (folders[-1] if folders else "default", named["split"] if named else path.stem)


# ------------------------------------------------------------------------------------------------------------ messages


@contextmanager
def _explained(kind: str, name: str, repo: str, *, writing: bool = False) -> Iterator[None]:
    """Errors of huggingface_hub as DataError with what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        raise DataError(
            f"{name}: access to this {kind} has to be granted on its page; then log in with `hf auth login`, or set "
            "HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise DataError(f"{name}: the {kind} {repo} has no such revision") from None
    except errors.RepositoryNotFoundError:
        raise DataError(
            f"{name}: no such folder here, and no {kind} {repo} on the hub"
            f"{suggestion(repo, _alike(kind, repo), then='a private one needs HF_TOKEN')}"
        ) from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        raise DataError(
            f"{name}: no such folder here, and the {kind} {repo} is not in the cache, or not whole, and cannot be "
            "downloaded (no connection to the hub, or HF_HUB_OFFLINE is set)"
        ) from None
    except Exception as error:
        if writing and isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
            raise DataError(
                f"{name}: may not be written to; log in with `hf auth login`, or set HF_TOKEN to one that may write "
                "there"
            ) from None
        of_transport = type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests")
        if not of_transport and not isinstance(error, errors.HfHubHTTPError | OSError):
            raise
        what = "uploaded" if writing else "downloaded"
        raise DataError(f"{name}: the {kind} cannot be {what}: {one_line(error)}") from None


def _alike(kind: str, repo: str) -> list[str]:
    """Names on the hub that are spelled like one that is not there."""
    from huggingface_hub import HfApi

    hub = HfApi()
    search = hub.list_models if kind == "model" else hub.list_datasets
    owner, _, name = repo.partition("/")
    try:
        found = [*search(author=owner, limit=100), *search(search=name[:5], limit=20)]
        return [one.id for one in found]
    except Exception:  # a suggestion is no reason for another error
        return []
