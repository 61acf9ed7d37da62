"""The LoRA adapters of one engine: their names, their slots on the devices, and when a slot may have another."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxserve.config import LoraConfig, ModelConfig
from jaxserve.engine.loop import StepLoop
from jaxserve.engine.mirror import LeadingRunner
from jaxserve.errors import RequestError, UnknownLoraError
from jaxserve.execution.adapters import StageAdapters, place_adapter
from jaxserve.model.lora import Adapter, adapter_digest, check_adapter
from jaxserve.request import LoadedAdapter, LoraLoad, Request
from jaxserve.scheduler.sequence import Sequence as Scheduled

MAX_NAME_LEN = 256


@dataclass(frozen=True)
class PlacedLora:
    """An adapter on the devices of each replica, ready to get a slot."""

    rank: int
    path: str | None
    arrays: tuple[StageAdapters, ...]


class Loras:
    """What is loaded, and what requests may name. One thread at a time may load and unload; any thread may ask.

    An adapter that is unloaded while requests use it goes on for them: its slot is free when the last has ended. It
    has the same one in all replicas, so that a request may go to any of them.

    Args:
        loops: of the replicas: their runners and schedulers.
        config: None where the engine has no room for adapters: whatever names one is refused.
        base_names: that no adapter may have.
    """

    def __init__(
        self,
        config: LoraConfig | None,
        model_config: ModelConfig,
        loops: Sequence[StepLoop],
        base_names: Iterable[str],
    ):
        self.config = config
        self._model_config, self._loops = model_config, tuple(loops)
        self._base_names = frozenset(base_names)
        self._loaded: dict[str, LoadedAdapter] = {}  # replaced, never changed: other threads read it
        self._num_loads = 0

    def find(self, name: str) -> LoadedAdapter:
        """The adapter that a request names. Any thread.

        Raises:
            UnknownLoraError: none of that name is loaded.
        """
        self._check_room("lora")
        found = self._loaded.get(name)
        if found is None:
            raise UnknownLoraError("lora", f"{name!r:.200} is not loaded, {self._told()}")
        return found

    def loaded(self) -> tuple[LoadedAdapter, ...]:
        """Those that requests may name, in the order of their loading. Any thread."""
        return tuple(self._loaded.values())

    def check_loaded(self, request: Request) -> None:
        """Raises UnknownLoraError where the request's adapter was unloaded since the request was made."""
        adapter = request.adapter
        if adapter is not None and self._loaded.get(adapter.name) != adapter:
            raise UnknownLoraError("lora", f"{adapter.name!r:.200} was unloaded since the request was made")

    def read(self, path: str | Path, digest: str | None = None) -> PlacedLora:
        """The adapter in a folder, on the devices; of an engine of several hosts on all of them, each of which reads
        its own folder of that name. Any thread.

        Args:
            digest: ``model.lora.adapter_digest`` of what it must be; None: whatever is there.

        Raises:
            CheckpointError: it cannot be used, with the key or tensor at fault.
            ValueError: it has another digest; or another host cannot read it, or has another one there; says which.
            RequestError: the engine has no room for adapters.
        """
        from jaxserve.checkpoint.hf.adapter import read_adapter

        config = self._check_room()
        adapter = read_adapter(path, self._model_config, config.max_rank)
        if digest is not None and (found := adapter_digest(adapter)) != digest:
            raise ValueError(f"{path} has another adapter: its digest is {found}, expected {digest}")
        placed = self.place(adapter, str(path))
        for loop, arrays in zip(self._loops, placed.arrays, strict=True):
            if isinstance(loop.runner, LeadingRunner):
                loop.runner.have_read(arrays, path, adapter_digest(adapter))
        return placed

    def place(self, adapter: Adapter, path: str | None = None) -> PlacedLora:
        """A live adapter on the devices. Any thread. Raises ValueError as ``model.lora.check_adapter``."""
        check_adapter(adapter, self._model_config, self._check_room())
        arrays = tuple(
            place_adapter(adapter, self._model_config, loop.runner.config, loop.runner.adapter_shape())
            for loop in self._loops
        )
        return PlacedLora(adapter.rank, path, arrays)

    def add(self, name: str, placed: PlacedLora) -> LoadedAdapter:
        """Gives it a slot: requests made from now on may name it.

        Raises:
            RequestError: the name is taken, or every slot is; names what has them.
        """
        config = self._check_room()
        self._check_name(name)
        used = {a.slot: f"{a.name!r:.60}" for a in self._loaded.values()}
        for sequence in self._unfinished():
            if (adapter := sequence.request.adapter) is not None:
                used.setdefault(adapter.slot, f"{adapter.name!r:.60}, unloaded but in use")
        free = next((slot for slot in range(config.max_loras) if slot not in used), None)
        if free is None:
            raise RequestError(
                "lora_name", f"max_loras={config.max_loras} are on the device: {'; '.join(used.values())}"
            )
        self._num_loads += 1
        loaded = LoadedAdapter(name=name, slot=free, generation=self._num_loads, rank=placed.rank, path=placed.path)
        for loop, arrays in zip(self._loops, placed.arrays, strict=True):
            loop.runner.write_adapter(arrays, free)
        self._loaded = self._loaded | {name: loaded}
        return loaded

    def unload(self, name: str) -> None:
        """No request that is made from now on may name it.

        Raises:
            UnknownLoraError: it is not loaded.
        """
        self._check_room()
        if name not in self._loaded:
            raise UnknownLoraError("lora_name", f"{name!r:.200} is not loaded, {self._told()}")
        self._loaded = {n: adapter for n, adapter in self._loaded.items() if n != name}

    def loads(self) -> tuple[LoraLoad, ...]:
        """Who uses which, now."""
        if self.config is None:
            return ()
        counts = {adapter.name: [0, 0] for adapter in self._loaded.values()}
        for sequence in self._unfinished():
            if (adapter := sequence.request.adapter) is not None:
                counts.setdefault(adapter.name, [0, 0])[sequence.status == "waiting"] += 1
        return tuple(LoraLoad(name=name, num_running=r, num_waiting=w) for name, (r, w) in counts.items())

    def _unfinished(self) -> Iterator[Scheduled]:
        for loop in self._loops:
            yield from loop.scheduler.unfinished()

    def _check_room(self, field: str = "lora_name") -> LoraConfig:
        if self.config is None:
            raise RequestError(field, "this engine has no room for adapters: start it with max_loras")
        return self.config

    def _check_name(self, name: str) -> None:
        if not name or len(name) > MAX_NAME_LEN or not name.isprintable():
            raise RequestError("lora_name", f"{name!r:.80} is not 1 to {MAX_NAME_LEN} printable characters")
        if name in self._base_names:
            raise RequestError("lora_name", f"{name!r} is the base model's name")
        if name in self._loaded:
            raise RequestError("lora_name", f"{name!r:.200} is loaded already: unload it first")

    def _told(self) -> str:
        return f"loaded are: {', '.join(self._loaded)[:300]}" if self._loaded else "no adapter is"
