"""Tiny checkpoints of every combination of vision tower and language model, in the GitHub format.

Configurations, names and shapes are those of the official model (OpenGVLab/InternVL, `internvl_chat_gpt_oss`), and so
are the log-probs that its own code gave on the weights made here, float32 without flash attention. None of it comes
from the code under test.
"""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from foveate.encoding.chat import CORRECTED_TEMPLATE
from foveate.models.tiny import tiny_tokenizer

OFFICIAL = json.loads(
    gzip.decompress((Path(__file__).parent.parent / "data/official_internvl_chat.json.gz").read_bytes())
)
CASES = OFFICIAL["cases"]
"""By `tower-language`: config, shapes of the weights, token_ids (-1 where image features stand), and the log-probs of
every 37th token after each token."""
STRIDE = 37
PYTHON_FILES = ("configuration_internvl_chat.py", "modeling_internvl_chat.py", "conversation.py")


def weight(name, shape):
    """The weights that the official log-probs belong to."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    *_, module, leaf = name.split(".")
    if "norm" in module or name.startswith("mlp1.0"):
        values = 1 + 0.2 * values if leaf == "weight" else 0.1 * values
    elif leaf in ("ls1", "ls2"):
        values = 0.5 + 0.1 * values
    elif "embed" in name:
        values = 0.7 * values
    elif leaf.endswith("bias"):
        values = 0.2 * values
    elif leaf != "sinks":
        values = values * 1.5 / np.sqrt(shape[-1] if len(shape) > 1 else 1)
    return torch.from_numpy(values.astype(np.float32))


def weights(case):
    return {name: weight(name, shape) for name, shape in CASES[case]["shapes"].items()}


def official_pixels():
    """The two tiles that the official model saw."""
    return torch.from_numpy(np.random.default_rng(7).standard_normal((2, 3, 56, 56)).astype(np.float32))


def write_chat_folder(folder, case, tensors=None):
    """A GitHub-format checkpoint with everything that released ones carry; its Python files must never be run."""
    folder.mkdir()
    save_file(weights(case) if tensors is None else tensors, folder / "model.safetensors", {"format": "pt"})
    tokenizer = tiny_tokenizer(640)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for key in ("start_image_token", "end_image_token", "context_image_token"):
        del settings[key]
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "config.json", CASES[case]["config"])
    write_json(folder / "generation_config.json", {"eos_token_id": tokenizer.eos_token_id, "max_new_tokens": 100})
    write_json(folder / "preprocessor_config.json", {"crop_size": 56, "image_mean": [0.485, 0.456, 0.406], "size": 56})
    write_json(folder / "eval_notes.json", {"kept": True})
    (folder / "chat_template.jinja").write_text(CORRECTED_TEMPLATE)
    (folder / "README.md").write_text("# A model\n")
    for name in PYTHON_FILES:
        (folder / name).write_text("raise AssertionError('code of a checkpoint was run')\n")
    return folder


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2))


def read_json(path):
    return json.loads(path.read_text())
