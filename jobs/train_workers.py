"""Several processes that train one adapter together, by Ray Train; spoken to like the one trainer.

`python -m jobs.train_workers` takes a spec and tells events as `llm_engine.fine_tunes.trainer` does
(see there); the job cannot tell them apart. Workers may run on any node: what they read and write
lies on this one, and goes through the `Desk`, unless they see the same folders. A worker that dies
ends all of it, and the next job goes on from the last checkpoint: there is no second way to resume.
"""

import asyncio
import ctypes
import json
import os
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llm_engine.fine_tunes.workplace import workplace

MARK = "desk"  # a file that tells whether a worker sees this node's folders
PIECE = 8 * 2**20  # bytes
#: How often the job hears that workers are waited for.
WAITING_S = 10.0
_MOST_UNHEARD = 100  # events; a worker waits until one has been told
_LOOK_S = 0.5
_PR_SET_PDEATHSIG = 1


@ray.remote(num_cpus=0, max_concurrency=100)
class Desk:
    """On the job's node: takes the workers' events, and serves the folder that the job works in."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue(_MOST_UNHEARD)
        self._stopping = False

    async def tell(self, event: dict[str, Any]) -> None:
        await self._events.put(event)

    async def take(self) -> dict[str, Any] | None:
        """The next event; None where none comes for a while."""
        try:
            return await asyncio.wait_for(self._events.get(), _LOOK_S)
        except TimeoutError:
            return None

    async def stop(self) -> None:
        self._stopping = True

    async def is_stopping(self) -> bool:
        return self._stopping

    async def names(self, path: str) -> list[str]:
        """Of the files in a folder; a file is one without a name."""
        return names_in(self._within(path))

    async def read(self, path: str, start: int) -> bytes:
        with self._within(path).open("rb") as file:
            file.seek(start)
            return file.read(PIECE)

    async def append(self, path: str, data: bytes) -> None:
        target = self._within(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab") as file:
            file.write(data)

    async def rename(self, path: str, to: str) -> None:
        target = self._within(to)
        shutil.rmtree(target, ignore_errors=True)
        self._within(path).rename(target)

    def _within(self, path: str) -> Path:
        found = (self._folder / path).resolve()
        if not found.is_relative_to(self._folder.resolve()):
            raise ValueError(f"{path} does not lie where the job works")
        return found


# -- in a worker


class Stopping:
    """Whether the job wants a checkpoint and an end; looked up beside the training."""

    def __init__(self, desk: Any) -> None:
        self._desk = desk
        self._seen = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def is_set(self) -> bool:
        return self._seen.is_set()

    def _watch(self) -> None:
        while not self._seen.is_set():
            if ray.get(self._desk.is_stopping.remote()):
                self._seen.set()
            time.sleep(_LOOK_S)


class Elsewhere:
    """A worker's own folder, where it does not see the job's."""

    def __init__(self, desk: Any, home: Path, here: Path) -> None:
        """`home`: where the job works, on its node; `here`: where this worker does."""
        self._desk = desk
        self._home = home
        self._here = here
        self._sent: set[str] = set()

    def bring(self, path: str) -> str:
        """What the job has there, with everything in it, on this node."""
        within = Path(path).relative_to(self._home)
        target = self._here / within
        for name in ray.get(self._desk.names.remote(str(within))):
            file = target / name if name else target
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as written:
                for piece in self._pieces(str(within / name) if name else str(within)):
                    written.write(piece)
        return str(target)

    def out(self, path: str) -> str:
        target = self._here / Path(path).relative_to(self._home)
        target.mkdir(parents=True, exist_ok=True)
        return str(target)

    def send(self, path: str) -> str:
        """A folder of this node's, to where the job looks for it; all of it at once. One that two
        events tell of goes there once."""
        within = Path(path).relative_to(self._here)
        if path in self._sent and not Path(path).exists():
            return str(self._home / within)
        unfinished = f"{within}.{secrets.token_hex(4)}"
        for name in names_in(Path(path)):
            with (Path(path) / name).open("rb") as file:
                while True:
                    piece = file.read(PIECE)
                    ray.get(self._desk.append.remote(f"{unfinished}/{name}", piece))
                    if len(piece) < PIECE:
                        break
        ray.get(self._desk.rename.remote(unfinished, str(within)))
        shutil.rmtree(path, ignore_errors=True)
        self._sent.add(path)
        return str(self._home / within)

    def _pieces(self, path: str) -> Iterator[bytes]:
        start = 0
        while piece := ray.get(self._desk.read.remote(path, start)):
            yield piece
            start += len(piece)


def work(given: dict[str, Any]) -> None:
    """What each worker does."""
    from llm_engine.fine_tunes.trainer import train

    desk, home, spec = given["desk"], Path(given["home"]), given["spec"]

    def tell(event: dict[str, Any]) -> None:
        ray.get(desk.tell.remote(event))

    if _sees(home, given["mark"]):
        return train(spec, tell, Stopping(desk))
    with workplace("worker") as here:
        elsewhere = Elsewhere(desk, home, here)
        inputs = ("train", "valid", "parent", "resume")
        spec = spec | {name: elsewhere.bring(spec[name]) for name in inputs if spec[name]}
        spec["out"] = elsewhere.out(spec["out"])

        def send_and_tell(event: dict[str, Any]) -> None:
            sent = {"path": elsewhere.send(event["path"])} if event.get("path") else {}
            tell(event | sent)

        train(spec, send_and_tell, Stopping(desk))


def _sees(home: Path, mark: str) -> bool:
    try:
        return (home / MARK).read_text() == mark
    except OSError:
        return False


def names_in(path: Path) -> list[str]:
    if path.is_file():
        return [""]
    files = (each for each in path.rglob("*") if each.is_file())
    return sorted(each.relative_to(path).as_posix() for each in files)


# -- in the process that the job has started


class Driver:
    def __init__(self, spec: dict[str, Any], answers: Any) -> None:
        self._spec = spec
        self._answers = answers
        self._home = Path(spec["out"]).parent
        self._over = threading.Event()
        self._heard = self._ended = False  # an event; one that told the end

    def run(self) -> None:
        """Raises what Ray Train does where a worker dies."""
        ray.init(address="auto", log_to_driver=True, logging_level="warning")
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        desk = Desk.options(scheduling_strategy=here).remote(str(self._home))
        mark = secrets.token_hex(16)
        (self._home / MARK).write_text(mark)
        signal.signal(signal.SIGTERM, lambda *_: self._stop(desk))
        passing_on = threading.Thread(target=self._pass_on, args=(desk,))
        passing_on.start()
        try:
            self._train({"desk": desk, "home": str(self._home), "mark": mark, "spec": self._spec})
        finally:
            self._over.set()
            passing_on.join()
        if not self._ended:
            raise RuntimeError("the workers ended without a word")

    def _train(self, given: dict[str, Any]) -> None:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        spec = self._spec
        resources = {"CPU": spec["cpus"]} | ({"GPU": spec["gpus"]} if spec["gpus"] else {})
        trainer = TorchTrainer(
            work,
            train_loop_config=given,
            torch_config=TorchConfig(backend="nccl" if spec["gpus"] else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=spec["workers"],
                use_gpu=bool(spec["gpus"]),
                resources_per_worker=resources,
            ),
            # It keeps nothing that anybody reads: checkpoints are events.
            run_config=RunConfig(name="train", storage_path=str(self._home / "ray")),
        )
        trainer.fit()

    def _pass_on(self, desk: Any) -> None:
        """Until there is nothing left, once it is over."""
        waits_until = time.monotonic() + WAITING_S
        while True:
            over = self._over.is_set()
            event = ray.get(desk.take.remote())
            if event is not None:
                self._heard = True
                self._ended = event["event"] in ("done", "stopped", "failed")
                self._tell(event)
            elif over:
                return
            elif not self._heard and time.monotonic() > waits_until:
                waits_until = time.monotonic() + WAITING_S
                self._tell({"event": "waiting", "reason": self._what_for()})

    def _stop(self, desk: Any) -> None:
        desk.stop.remote()
        if not self._heard:  # no worker does
            self._tell({"event": "stopped", "step": 0, "path": None})
            os._exit(0)

    def _what_for(self) -> str:
        spec = self._spec
        each = f"{spec['cpus']:g} CPUs" + (f" and {spec['gpus']:g} GPUs" if spec["gpus"] else "")
        return f"it waits for {spec['workers']} workers of {each} (fine_tunes.workers)"

    def _tell(self, event: dict[str, Any]) -> None:
        self._answers.write(json.dumps(event) + "\n")
        self._answers.flush()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Ray and libraries print
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    line = sys.stdin.readline()
    threading.Thread(target=_die_with_the_job, daemon=True).start()
    Driver(json.loads(line), answers).run()


def _die_with_the_job() -> None:
    """Its workers are Ray's, and die with this process."""
    while os.read(0, 4096):  # not by sys.stdin, which is locked while it waits: at the exit, too
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
