"""The device's owner: parameters, state, and one compiled step for each bucket."""

import dataclasses
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxserve.config import CacheConfig, LoraConfig, ModelConfig
from jaxserve.constraint_io import ConstraintDims, new_slot
from jaxserve.execution.adapters import StageAdapters, adapters_shape, lower_write_slot, one_slot_shape
from jaxserve.execution.compile_counter import CompileCounter
from jaxserve.execution.constraints import Constraints
from jaxserve.execution.hidden import SCORE_ROWS, head_params
from jaxserve.execution.kept import KeptPrograms
from jaxserve.execution.lowering import (
    GPU_OPTIONS,
    compile_step,
    held_shape,
    lower_load,
    lower_load_inputs,
    lower_pooler,
    lower_sampler,
    lower_scorer,
    lower_step,
    state_shape,
)
from jaxserve.execution.placement import put_everywhere
from jaxserve.execution.sampling import LOOKS_AT_ALL
from jaxserve.execution.step import (
    StageParams,
)
from jaxserve.model.params import named_leaves
from jaxserve.parallel import specs
from jaxserve.step_io import (
    SAMPLINGS,
    Bucket,
    Sampling,
    StepDims,
    StepOutputs,
    new_inputs,
    outputs_shape,
    unpack_outputs,
)

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # stage of the start-up, done, total


class Computed(NamedTuple):
    """A step between its two programs; with stages, the one in the last."""

    num_rows: int  # B
    logits: jax.Array  # [B, V] f32, shared over the vocabulary
    inputs: jax.Array  # [ST, NI] i32, of ``DeviceState``


class _Job(NamedTuple):
    """A program to be compiled."""

    into: dict[Any, jax.stages.Compiled]
    key: Any  # there
    lower: partial[jax.stages.Lowered]

    @property
    def name(self) -> str:
        key = () if callable(self.key) else self.key
        return f"{self.lower.func.__name__} {key}"


