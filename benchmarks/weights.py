"""A model of random weights, whose tokens cost what those of a real one of its size do.

    python -m benchmarks.weights FOLDER [--layers 8] [--hidden 1024]

A Llama with the demo model's tokenizer, about 100 million parameters as it is. What it says means
nothing; its layers are as wide and as many as is asked, so a step of the engine takes as long as
one of a trained model would. For `--model FOLDER` of the other benchmarks.
"""

import argparse
import shutil
from pathlib import Path

from llm_engine.config import BUILTIN

HEAD = 64
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write(folder: Path, layers: int, hidden: int) -> int:
    """How many parameters it has."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    demo = BUILTIN["chat"]
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(
        demo,
        hidden_size=hidden,
        intermediate_size=(8 * hidden // 3 + 63) // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // HEAD,
        num_key_value_heads=hidden // HEAD,
        head_dim=HEAD,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(demo / name, folder / name)
    return model.num_parameters()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024, help="a multiple of 64")
    options = parser.parse_args()
    if options.hidden % HEAD or options.hidden < HEAD or options.layers < 1:
        parser.error(f"--hidden must be a multiple of {HEAD}, and --layers at least 1")
    count = write(options.folder, options.layers, options.hidden)
    print(f"{options.folder}: {count / 1e6:.0f} million parameters")


if __name__ == "__main__":
    main()
