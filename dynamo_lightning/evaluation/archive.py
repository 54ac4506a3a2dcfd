"""Every response of an evaluation on disk, as it comes: an interrupted evaluation goes on where it stopped.

A folder belongs to one policy under one way of sampling and scoring, whose fingerprint is part of its name: the same
command finds its responses again, another policy or temperature gets another folder. Each process appends to a file of
its own. A line that was cut off by a kill is dropped, and its response sampled again: the same one, for its seed
depends on the problem and the sample's number alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from dynamo_lightning.distributed import gather_objects, rank, stop_together
from dynamo_lightning.rewards.math import final_answer
from dynamo_lightning.types import Prompt, Rollout, Score

Record = dict[str, Any]

_KEPT = (
    "source", "prompt_id", "sample_index", "final_answer", "reward", "truncated", "response_length", "prompt_digest"
)  # fmt: skip
"""Fields of a response that are kept in memory: the texts of a large evaluation would fill it."""


def make_record(rollout: Rollout, score: Score) -> Record:
    """One response with its score, as plain values."""
    return {
        "source": rollout.prompt.source,
        "prompt_id": rollout.prompt.prompt_id,
        "row": rollout.prompt.row,
        "sample_index": rollout.sample_index,
        "question": rollout.prompt.question,
        "answer": rollout.prompt.answer,
        "response": rollout.text,
        "final_answer": final_answer(rollout.text),
        "reward": score.reward if math.isfinite(score.reward) else None,
        "components": dict(score.components),
        "failure": score.failure,
        "truncated": rollout.truncated,
        "response_length": rollout.response_length,
    }


def prompt_digest(prompt: Prompt) -> str:
    """Digest that distinguishes two prompts with the same problem under other templates."""
    return hashlib.blake2b(repr(prompt.token_ids).encode(), digest_size=8).hexdigest()


class ResponseArchive:
    """The responses of one evaluation.

    Args:
        folder: Folder of all evaluations; on a file system that all processes share.
        label: Beginning of the evaluation's own folder, for people.
        settings: What the responses depend on besides the problem, as plain values: its digest is the folder's ending.
    """

    def __init__(self, folder: str, label: str, settings: Mapping[str, Any]) -> None:
        content = json.dumps(settings, indent=2, sort_keys=True, default=str)
        digest = hashlib.blake2b(content.encode(), digest_size=4).hexdigest()
        self.folder = Path(folder) / f"{label}-{digest}"
        self.folder.mkdir(parents=True, exist_ok=True)
        if rank() == 0:
            (self.folder / "settings.json").write_text(content + "\n", encoding="utf-8")
        self._records: dict[tuple[int, int, str], Record] = {}
        """By prompt id, sample index and digest of the prompt's tokens: a folder may have several templates."""
        self._read()

    def find(self, prompt: Prompt, sample_index: int) -> Record | None:
        """The response of this prompt, under its present template, that is there already."""
        return self._records.get((prompt.prompt_id, sample_index, prompt_digest(prompt)))

    def append(self, pairs: Iterable[tuple[Rollout, Score]]) -> None:
        """Write this process's responses; when it returns, a killed process has lost none of them."""
        lines: dict[str, list[str]] = {}
        for rollout, score in pairs:
            record = {**make_record(rollout, score), "prompt_digest": prompt_digest(rollout.prompt)}
            lines.setdefault(rollout.prompt.source, []).append(json.dumps(record, ensure_ascii=False) + "\n")
        for source, of_source in lines.items():
            with self._own_file(source).open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(of_source)

    def _own_file(self, source: str) -> Path:
        ending = "" if rank() == 0 else f".rank{rank()}"
        return self.folder / f"{source.replace('/', '_')}.responses{ending}.jsonl"

    def _read(self) -> None:
        """Read what all processes wrote before; a last line without an end is cut off."""
        torn = 0
        for path in sorted(self.folder.glob("*.responses*.jsonl")):
            content = path.read_bytes()
            complete = content[: content.rfind(b"\n") + 1]
            if rank() == 0 and len(complete) < len(content):
                os.truncate(path, len(complete))  # in place: other processes may be reading it
                torn += 1
            for number, line in enumerate(complete.splitlines()):
                try:
                    parsed = json.loads(line)
                    record = {name: parsed[name] for name in _KEPT}
                except (ValueError, KeyError, TypeError):
                    rank_zero_warn(f"{path}, line {number} (counting from 0) is no response: it is sampled again")
                    continue
                self._records[record["prompt_id"], record["sample_index"], record["prompt_digest"]] = record
        # What the first process found counts on all: one that samples fewer than the others would leave them waiting.
        found = gather_objects([set(self._records)])[0]
        same = found <= self._records.keys()
        stop_together("" if same else f"model.evaluation.folder: {self.folder} is not the same folder on all machines")
        self._records = {key: self._records[key] for key in found}
        if self._records:
            cut = f", {torn} more cut off in the middle" * bool(torn)
            rank_zero_info(f"{self.folder}: {len(self._records)} responses are there already{cut}")
