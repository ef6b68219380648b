"""verl's side of the comparison: its FSDP engine's `train_batch` with its own loss on the shared batch. verl knows no
CPU, so a platform for it is registered through verl's plug-in points. Runs in an environment of its own.

    verl_step.py run MODEL BATCH THREADS ROWS
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from functools import partial
from typing import Any

os.environ.update(
    VERL_PLATFORM="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29_500 + os.getpid() % 1000), RANK="0",
    WORLD_SIZE="1", LOCAL_RANK="0", VERL_LOGGING_LEVEL="ERROR",
)  # fmt: skip

import torch
from tensordict import TensorDict
from tensordict.tensorclass import NonTensorData, NonTensorStack
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry
from work import CLIP, Done, Prints, prints_of, serve


def _returns(value: Any) -> Any:
    return lambda *_: value


_DEVICE = types.SimpleNamespace(
    is_available=_returns(True), current_device=_returns("cpu"), device_count=_returns(1), set_device=_returns(None),
    synchronize=_returns(None), empty_cache=_returns(None), manual_seed=torch.manual_seed,
    manual_seed_all=torch.manual_seed, reset_peak_memory_stats=_returns(None), memory_allocated=_returns(0),
    memory_reserved=_returns(0), max_memory_allocated=_returns(0), max_memory_reserved=_returns(0),
    mem_get_info=_returns((1 << 34, 1 << 34)), get_rng_state=torch.get_rng_state, set_rng_state=torch.set_rng_state,
)  # fmt: skip


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """Whatever verl asks of a device, answered for one CPU."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _DEVICE
    is_available = is_platform_available = _returns(True)
    current_device = get_device_uuid = _returns("cpu")
    communication_backend_name = _returns("gloo")
    device_count = _returns(1)
    set_device = synchronize = manual_seed = manual_seed_all = set_allocator_settings = _returns(None)
    empty_cache = profiler_start = profiler_stop = _returns(None)
    get_device_capability = _returns((None, None))
    visible_devices_envvar = _returns("CPU_VISIBLE_DEVICES")
    ray_resource_name = _returns("CPU")
    ray_noset_envvars = _returns([])
    is_ipc_supported = _returns(False)
    rollout_env_vars = _returns({})
    get_collective_module = cudart = _returns(None)

    @contextlib.contextmanager
    def nvtx_range(self, *_: str):
        yield

    def ray_resource_options(self, count: int) -> dict[str, int]:
        return {"num_cpus": count}


def engine_of(folder: str, answers: int, rows: int) -> Any:
    """verl's engine for a language model on one rank, and the loss function that its actor uses."""
    from verl.trainer.config import CheckpointConfig
    from verl.workers.config import ActorConfig, FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp import transformer_impl
    from verl.workers.utils.losses import ppo_loss

    for backend in ("fsdp", "fsdp2"):
        EngineRegistry._engines["language_model"][backend].setdefault("cpu", transformer_impl.FSDPEngineWithLMHead)
    model = HFModelConfig(
        path=folder, enable_gradient_checkpointing=False, use_remove_padding=False,
        override_config={"attn_implementation": "sdpa"},
    )  # fmt: skip
    single = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    engine_config = FSDPEngineConfig(
        strategy="fsdp2", model_dtype="fp32", mixed_precision=single, use_torch_compile=False,
        wrap_policy={"transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]}, use_remove_padding=False,
        use_dynamic_bsz=False, micro_batch_size_per_gpu=rows,
    )  # fmt: skip
    engine = EngineRegistry.new(
        model_type="language_model", backend="fsdp2", model_config=model, engine_config=engine_config,
        checkpoint_config=CheckpointConfig(),
        optimizer_config=FSDPOptimizerConfig(
            lr=0.0, weight_decay=0.0, clip_grad=1e9, total_training_steps=10, lr_warmup_steps=0
        ),
    )  # fmt: skip
    engine.initialize()
    actor = ActorConfig(
        strategy="fsdp2", rollout_n=answers, ppo_micro_batch_size_per_gpu=rows, engine=engine_config,
        loss_agg_mode="seq-mean-token-mean", clip_ratio=CLIP, clip_ratio_low=CLIP, clip_ratio_high=CLIP,
        clip_ratio_c=1e9,
    )  # fmt: skip
    object.__setattr__(actor.policy_loss, "loss_mode", "vanilla")
    object.__setattr__(actor, "global_batch_info", {})
    return engine, partial(ppo_loss, actor)


def data_of(groups: list[dict[str, Any]], rows: int) -> TensorDict:
    """All groups as verl's trainer hands them to its engine: the prompt and its pixels once for each answer."""
    from verl.utils import tensordict_utils
    from verl.workers.utils.padding import left_right_2_no_padding

    answers = groups[0]["answers"].shape[0]
    prompts = torch.cat([torch.tensor(group["prompt"]).repeat(answers, 1) for group in groups])
    responses = torch.cat([group["answers"] for group in groups])
    ids = torch.cat([prompts, responses], 1)
    mask = torch.ones_like(ids)
    advantage = torch.cat([group["advantage"] for group in groups])
    data = TensorDict(
        {
            "prompts": prompts,
            "responses": responses,
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": mask.cumsum(1) - 1,
            "response_mask": torch.ones_like(responses),
            "advantages": advantage[:, None].expand(responses.shape).contiguous(),
        },
        batch_size=len(ids),
    )
    pixels = [group["pixels"] for group in groups for _ in range(answers)]
    if pixels[0] is not None:
        data["multi_modal_inputs"] = NonTensorStack(*[NonTensorData({"pixel_values": tiles}) for tiles in pixels])
    data = left_right_2_no_padding(data)
    tensordict_utils.assign_non_tensor(
        data, use_remove_padding=False, use_dynamic_bsz=False, micro_batch_size_per_gpu=rows, temperature=1.0,
        global_batch_size=len(ids), calculate_entropy=False, use_fused_kernels=False, pad_token_id=0,
    )  # fmt: skip
    data["old_log_probs"] = torch.cat([group["old"] for group in groups])
    return data


def run(folder: str, path: str, threads: int, rows: int) -> None:
    torch.set_num_threads(threads)
    torch.distributed.init_process_group("gloo")
    groups = torch.load(path)["groups"]
    engine, loss = engine_of(folder, groups[0]["answers"].shape[0], rows)
    data = data_of(groups, rows)

    def step(keep: bool = False) -> Done:
        with engine.train_mode(zero_grad_on_exit=not keep):
            metrics = engine.train_batch(data.clone(False), loss)["metrics"]
        return Done(_value(metrics["actor/pg_loss"]), float(metrics["grad_norm"]))

    def gradients() -> tuple[Done, Prints]:
        done = step(keep=True)
        return done, prints_of(engine.module)

    serve(step, gradients)


def _value(metric: Any) -> float:
    """verl's metrics come as numbers, as lists of them or as objects that aggregate themselves."""
    values = metric if isinstance(metric, list) else [metric]
    return sum(float(value.aggregate() if hasattr(value, "aggregate") else value) for value in values)


if __name__ == "__main__":
    run(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
