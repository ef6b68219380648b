"""Whether the forest kernels compute a language model as transformers does: shown on a small stand-in of it.

The stand-in has the model's configuration with few and narrow layers, one of each kind, and random weights under which
scores are large. What would show in long rows alone is made short: sliding windows, chunks of attention, lengths from
which rotary positions change. A random forest runs through it, and each path of the forest by itself through
transformers' own code.
"""

from __future__ import annotations

import copy
import json
import random
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from foveate.errors import DataError, one_line
from foveate.models.attention.fla_rule import binds_kernels
from foveate.models.attention.gated_delta_net import replace_layers
from foveate.models.attention.kernels import KERNELS
from foveate.models.attention.runs import path_positions
from foveate.models.checkpoint.formats import grows_with_length
from foveate.models.checkpoint.small_files import quiet_transformers
from foveate.records import Forest

MOST_NATS = 1e-4
"""Nats by which a log-prob of the stand-in may differ, in float32."""
_VOCABULARY, _SHORT, _LAYERS = 97, 7, 6
_WINDOWS = ("window", "window_size", "chunk_size")
_LENGTHS = ("max_position_embeddings", "original_max_position_embeddings")
_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")


def forest_difference(config: Any) -> float:
    """The largest difference, in nats, between log-probs of a stand-in of a causal language model of that configuration
    in a forest and in plain rows. Raises DataError, without a place, where it is above `MOST_NATS`, and where the model
    is built otherwise than the forest kernels need."""
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if model.base_model_prefix != "model":
        raise DataError(f"{config.model_type} cannot be trained here: its modules are not called model and lm_head")
    found = _difference(json.dumps(config.to_dict(), sort_keys=True, default=str))
    if isinstance(found, str):
        raise DataError(f"{config.model_type} cannot be trained here: {found}")
    return found


@lru_cache(maxsize=64)
def _difference(text: str) -> float | str:
    """By the text of a configuration: the difference, or why there is none."""
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]), torch.inference_mode():
            torch.manual_seed(0)
            forest, stand_in = _random_forest(random.Random(0)), _stand_in(json.loads(text))
            if stand_in.lm_head.bias is not None:
                return "its head has a bias, which the log-probs in chunks do not know"
            ids_T = torch.randint(1, _VOCABULARY, (forest.tokens,))
            paths = _paths(forest)
            wanted = _alone(stand_in, ids_T, paths)
            stand_in.set_attn_implementation(KERNELS["auto"])
            calls = _Calls()
            got = _packed(replace_layers(stand_in), ids_T, forest, cache=calls)
            if not torch.equal(_packed(stand_in.train(), ids_T, forest), got):
                return "it computes otherwise while it is trained; set dropout and noise in config.json to 0"
    except Exception as error:  # models of any kind, each with refusals of its own
        return f"its stand-in fails ({type(error).__name__}: {one_line(error)[:200]})"
    # tokens of several paths are compared in each: rotary positions may depend on how long a row is
    found = (got[torch.cat(paths)] - wanted).abs().max().item()
    if not found <= MOST_NATS:
        return (
            f"log-probs in a forest differ from transformers' by up to {found:.2g} nats ({MOST_NATS:g} may be). Known "
            "are causal attention, sliding windows and sinks, and a head without scale or cap"
        )
    if sorted(calls.layers) != [*range(stand_in.config.num_hidden_layers)]:
        return "its layers do not have one set of keys and values each, which the native engine keeps"
    return found


