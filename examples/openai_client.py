"""Talk to a running Blaze with OpenAI's own client: `make serve`, then `python examples/openai_client.py`.

BLAZE_URL names another server than the one on port 8000. The client is `pip install openai`.
"""

from __future__ import annotations

import base64
import os
from pathlib import Path

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("BLAZE_URL", "http://127.0.0.1:8000") + "/v1",
    api_key="unused",  # this version has no keys, but the client insists on one
)

answer = client.chat.completions.create(
    model="smollm2-135m",
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    temperature=0,
    max_tokens=32,
)
print(answer.choices[0].message.content)

stream = client.chat.completions.create(
    model="smollm2-135m",
    messages=[{"role": "user", "content": "Count from one to five."}],
    seed=7,  # the same seed, the same draws
    max_tokens=48,
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

images = client.images.generate(
    model="digits",
    prompt="a red seven on white",
    extra_body={"num_inference_steps": 20, "guidance_scale": 5.0, "seed": 1},  # diffusers' names
)
assert images.data is not None
assert images.data[0].b64_json is not None
Path("seven.png").write_bytes(base64.b64decode(images.data[0].b64_json))
print("seven.png", images.size)