class Runner:
    """Owns params and state; runs compiled steps. Every bucket is compiled before the constructor returns, and for each
    number of rows that they have a sampler for everything in ``samplings``; no step may ask more than the last of them
    in ``SAMPLINGS``' order. With ``lora`` every bucket is compiled twice: a step whose tokens have none does not
    pay for them.

    ``keep_in``: a folder in which compiled programs are kept for the next start (``kept.KeptPrograms``).

    One thread at a time may use it. ``forward`` and ``sample`` return before the device is done; ``read`` waits.

    Attributes:
        compile_counter: at zero when the constructor returns; its owner watches the steps with it.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: StageParams,
        cache: CacheConfig,
        dims: StepDims,
        buckets: Sequence[Bucket],
        mesh: Mesh,
        dtype: jnp.dtype,
        samplings: Sequence[Sampling] = ("any",),
        on_progress: Progress | None = None,
        lora: LoraConfig | None = None,
        keep_in: Path | None = None,
    ):
        self.compile_counter = CompileCounter()
        self.config, self.dims, self.mesh = config, dims, mesh
        self._replicated = NamedSharding(mesh, specs.REPLICATED)
        self._params = params
        self._adapters = None if lora is None else _zeros(adapters_shape(config, lora, mesh, dtype))
        self._state_shape = state_shape(config, cache, dims, buckets, mesh, dtype)
        self._samplings = tuple(samplings)
        self._compiled: dict[tuple[Bucket, bool], jax.stages.Compiled] = {}  # and whether tokens have adapters
        self._loaders: dict[Bucket, jax.stages.Compiled] = {}  # of inputs
        self._samplers: dict[tuple[int, Sampling], jax.stages.Compiled] = {}  # by rows
        self._constraint_dims = ConstraintDims.of(dims, config.vocab_size)
        self._readers: dict[Callable, jax.stages.Compiled] = {}  # of hidden states, by what lowers them
        facts = (config, params, self._adapters, self._state_shape, dims, GPU_OPTIONS)
        self._compile(buckets, on_progress, None if keep_in is None else KeptPrograms(keep_in, mesh, facts))
        if self._adapters is not None:
            self._write_slot = lower_write_slot(self._adapters, mesh).compile()
        self._state = _zeros(self._state_shape)
        # Of steps that are read, by rows, for the next ones: new ones would lie where the workspace of the step was,
        # which would move, and the step's CUDA graph would have to be updated. Three: two steps run, one is read.
        self._free_outputs: dict[int, list[jax.Array]] = {}
        for num_rows in {b.num_rows for b in buckets}:
            self._free_outputs[num_rows] = [self._new_outputs(num_rows) for _ in range(3)]
        self._held: Constraints | None = None
        self._all_allowed: dict[int, jax.Array] = {}  # by rows
        if "constrained" in self._samplings:
            for num_rows in {b.num_rows for b in buckets}:
                bits = np.full((num_rows, self._constraint_dims.num_words), -1, np.int32)
                self._all_allowed[num_rows] = put_everywhere(bits, self._replicated)
            self._held = _zeros(held_shape(self._constraint_dims, mesh))
            self._load = compile_step(lower_load(self._constraint_dims, mesh), mesh)
            self.load_constraints(new_slot(self._constraint_dims)[0])
        self._warm_up(buckets, on_progress)
        self.compile_counter.count = 0

    def _compile(self, buckets: Sequence[Bucket], on_progress: Progress | None, kept: KeptPrograms | None) -> None:
        started = time.perf_counter()
        done, lock = 0, threading.Lock()
        lowering_s = 0.0  # of this thread
        took_s: dict[str, float] = {}  # of the others, by program

        def compile_one(job: _Job, lowered: jax.stages.Lowered | None) -> None:
            nonlocal done
            begun = time.perf_counter()
            program = kept.load(job.name) if kept and lowered is None else None
            if program is None:
                compile_this = partial(compile_step, lowered or job.lower(), self.mesh)
                program = kept.compiled(job.name, compile_this) if kept else compile_this()
            job.into[job.key] = program
            took_s[job.name] = time.perf_counter() - begun
            with lock:
                done += 1
                if on_progress:
                    on_progress("compile", done, len(jobs))

        arrays = (self.config, self._params, self._state_shape, self.dims)
        jobs: list[_Job] = []
        for bucket in sorted(buckets, key=lambda b: -b.num_tokens):  # what takes longest first
            for adapters in (None, self._adapters)[: self._num_variants]:
                key = (bucket, adapters is not None)
                jobs.append(_Job(self._compiled, key, partial(lower_step, *arrays, bucket, self.mesh, adapters)))
            jobs.append(_Job(self._loaders, bucket, partial(lower_load_inputs, self._state_shape, self.dims, bucket)))
        for asked in self._samplings:
            for num_rows in sorted({b.num_rows for b in buckets}):
                lower = partial(lower_sampler, self.config, self._state_shape, self.dims, num_rows, self.mesh, asked)
                jobs.append(_Job(self._samplers, (num_rows, asked), lower))
        if self._has_readers:
            for lower in (lower_scorer, lower_pooler):
                jobs.append(_Job(self._readers, lower, partial(lower, *arrays, self.mesh)))
        # XLA compiles without the interpreter's lock, in threads. Lowering is Python: here, one after another, so that
        # each finds what the ones before have traced and the first compilations begin early.
        num_threads = max(4, os.cpu_count() or 1)
        pool = ThreadPoolExecutor(max_workers=num_threads)
        try:
            futures = []
            for job in jobs:
                is_kept = kept is not None and kept.path(job.name).exists()
                begun = time.perf_counter()
                lowered = None if is_kept else job.lower()
                lowering_s += time.perf_counter() - begun
                futures.append(pool.submit(compile_one, job, lowered))
            for future in futures:
                future.result()
        finally:  # an error or a Ctrl-C does not wait for compilations that nobody wants any more
            pool.shutdown(wait=False, cancel_futures=True)
        longest = sorted(took_s, key=lambda name: -took_s[name])[:3]
        logger.info(
            "%d programs ready in %.1f s: %.1f s of lowering, %.1f s of compiling or reading in %d threads, longest %s",
            *(len(jobs), time.perf_counter() - started, lowering_s, sum(took_s.values())),
            *(num_threads, ", ".join(f"{name} {took_s[name]:.1f} s" for name in longest)),
        )

    def _warm_up(self, buckets: Sequence[Bucket], on_progress: Progress | None) -> None:
        """Runs every bucket on padding: what the runtime does on a first call is not left to the first user."""
        # On GPUs XLA makes the graph of a step, in 20 ms, when it runs for the second time.
        times = 2 if self.mesh.devices.flat[0].platform == "gpu" else 1
        variants = (False, True)[: self._num_variants]
        jobs: list[tuple[Bucket, Sampling, bool]] = [
            (b, asked, has) for b in buckets for asked in self._samplings for has in variants
        ] * times
        for i, (bucket, asked, has_adapters) in enumerate(jobs):
            padding = np.stack([new_inputs(bucket, self.dims)[0]] * self.mesh.shape["stage"])
            computed = self.forward(bucket, padding, has_adapters=has_adapters)
            self.read(self.sample(computed, asked))
            if on_progress:
                on_progress("warm-up", i + 1, len(jobs))
        if self._adapters is not None:
            self.write_adapter(_zeros(self.adapter_shape()), 0)
        if self._has_readers:
            self.read_scores(self.score([0], [0]), in_full=False)
            self.read_pooled(self.pool(np.zeros(self.dims.hidden_tokens, np.int32)))

    @property
    def _has_readers(self) -> bool:
        """Whether requests may ask for scores or embeddings; with stages, hidden states are there for the next one,
        too."""
        return self.dims.hidden_tokens > 0 and bool(set(self._samplings) & set(LOOKS_AT_ALL))

    @property
    def _num_variants(self) -> int:
        """Programs of a bucket: without adapters, and with them."""
        return 1 if self._adapters is None else 2

    def forward(self, bucket: Bucket, buffers: np.ndarray, *, has_adapters: bool = False) -> Computed:
        """Starts a tick on ``buffers`` [ST, NI] i32, for each stage those of its step (``step_io.new_inputs``), up to
        the logits of the last stage's.

        Args:
            has_adapters: whether one of their tokens may have an adapter; else all are the base model's.
        """
        # As it is, not by jax.device_put: the compiled call copies it in a fifth of the time.
        inputs = self._loaders[bucket](self._state.inputs, buffers)
        state = dataclasses.replace(self._state, inputs=inputs)
        step = self._compiled[bucket, has_adapters]
        self._state, logits = step(self._params, state, self._adapters if has_adapters else None)
        return Computed(bucket.num_rows, logits, inputs=self._state.inputs)

    def program_texts(self, bucket: Bucket, asked: Sampling) -> list[str]:
        """What XLA made of a tick of ``bucket`` and of its sampler, as text."""
        programs = (self._compiled[bucket, False], self._samplers[bucket.num_rows, self._sampler_for(asked)])
        return [program.as_text() or "" for program in programs]

    def _sampler_for(self, asked: Sampling) -> Sampling:
        """The least of what was compiled that gives what is ``asked``."""
        while asked not in self._samplings:
            asked = SAMPLINGS[SAMPLINGS.index(asked) + 1]
        return asked

    def sample(self, computed: Computed, asked: Sampling, allowed: np.ndarray | None = None) -> jax.Array:
        """Goes on with a step whose rows ask no more than ``asked`` of sampling, before the next ``forward``.

        Args:
            allowed: [B, W] i32, a bit for each token that a row may sample, for rows that ask "constrained"; not
                written to afterwards. None: all.

        Returns:
            A handle for ``read``.
        """
        asked = self._sampler_for(asked)
        held = bits = None
        if asked == "constrained":
            held = self._held
            bits = self._all_allowed[computed.num_rows]
            if allowed is not None:
                bits = put_everywhere(allowed, self._replicated)
        sampler = self._samplers[computed.num_rows, asked]
        free = self._free_outputs[computed.num_rows]
        packed = free.pop() if free else self._new_outputs(computed.num_rows)
        last_tokens, held, packed = sampler(
            self._state.last_tokens, held, packed, computed.logits, computed.inputs, bits
        )
        self._state = dataclasses.replace(self._state, last_tokens=last_tokens)
        if held is not None:
            self._held = held
        return packed

    def score(self, places: Sequence[int], ids: Sequence[int]) -> tuple[jax.Array, jax.Array]:
        """Scores ``ids``, at most ``SCORE_ROWS``, each as what follows the token at its place in the step of the last
        ``forward``, before the next one.

        Returns a handle for ``read_scores``.
        """
        fields = np.zeros((2, SCORE_ROWS), np.int32)
        fields[0, : len(places)], fields[1, : len(ids)] = places, ids
        fields = put_everywhere(fields, self._replicated)
        return self._readers[lower_scorer](head_params(self._params), self._state.hidden, fields)

    def read_scores(
        self, handle: tuple[jax.Array, jax.Array], *, in_full: bool
    ) -> tuple[StepOutputs, np.ndarray | None]:
        """Waits for ``score``: raw log-probabilities of the ids and of the best; ``in_full`` of all, [C, V] f32."""
        packed, logprobs = handle
        outputs = unpack_outputs(np.asarray(packed), self.dims.max_logprobs)
        return outputs, np.asarray(logprobs) if in_full else None

    def pool(self, rows: np.ndarray) -> jax.Array:
        """Sums the final norm's outputs of the tokens of the last ``forward``, before the next one: each token's into
        the row that ``rows`` [TH] i32 says, ``num_slots`` into none.

        Returns a handle for ``read_pooled``.
        """
        return self._readers[lower_pooler](
            head_params(self._params), self._state.hidden, put_everywhere(rows, self._replicated)
        )

    def read_pooled(self, handle: jax.Array) -> np.ndarray:
        """Waits for ``pool``: the sums [R, D] f32."""
        return np.asarray(handle)

    def load_constraints(self, buffer: np.ndarray) -> None:
        """A slot's constraints (``constraint_io.pack_slot``), for the steps dispatched from now on."""
        self._held = self._load(self._held, put_everywhere(buffer, self._replicated))

    def read(self, handle: jax.Array) -> StepOutputs:
        """Waits for a dispatched step and copies its outputs to the host, once for each handle."""
        outputs = unpack_outputs(np.asarray(handle), self.dims.max_logprobs)
        self._free_outputs[handle.shape[0]].append(handle)
        return outputs

    def _new_outputs(self, num_rows: int) -> jax.Array:
        return put_everywhere(np.zeros(outputs_shape(num_rows, self.dims), np.int32), self._replicated)

    def update_params(self, params: StageParams) -> None:
        """Other weights from the next dispatch on; steps dispatched before keep theirs. Nothing is compiled.

        ``params`` are placed as those of the constructor were.
        """
        old, new = dict(named_leaves(self._params)), dict(named_leaves(params))
        for name in (*old, *new):
            facts = [None if x is None else (x.shape, x.dtype.name, x.sharding) for x in (new.get(name), old.get(name))]
            if facts[0] != facts[1]:
                raise ValueError(f"params.{name} is {facts[0]}, the compiled steps take {facts[1]}")
        self._params = params

    def adapter_shape(self) -> StageAdapters:
        """What ``write_adapter`` takes. Only where there is room for adapters."""
        assert self._adapters is not None
        return one_slot_shape(self._adapters)

    def write_adapter(self, one: StageAdapters, slot: int) -> None:
        """An adapter (``adapters.place_adapter``) into ``slot``, for the steps dispatched from now on."""
        number = put_everywhere(np.asarray(slot, np.int32), self._replicated)
        self._adapters = self._write_slot(self._adapters, one, number)

    def close(self) -> None:
        """Frees the device's memory; the runner cannot be used afterwards."""
        self.compile_counter.close()
        for x in jax.tree.leaves((self._state, self._held, self._all_allowed, self._free_outputs, self._adapters)):
            x.delete()
        del self._params, self._adapters, self._state, self._held, self._all_allowed, self._free_outputs
        del self._compiled, self._loaders, self._samplers, self._readers


def _zeros[T](shapes: T) -> T:
    """Arrays of zeros where a tree has ``ShapeDtypeStruct``s."""
    return jax.jit(
        lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes),
        out_shardings=jax.tree.map(lambda s: s.sharding, shapes),
    )()
