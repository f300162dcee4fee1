"""vLLM's offline `LLM.generate` over the rows of a file, in a process of its own.

Run as `python -m benchmarks.offline`: the first line of stdin is JSON with the engine's arguments,
each further one the path of a JSONL file of completions requests. Answers: tokens and seconds.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # vLLM prints to stdout, too
    os.dup2(2, 1)
    args = json.loads(sys.stdin.readline())

    from vllm import LLM

    llm = LLM(**args)
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(generate(llm, Path(line.strip()))), file=answers, flush=True)


def generate(llm: Any, path: Path) -> dict[str, float]:
    from vllm import SamplingParams

    bodies = [json.loads(line)["body"] for line in path.read_text().splitlines()]
    prompts = [body["prompt"] for body in bodies]
    sampling = [
        SamplingParams(
            max_tokens=body["max_tokens"],
            temperature=body["temperature"],
            ignore_eos=body["ignore_eos"],
        )
        for body in bodies
    ]
    began = time.perf_counter()
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - began
    return {"tokens": sum(len(o.outputs[0].token_ids) for o in outputs), "seconds": seconds}


if __name__ == "__main__":
    main()
