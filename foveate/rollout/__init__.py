"""Engines by name. Each is imported only when a run asks for it."""

from __future__ import annotations

ENGINES: dict[str, str] = {
    "native": "foveate.rollout.native:NativeEngine",
    "sglang": "foveate.rollout.sglang:SGLangEngine",
    "vllm": "foveate.rollout.vllm:VLLMEngine",
}
