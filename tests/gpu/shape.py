"""A checkpoint of random weights in the shape of a known model, as a Hugging Face folder in bf16."""

import json
import pathlib
import shutil

COMMON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "eos_token_id": 2, "pad_token_id": 3, "bos_token_id": None,
}
SHAPES = {
    "llama3-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
                  "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0},
    # Of the fixtures' vocabulary, so that what it says is text.
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                     "head_dim": 64, "vocab_size": 288, "max_position_embeddings": 8192, "rope_theta": 100000.0},
    # To try the script without a GPU.
    "tiny": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 32, "vocab_size": 512, "max_position_embeddings": 4096, "rope_theta": 500000.0},
}
LAYERS_PER_FILE = 8


def layer_shapes(config):
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    return {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }


def size(config):
    """Bytes of all weights, and of those that decoding one token reads: of the embedding it reads a row."""
    product = lambda shape: shape[0] * (shape[1] if len(shape) > 1 else 1)
    layers = config["num_hidden_layers"] * sum(product(shape) for shape in layer_shapes(config).values())
    table = config["vocab_size"] * config["hidden_size"]
    return 2 * (layers + 2 * table + config["hidden_size"]), 2 * (layers + table)


def write(name, folder, tokenizer, device):
    """Writes the checkpoint with the tokenizer files of another folder; gives its configuration."""
    import torch
    from safetensors.torch import save_file

    config = COMMON | SHAPES[name]
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / file, folder / file)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    torch.manual_seed(0)

    def random(shape):
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return (torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02).cpu()

    table = (config["vocab_size"], config["hidden_size"])
    ends = {"model.embed_tokens": table, "lm_head": table, "model.norm": (config["hidden_size"],)}
    layers = range(config["num_hidden_layers"])
    files = [ends] + [
        {f"model.layers.{layer}.{site}": shape for layer in layers[first : first + LAYERS_PER_FILE] for site, shape in layer_shapes(config).items()}
        for first in layers[::LAYERS_PER_FILE]
    ]
    places = {}
    for number, shapes in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        save_file({f"{tensor}.weight": random(shape) for tensor, shape in shapes.items()}, folder / file, metadata={"format": "pt"})
        places |= {f"{tensor}.weight": file for tensor in shapes}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return config
