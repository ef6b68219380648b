"""A plan as text."""

from __future__ import annotations

from foveate.plan.advice import Plan
from foveate.plan.hardware import FLOPS_SHARE, GIB, HOST_MEMORY
from foveate.plan.memory import sizes_of
from foveate.plan.time import in_flight


def plan_text(plan: Plan) -> str:
    """Memory by part, whether it fits and what to change, time by phase, and the assumptions."""
    work, machines, memory = plan.work, plan.machines, plan.memory
    sizes = sizes_of(work.config, work.trainable, work.lora)
    lines = [
        f"{machines.count} x {machines.name}{_apart(plan)}; {sizes.total:,} parameters, {sizes.trained:,} trained; "
        f"a rank holds {plan.rank_share:.2f} times its even share of the weights",
        f"a prompt: {work.prompt} tokens, {work.tiles} tiles{_compressed(plan)}; an answer: {work.answer} "
        f"(at most {work.longest}); {work.groups} x {work.answers} answers a step in {work.updates} updates",
        "",
        f"memory per GPU, of {machines.usable / GIB:.1f} GiB that can be filled",
        *_table(plan),
        "",
        *_verdict(plan),
        "",
        "seconds of a step",
        *(f"  {name:<18} {value:10.1f}" for name, value in _phases(plan)),
        "",
        f"{plan.gpu_hours:,.0f} GPU hours for {work.steps} steps, without reading data and grading, at "
        f"{FLOPS_SHARE:.0%} of the peak arithmetic. The mean lengths above are assumptions unless they were given.",
    ]
    if work.generates:
        lines.append(f"an engine holds {in_flight(work, plan.trainers, memory)} answers of that length at a time")
    return "\n".join(lines)


def _compressed(plan: Plan) -> str:
    share = plan.work.compressed
    return "" if share is None else f" ({share:.0%} compressed)"


def _apart(plan: Plan) -> str:
    cluster = plan.work.cluster
    if not cluster.engines:
        return ""
    return f", {cluster.ranks} that train and {cluster.gpus - cluster.ranks} that generate in {cluster.engines} engines"


def _table(plan: Plan) -> list[str]:
    memory = plan.memory
    rows = [
        ("weights", memory.weights), ("gradients", memory.gradients), ("optimizer", memory.optimizer),
        ("gathered blocks", memory.gathered), ("activations", memory.activations),
        ("pixels, features", memory.features), ("log-prob chunk", memory.chunk),
        ("= while training", memory.training), ("engine weights", memory.engine),
        ("keys and values", memory.keys_values), ("= while generating", memory.generating),
        (f"host, of {HOST_MEMORY / GIB:.0f} GiB", memory.host),
    ]  # fmt: skip
    return [f"  {name:<20} {value / GIB:8.2f}" for name, value in rows]


def _phases(plan: Plan) -> list[tuple[str, float]]:
    seconds = plan.seconds
    step = "= step, overlapped" if seconds.overlaps else "= step"
    return [
        ("generate", seconds.generate), ("log-probs", seconds.forward), ("update", seconds.update),
        ("publish", seconds.publish), (step, seconds.step),
    ]  # fmt: skip


def _verdict(plan: Plan) -> list[str]:
    work = plan.work
    largest = f"the largest micro-batch is about {plan.largest} tokens per device"
    if plan.memory.fits(plan.machines):
        return [f"fits; {largest} (now {work.budget})"]
    if plan.better is None:
        return [f"does not fit, and no other sharding on these GPUs does; use more or larger ones ({largest})"]
    other, cluster = plan.better, plan.better.cluster
    engines = [f"cluster.engines={cluster.engines}", f"cluster.engine_tensor_parallel={cluster.engine_tensor_parallel}"]
    changes = " ".join([
        f"cluster.shard={cluster.shard}", f"cluster.sequence_parallel={cluster.sequence_parallel}",
        f"cluster.offload={str(cluster.offload).lower()}", *(engines if cluster.engines else ()),
        f"model.gradient_checkpointing={str(other.checkpointing).lower()}",
        f"train.tokens_per_micro_batch={other.budget}",
    ])  # fmt: skip
    return [f"does not fit; {largest} (now {work.budget}). The fastest that fits:", f"  {changes}"]
