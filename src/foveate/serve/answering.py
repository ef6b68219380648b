"""A request listens to its answers: whole texts at the end, or pieces while they grow."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from foveate.encoding.encode import Encoder
from foveate.records import Answer, Prompt, SamplingParams
from foveate.serve.batcher import Job
from foveate.serve.limits import tell_loop
from foveate.serve.protocol import ChatRequest
from foveate.serve.replies import TokenText
from foveate.serve.text import GrowingText


@dataclass(slots=True)
class Piece:
    """More text of an answer, with its tokens where their log-probs are wanted."""

    answer: int
    text: str
    entries: list[TokenText] | None


class Answering:
    """Listens to the answers of one request in the engine's thread: for the stop texts that end them, and for the
    pieces of a stream, which come to the event loop in `pieces`; None is the last."""

    def __init__(self, asked: ChatRequest, encoder: Encoder) -> None:
        self.pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        self._asked, self._encoder = asked, encoder
        self._loop = asyncio.get_running_loop()
        self._growing = [GrowingText(self._decode, asked.stop) for _ in range(asked.n)]
        self._unsaid: list[list[TokenText]] = [[] for _ in range(asked.n)]

    def job(self, prompt: Prompt, sampling: SamplingParams) -> Job:
        """The request for the batcher."""
        seed = secrets.randbits(63) if self._asked.seed is None else self._asked.seed % 2**64
        job = Job(prompt, seed, sampling, ignores_stop=self._asked.ignore_eos)
        if self._asked.stream or self._asked.stop:
            job.heard = self._hear
        return job

    def texts(self, answers: Sequence[Answer]) -> list[str]:
        """The texts of whole answers."""
        if self._asked.stop:
            return [growing.whole() for growing in self._growing]
        if self._asked.skip_special_tokens:
            return [self._decode(answer.token_ids) for answer in answers]
        return [answer.text for answer in answers]

    def entries(self, answers: Sequence[Answer]) -> list[list[TokenText]] | None:
        """The tokens of whole answers, if their log-probs are wanted."""
        if not self._asked.logprobs:
            return None
        pieces = [self._encoder.pieces(answer.token_ids) for answer in answers]
        return [
            [*zip(texts, answer.logprobs.tolist(), strict=True)] for texts, answer in zip(pieces, answers, strict=True)
        ]

    def rest(self, answer: int) -> Piece | None:
        """The piece that is left of an answer that has come to its end."""
        text, entries = self._growing[answer].end(), self._take_entries(answer)
        return Piece(answer, text, entries) if text or entries else None

    def _hear(self, answer: int, token: int, logprob: float) -> bool:
        growing = self._growing[answer]
        is_end = token in self._encoder.family.stop_ids and not self._asked.ignore_eos
        text = "" if is_end else growing.add(token)
        if self._asked.logprobs:
            self._unsaid[answer].append((self._encoder.pieces((token,))[0], logprob))
        if text and self._asked.stream:
            piece = Piece(answer, text, self._take_entries(answer))
            tell_loop(self._loop, self.pieces.put_nowait, piece)
        return growing.done

    def _take_entries(self, answer: int) -> list[TokenText] | None:
        entries, self._unsaid[answer] = self._unsaid[answer], []
        return entries if self._asked.logprobs else None

    def _decode(self, token_ids: tuple[int, ...]) -> str:
        if self._asked.skip_special_tokens:
            return str(self._encoder.tokenizer.decode(list(token_ids), skip_special_tokens=True))
        return self._encoder.decode(token_ids)
