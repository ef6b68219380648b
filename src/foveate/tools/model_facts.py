"""Facts about a model folder, for `foveate doctor FOLDER`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foveate.encoding.chat import opened_by, some_prompt
from foveate.encoding.family import PER_MILLE
from foveate.models.attention.fla_rule import described_rule
from foveate.models.attention.gated_delta_net import ForestGatedDeltaNet
from foveate.models.checkpoint.names import CHECKPOINT_FORMATS
from foveate.models.checkpoint.safetensors_io import read_headers, weight_files
from foveate.models.checkpoint.small_files import links_out
from foveate.models.policy import Policy, parameters_by_part


def model_facts(policy: Policy) -> dict[str, str]:
    """The facts that were recognised in a model folder, each as text."""
    family, tokenizer = policy.family, policy.tokenizer
    config: Any = policy.model.config
    counts = {part: sum(p.numel() for p in own.values()) for part, own in parameters_by_part(policy).items()}
    words = {word: tokenizer.convert_tokens_to_ids(word) for word in family.reserved}
    stored = read_headers(weight_files(policy.folder))
    untrained = sorted(name for name in stored if name.startswith(family.untrained))
    is_recurrent = any(isinstance(layer, ForestGatedDeltaNet) for layer in policy.model.modules())
    relative = family.box_frame(700, 700, family.budget) == PER_MILLE
    return {
        "folder": str(policy.folder),
        "format": CHECKPOINT_FORMATS[policy.format],
        "family": f"{family.name}, {config.get_text_config().model_type} language model",
        **({} if family.proof is None else {"proof": f"{family.proof:.1e} nats from transformers at most"}),
        **({"gated delta rule": described_rule()} if is_recurrent else {}),
        "parameters": f"{sum(counts.values()):,}",
        **{f"  {name}": f"{count:,}" for name, count in counts.items()},
        "image": family.image_summary(),
        "boxes": "thousandths of the image's sides" if relative else "pixels of the resized image",
        "chat template": "its own" if tokenizer.chat_template else f"{family.template_name} (it has none)",
        **template_facts(policy),
        "image tokens": ", ".join(f"{word} = {number}" for word, number in words.items()) or "none",
        "stop tokens": ", ".join(f"{tokenizer.convert_ids_to_tokens(i)} = {i}" for i in family.stop_ids),
        "dtype": ", ".join(sorted({tensor.dtype for tensor in stored.values()})),
        **({"not trained": f"{len(untrained)} tensors, {untrained[0]}, ...: copied when saved"} if untrained else {}),
        "missing": ", ".join(_missing(policy)) or "nothing",
        **_links(policy.folder),
    }


def template_facts(policy: Policy) -> dict[str, str]:
    """How the chat template treats a conversation without a system message, and how it begins an answer."""
    family, tokenizer = policy.family, policy.tokenizer
    turn, default = some_prompt(tokenizer, family.template), family.default_system
    before, _, after = turn.partition("?")
    opened = opened_by(turn)
    official = "none known beside the template's" if default is None else f"{default!r}, with data.system=default"
    return {
        "  before a question": f"{before!r}, with data.system=none",
        "  its family's system message": official,
        "  before an answer": repr(after),
        "  opened for the answer": f"{opened!r}, which rewards count and SFT does not repeat" if opened else "nothing",
        "  text, not tokens, in rows": ", ".join(family.all_control_words(tokenizer)) or "nothing",
    }


def _links(folder: Path) -> dict[str, str]:
    """Weights that are links to elsewhere. Any other file that is one was refused."""
    links = [f"{path.name} is a link to {target}" for path, target in links_out(folder)]
    return {"weights elsewhere": f"{', '.join(links)}; loaded, but neither converted nor exported"} if links else {}


def _missing(policy: Policy) -> list[str]:
    """Files that checkpoints of the kind have, and this one lacks."""
    missing = [name for name in ("generation_config.json",) if not (policy.folder / name).is_file()]
    if not policy.tokenizer.chat_template:
        missing.append("chat template")
    if policy.format == "chat" and not list(policy.folder.glob("modeling_*.py")):
        missing.append("modeling_*.py, which other programs run and foveate does not")
    return missing
