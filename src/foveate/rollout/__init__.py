"""Engines by name. Each is imported only when a run asks for it."""

from __future__ import annotations

ENGINES: dict[str, str] = {
    "native": "foveate.rollout.native.engine:NativeEngine",
    "sglang": "foveate.rollout.sglang.engine:SGLangEngine",
    "vllm": "foveate.rollout.vllm.engine:VLLMEngine",
}
