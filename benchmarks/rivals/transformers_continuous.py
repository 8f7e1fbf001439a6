"""transformers' continuous batching as a worker.

On a CPU it has no flash attention; "sdpa" is its own choice there: paged keys and values are gathered, and
the sequences of a step attend as one, under a mask.
"""

from __future__ import annotations

import os
import sys
import time

from benchmarks.worker import Line

_PAGE = 256  # tokens; its default


def main(model_folder: str, max_batch: int, kv_bytes: int) -> None:
    line = Line()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

    torch.set_num_threads(os.cpu_count() or 1)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).eval()
    text = model.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    page_bytes = 2 * text.num_hidden_layers * text.num_key_value_heads * head * 2 * _PAGE
    with torch.inference_mode():
        manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            # Left alone, it takes 60% of the machine's memory, and as many requests as its first batch has.
            ContinuousBatchingConfig(
                page_size=_PAGE,
                num_blocks=kv_bytes // page_bytes,
                max_batch_tokens=512,
                max_requests_per_batch=max_batch,
                allow_block_sharing=False,
            ),
        )
        manager.start()

    def generate(prompts: list[list[int]], count: int) -> int:
        manager.add_requests(prompts, max_new_tokens=count)
        tokens = answers = 0
        while answers < len(prompts):
            result = manager.get_result(timeout=1)
            if result is None and not manager.is_running():
                raise RuntimeError("its generation thread has ended")
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(result.error)
                tokenizer.decode(result.generated_tokens)
                answers += 1
                tokens += len(result.generated_tokens)
        return tokens

    generate([[1]], 1)  # its thread makes its memory with the first
    line.send({"note": f"attention: {model.config._attn_implementation}"})
    for command in line.commands():
        started = time.perf_counter()
        tokens = generate(command["prompts"], command["tokens"])
        line.send({"seconds": time.perf_counter() - started, "tokens": tokens})
    manager.stop(block=True, timeout=5)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