class _Calls:
    """A `KeyValueCache` that lets the kernels compute, and counts: the number of the layer of each call."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def attend(self, layer: int, *_: Any) -> None:
        self.layers.append(layer)

    def recur(self, layer: int, *_: Any) -> None:
        self.layers.append(layer)


def _packed(model: Any, ids_T: Tensor, forest: Forest, **more: Any) -> Tensor:
    """Log-probs (T, V) behind each token of the forest, as training computes them."""
    out = model.model(
        inputs_embeds=model.get_input_embeddings()(ids_T)[None],
        position_ids=path_positions(forest)[None],
        forest=forest,
        use_cache=False,
        **more,
    )
    return torch.log_softmax(nn.functional.linear(out.last_hidden_state[0], model.lm_head.weight), -1)


def _alone(model: Any, ids_T: Tensor, paths: list[Tensor]) -> Tensor:
    """The same by transformers alone: each path by itself, because some models look at the longest of several rows.
    Where transformers binds kernels of GPUs to its recurrent layers, those of the reference here stand in for them."""
    found = list[Tensor]()
    if is_bound := binds_kernels():
        model = replace_layers(copy.deepcopy(model), KERNELS["reference"])
    for path in paths:
        more = {"forest": Forest((0,), (len(path),), (-1,))} if is_bound else {}
        found.append(model(input_ids=ids_T[path][None], use_cache=False, **more).logits[0])
    return torch.log_softmax(torch.cat(found), -1)


def _paths(forest: Forest) -> list[Tensor]:
    """The places of the tokens of each segment behind those above it."""
    paths: list[Tensor] = []
    for start, length, parent in zip(forest.start, forest.length, forest.parent, strict=True):
        own = torch.arange(start, start + length)
        paths.append(own if parent < 0 else torch.cat([paths[parent], own]))
    return paths


def _random_forest(generator: random.Random) -> Forest:
    """Two groups and a prompt alone, with segments below segments; shorter and longer than `_SHORT`."""
    parents = (-1, 0, 1, 1, 0, -1, -1, 6, 6)
    lengths = tuple(generator.randint(1, 3 * _SHORT) for _ in parents)
    starts = tuple(sum(lengths[:segment]) for segment in range(len(parents)))
    return Forest(starts, lengths, parents)


# ---------------------------------------------------------------------------------------------------- the stand-in


def _stand_in(content: dict[str, Any]) -> Any:
    """A model of the kind that a configuration describes, in evaluation mode."""
    content = _fewer_layers(_shortened({key: value for key, value in content.items() if value is not None}))
    config: Any = CONFIG_MAPPING[content["model_type"]].from_dict(_narrowed(content))
    config._attn_implementation = "eager"
    with torch.device("cpu"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:  # rows of length about 1 stay so, and scores are a few units large
            parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.6))
        else:
            parameter.normal_(std=0.5)
    return model


def _shortened(value: Any) -> Any:
    """A configuration in which windows and lengths that change something are reached by rows of a few tokens."""
    if isinstance(value, list):
        return [_shortened(one) for one in value]
    if not isinstance(value, dict):
        return value
    made = {key: _shortened(one) for key, one in value.items()}
    for key, size in made.items():
        if key.endswith(_WINDOWS) and isinstance(size, int) and not isinstance(size, bool) and size > _SHORT:
            made[key] = _SHORT
    if grows_with_length(made):
        made |= {key: 2 * _SHORT for key in _LENGTHS if key in made}
    return made


def _fewer_layers(content: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the first layer of each kind, at least two. Lists with an entry for each layer say the
    kind."""
    count = content["num_hidden_layers"]
    lists = {key: value for key, value in content.items() if isinstance(value, list) and len(value) == count > 1}
    kinds: dict[str, int] = {}
    for layer in range(count):
        kinds.setdefault(json.dumps([value[layer] for value in lists.values()]), layer)
    kept = [*kinds.values()][:_LAYERS]
    kept = kept if len(kept) > 1 or count < 2 else [*kept, *(layer for layer in range(count) if layer not in kept)][:2]
    chosen = {key: [value[layer] for layer in kept] for key, value in lists.items()}
    return {**content, **chosen, "num_hidden_layers": len(kept)}


def _narrowed(content: dict[str, Any]) -> dict[str, Any]:
    """A configuration with few heads of their own width, narrow layers and a small vocabulary."""
    made = copy.deepcopy(content)
    heads = made["num_attention_heads"]
    groups = made.get("num_key_value_heads", heads)
    width = made.get("head_dim") or made["hidden_size"] // heads
    kept = min(groups, 2)
    made |= {"num_attention_heads": kept * min(2, heads // groups), "vocab_size": _VOCABULARY}
    if "num_key_value_heads" in made:
        made["num_key_value_heads"] = kept
    made["hidden_size"] = made["num_attention_heads"] * width
    made |= {key: min(made[key], 64) for key in ("intermediate_size", "moe_intermediate_size") if key in made}
    return made | {key: 0 for key in _SPECIAL if key in made}
