"""Adapters of the demo chat model with weights of chance, as PEFT writes them: no training, but an
effect that shows."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from llm_engine.config import BUILTIN

WEIGHTS = "builtin:chat"


def make(folder: Path, seed: int, rank: int = 8, strength: float = 2.0) -> Path:
    """Two seeds make two adapters that answer differently."""
    config = json.loads((BUILTIN["chat"] / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries = config["num_attention_heads"] * head
    keys = config["num_key_value_heads"] * head
    modules = {
        "self_attn.q_proj": (hidden, queries), "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys), "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }  # fmt: skip
    chance = np.random.default_rng(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (into, out) in modules.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            a = chance.normal(0, into**-0.5, (rank, into))
            b = chance.normal(0, strength * rank**-0.5, (out, rank))
            tensors[f"{path}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"{path}.lora_B.weight"] = b.astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    told = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": WEIGHTS,
        "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none",
        "target_modules": [name.rpartition(".")[2] for name in modules],
        "inference_mode": True, "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
        "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(told))
    return folder
