"""What the benchmarks share: the machine, the recording, transformers' model as a peer."""

import argparse
import datetime
import json
import os
import platform
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "benchmarks"
PROMPT = (
    "It was a quiet morning in the city when the first tram of the day came round the corner, and"
)
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def now():
    "The date and time, as records have it."
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def load():
    "The load average."
    return [round(x, 2) for x in os.getloadavg()]


def processor():
    "The processor's name, as the system gives it."
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine():
    "What the figures were measured on."
    import torch
    import transformers

    return {
        "date": now(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write(
    path,  # Where to
    result,  # What JSON can hold
):
    "Write a record whole, or not at all."
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def save(
    path,  # Where to
    **results,  # What was found, by name
):
    "Record results, with the machine."
    write(path, {"machine": machine(), **results})
    print(f"recorded in {path}")


def arguments(
    what,  # The benchmark's docstring
    record,  # The file of its record in benchmarks/
    usual,  # Name -> count, for a record
    quick,  # Name -> count, for a look
):
    "The command line of a benchmark: --quick, --threads, --out, and each count by its name."
    import torch

    parser = argparse.ArgumentParser(description=what.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a short look, nothing recorded")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / record)
    for name, count in usual.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    args = parser.parse_args()
    if args.quick:
        vars(args).update(quick)
    os.environ["TQDM_DISABLE"] = "1"  # no progress bar inside a measurement
    torch.set_num_threads(args.threads)
    return args


def reference_weights(path):
    "The file's weights as the package `gguf` reads them, and the metadata."
    import gguf
    import torch

    reader = gguf.GGUFReader(str(path))
    weights = {
        t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy())
        for t in reader.tensors
    }
    return weights, {name: field.contents() for name, field in reader.fields.items()}


def transformers_peer(weights, dtype=None):
    """A transformers Llama with these weights. It pairs number i of a head with i + 32, the file
    with i + 1."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    state = {
        "model.embed_tokens.weight": weights["token_embd.weight"],
        "lm_head.weight": weights["token_embd.weight"],
        "model.norm.weight": weights["output_norm.weight"],
    }
    for i in range(30):
        for ours, theirs in LAYER.items():
            w = weights[f"blk.{i}.{ours}.weight"]
            if ours in ("attn_q", "attn_k"):
                heads = 9 if ours == "attn_q" else 3
                w = w.reshape(heads, -1, 2, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)
            state[f"model.layers.{i}.{theirs}.weight"] = w
    model.load_state_dict(state)
    model.generation_config.eos_token_id = None
    return model.to(dtype or torch.float32).eval()
