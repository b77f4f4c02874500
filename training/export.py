"""Writes a training run as a checkpoint folder in fp16, with the classic Mixtral names of the weights.

python -m training.export --run training/runs/demo --out mixtral_offload/demo/fp16
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig, MixtralForCausalLM

from training import tokenizer
from training.model import make_config


def export(run: Path, out: Path, name="final.pt"):
    tok = tokenizer.load(run / "tokenizer")
    model = MixtralForCausalLM(make_config(tok))
    saved = torch.load(run / name, weights_only=True, mmap=True)
    model.load_state_dict(saved["model"])
    ids = {
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id,
    }
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    shutil.rmtree(out, ignore_errors=True)
    model.to(torch.float16).save_pretrained(out)
    tok.save_pretrained(out)
    tidy(out)
    for path in out.iterdir():
        path.chmod(0o644)
    print(out, saved["state"])


def tidy(out: Path):
    """Make tokenizer_config.json and the rope base readable for older and newer versions."""
    template = out / "chat_template.jinja"
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for name in ("backend", "is_local", "local_files_only"):
        settings.pop(name, None)
    settings["additional_special_tokens"] = settings.pop("extra_special_tokens", [])
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": template.read_text(encoding="utf-8"),
    }
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    template.unlink()
    path = out / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["rope_theta"] = settings["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("training/runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("mixtral_offload/demo/fp16"))
    parser.add_argument("--checkpoint", default="final.pt")
    args = parser.parse_args()
    export(args.run, args.out, args.checkpoint)


if __name__ == "__main__":
    main()
