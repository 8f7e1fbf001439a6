"""transformers' ``generate`` as a worker: the prompts of a turn are one static batch."""

from __future__ import annotations

import os
import sys
import time

from benchmarks.worker import Line


def main(model_folder: str) -> None:
    line = Line()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(os.cpu_count() or 1)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None  # each answer has its full length
    line.send({"note": f"attention: {model.config._attn_implementation}"})
    for command in line.commands():
        started = time.perf_counter()
        prompts = torch.tensor(command["prompts"])  # all of one length: nothing is padded
        with torch.inference_mode():
            output = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=command["tokens"],
                do_sample=False,
                pad_token_id=0,
            )
        new = output[:, prompts.shape[1] :]
        tokenizer.batch_decode(new)
        line.send({"seconds": time.perf_counter() - started, "tokens": new.numel()})


if __name__ == "__main__":
    main(sys.argv[1])
