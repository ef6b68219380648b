"""Fields of OpenAI's, vLLM's and SGLang's requests that an engine here cannot act on, with the values by which they ask
for nothing. Clients send those whether they need them or not."""

from __future__ import annotations

from typing import Any

IGNORED = (
    "user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier",
    "parallel_tool_calls", "cache_salt", "request_id", "rid", "priority", "separate_reasoning", "stream_reasoning",
    "include_reasoning", "spaces_between_special_tokens",
)  # fmt: skip
"""Fields that change no answer here."""

TURN_IGNORED = ("name", "tool_call_id")
"""Fields of a message that change no answer here."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": (),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tools": (),
    "tool_choice": ("none", "auto"),
    "functions": (),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
    "verbosity": ("medium",),
    # vLLM and SGLang
    "min_p": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "min_tokens": (0,),
    "stop_token_ids": (),
    "include_stop_str_in_output": (False,),
    "bad_words": (),
    "allowed_token_ids": (),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (False,),
    "chat_template": (),
    "chat_template_kwargs": (),
    "documents": (),
    "mm_processor_kwargs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "logits_processors": (),
    "kv_transfer_params": (),
    "vllm_xargs": (),
    "thinking_token_budget": (),
    "regex": (),
    "ebnf": (),
    "json_schema": (),
    "structural_tag": (),
    "stop_regex": (),
    "no_stop_trim": (False,),
    "custom_logit_processor": (),
    "custom_params": (),
    "lora_path": (),
    "session_params": (),
    "return_hidden_states": (False,),
}
"""Besides null and what is empty."""

TURN_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tool_calls": (),
    "function_call": (),
    "refusal": (),
    "annotations": (),
    "audio": (),
    "reasoning": (),
    "reasoning_content": (),
}
"""Those of a message: clients send a message back as it came."""


def asks_for_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether a value is null, empty or one of the neutral ones; 1 is not true."""
    if value is None or value in ("", [], {}):
        return True
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)
