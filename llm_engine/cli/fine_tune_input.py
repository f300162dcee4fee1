"""`fine-tunes create`: a look at the files, their way to the gateway, and the request for a job.

The look spares the way of what no job takes. The judge is the job.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from llm_engine.cli import transfer
from llm_engine.cli.client import Gateway
from llm_engine.cli.endpoints import split_pair
from llm_engine.cli.fine_tune_watch import JOBS
from llm_engine.errors import LLMEngineError
from llm_engine.fine_tunes import data
from llm_engine.fine_tunes.plan import DPO, METHODS

FILE_ID = "file-"
PURPOSE = "fine-tune"
PROBLEMS_SHOWN = 5
#: Rows that are looked at here; how many there may be is the gateway's to say.
MOST_ROWS = 10**9
PIECE = 2**20
Row = dict[str, Any]


def create(
    gateway: Gateway, file: str, valid: str | None, method: str, numbers: Row, fields: Row
) -> Row:
    """`file`, `valid`: local ones, or ids of those that the gateway has; `fields`: the rest of
    the job's, without those that are not given."""
    if method not in METHODS:
        raise LLMEngineError(f"--method is {' or '.join(METHODS)}, not '{method}'.")
    if not _is_id(file):
        look(Path(file), method)
    if valid is not None and not _is_id(valid):
        look(Path(valid), method, "validation_file", fewest=1)
    files = {"training_file": _id_of(gateway, file)}
    if valid is not None:
        files["validation_file"] = _id_of(gateway, valid)
    body: Row = {**files, "method": {"type": method}}
    if numbers:
        body["method"][method] = {"hyperparameters": numbers}
    body |= {name: value for name, value in fields.items() if value is not None}
    try:
        return gateway.send("POST", f"/v1/{JOBS}", body)
    except LLMEngineError as error:
        if _is_id(file):
            raise
        again = f"`llm-engine fine-tunes create {files['training_file']}` needs no {file}."
        raise LLMEngineError(f"{error} The file is uploaded: {again}") from None


def numbers_of(method: str, named: Row, pairs: list[str]) -> Row:
    """Hyperparameters by name: those that have an option, and those of --set."""
    given = {name: value for name, value in named.items() if value is not None}
    for name, value in (split_pair(pair, "--set") for pair in pairs):
        if name in given:
            raise LLMEngineError(f"{name} is given twice.")
        given[name] = value
    if "beta" in given and method != DPO:
        raise LLMEngineError(f"--beta is for --method {DPO}.")
    return given


def look(
    path: Path, method: str, param: str = "training_file", fewest: int = data.FEWEST_EXAMPLES
) -> int:
    """How many examples it has. Raises LLMEngineError that names the first lines that are wrong."""
    try:
        with path.open("rb") as file:
            reader = data.read(
                _pieces(file), path.name, method, MOST_ROWS, param=param, fewest=fewest
            )
            for _ in reader:
                if reader.wrong > PROBLEMS_SHOWN:
                    break
    except FileNotFoundError:
        raise LLMEngineError(f"there is no file {path}, and it is no file's id.") from None
    except OSError as error:
        raise LLMEngineError(f"cannot read {path}: {error.strerror}.") from None
    if reader.wrong:
        shown = [str(problem) for problem in reader.problems[:PROBLEMS_SHOWN]]
        more = ["..."] if reader.wrong > len(shown) else []
        first = f"{path} cannot be trained on, and nothing was sent:"
        raise LLMEngineError("\n  ".join([first, *shown, *more]))
    problem = reader.verdict()
    if problem is not None:
        raise LLMEngineError(f"{path}: {problem.message}.")
    return reader.examples


def _is_id(file: str) -> bool:
    return file.startswith(FILE_ID) and not Path(file).exists()


def _id_of(gateway: Gateway, file: str) -> str:
    return file if _is_id(file) else transfer.upload(gateway, Path(file), PURPOSE)["id"]


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    while piece := file.read(PIECE):
        yield piece
