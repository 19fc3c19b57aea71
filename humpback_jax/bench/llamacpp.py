"""llama.cpp: `python -m humpback_jax.bench.llamacpp WORKLOAD PRECISION BATCHES`.

Continuous batching as its server does it: a step reads one token of every sequence that draws and
the prompts of those that begin, a free sequence takes the next prompt at once, and what all prompts
begin with is computed once. The weights keep the number format of their file, whatever PRECISION.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from humpback_jax.bench.workload import Workload

TRIAL_ROWS = 32  # rows on which the number of sequences is chosen
STEP_TOKENS = 2048  # read in one step, at most: llama.cpp's default
ALL_LAYERS = 999  # on the GPU, where there is one
PREFIX = 0  # the sequence that holds what all prompts begin with


@dataclasses.dataclass
class _Row:
    """A row under way; `cached` of its tokens have been read."""

    index: int
    cached: int
    drawn: list[int] = dataclasses.field(default_factory=list)


class Sequences:
    """A context of llama.cpp with room for `count` rows under way."""

    def __init__(self, model: Any, workload: Workload, count: int) -> None:
        from llama_cpp import llama_cpp

        self.lib, self.workload, self.count = llama_cpp, workload, count
        longest = max(map(len, workload.prompts))
        settings = llama_cpp.llama_context_default_params()
        settings.n_seq_max = count + 1
        # Every sequence has as many places, the prefix among them.
        places = longest + workload.max_new_tokens
        settings.n_ctx = (count + 1) * (-(-places // 256) * 256)
        settings.n_batch = max(STEP_TOKENS, longest)
        settings.n_threads = settings.n_threads_batch = len(os.sched_getaffinity(0))
        self.step_tokens = settings.n_batch
        self.context = llama_cpp.llama_init_from_model(model, settings)
        assert self.context, "llama.cpp could not make a context"
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(self.step_tokens, 0, 1)
        vocabulary = llama_cpp.llama_model_get_vocab(model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def close(self) -> None:
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_free(self.context)

    def generate(self, chosen: Sequence[int]) -> dict[int, list[int]]:
        """Greedy texts of the chosen prompts, without their stop token."""
        prompts, shared = self.workload.prompts, self.workload.shared
        self.lib.llama_memory_clear(self.memory, True)
        self._read([(token, PREFIX, at, False) for at, token in enumerate(prompts[0][:shared])])
        waiting = collections.deque(chosen)
        free = list(range(1, self.count + 1))
        live: dict[int, _Row] = {}
        texts: dict[int, list[int]] = {}
        while waiting or live:
            asked = list(live)
            reads = [(row.drawn[-1], number, row.cached, True) for number, row in live.items()]
            for row in live.values():
                row.cached += 1
            while waiting and free and self._fits(len(reads), waiting[0]):
                number, index = free.pop(), waiting.popleft()
                self.lib.llama_memory_seq_cp(self.memory, PREFIX, number, -1, -1)
                last = len(prompts[index]) - 1
                for at in range(shared, last + 1):
                    reads.append((prompts[index][at], number, at, at == last))
                live[number] = _Row(index, last + 1)
                asked.append(number)
            tokens = self._read(reads)
            for number, token in zip(asked, tokens, strict=True):
                row = live[number]
                if token not in self.workload.stop_ids:
                    row.drawn.append(token)
                    if len(row.drawn) < self.workload.max_new_tokens:
                        continue
                texts[row.index] = live.pop(number).drawn
                self.lib.llama_memory_seq_rm(self.memory, number, -1, -1)
                free.append(number)
        return texts

    def _fits(self, taken: int, index: int) -> bool:
        own = len(self.workload.prompts[index]) - self.workload.shared
        return taken + own <= self.step_tokens

    def _read(self, reads: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Reads (token, sequence, position, whether the next is wanted); the next tokens."""
        batch, count = self.batch, len(reads)
        if not count:
            return []
        batch.n_tokens = count
        for at, (token, number, position, wanted) in enumerate(reads):
            batch.token[at], batch.pos[at], batch.logits[at] = token, position, wanted
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, number
        failed = self.lib.llama_decode(self.context, batch)
        assert not failed, f"llama_decode returned {failed}"
        asked = sum(wanted for *_, wanted in reads)
        if not asked:
            return []
        # The logits stand in the order of the tokens that asked for them.
        logits = np.ctypeslib.as_array(
            self.lib.llama_get_logits(self.context), (asked, self.vocab_size)
        )
        found: list[int] = logits.argmax(axis=1).tolist()
        return found


def measure(workload: Workload, batches: list[int]) -> dict[str, Any]:
    """Rates of greedy generation with the best of some numbers of sequences."""
    from llama_cpp import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = ALL_LAYERS
    model = llama_cpp.llama_model_load_from_file(workload.gguf.encode(), settings)
    assert model, f"llama.cpp could not read {workload.gguf}"
    name = ctypes.create_string_buffer(128)
    llama_cpp.llama_model_desc(model, name, len(name))
    order = sorted(range(len(workload.prompts)), key=lambda i: -len(workload.prompts[i]))
    trial = order[:: max(len(order) // TRIAL_ROWS, 1)]

    def run(chosen: Sequence[int], count: int) -> tuple[float, dict[int, list[int]]]:
        sequences = Sequences(model, workload, count)
        sequences.generate(chosen[:1])
        started = time.perf_counter()
        texts = sequences.generate(chosen)
        seconds = time.perf_counter() - started
        sequences.close()
        return seconds, texts

    rates = {count: len(trial) / run(trial, count)[0] for count in batches if len(batches) > 1}
    best = max(rates, key=lambda count: rates[count]) if rates else batches[0]
    seconds, outputs = run(order, best)
    return {
        **workload.figures(seconds, outputs),
        "precision": name.value.decode().split()[-1],
        "batch": best,
        "trial_rows_per_s": rates,
    }


if __name__ == "__main__":
    sizes = [int(size) for size in sys.argv[3].split(",")]
    print(json.dumps(measure(Workload.load(Path(sys.argv[1])), sizes)))
