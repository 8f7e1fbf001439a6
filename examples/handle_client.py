"""The same requests without HTTP, over a Serve handle: `make serve`, then `python examples/handle_client.py`.

Run it on a machine of the cluster, with the cluster's versions of Python, Ray and Blaze.
"""

from __future__ import annotations

from pathlib import Path

import blaze
from blaze.errors import BlazeError

client = blaze.connect()

answer = client.generate("smollm2-135m", "What is the capital of France?", temperature=0, max_tokens=32)
print(answer.text, answer.usage)

for piece in client.stream("smollm2-135m", "Count from one to five.", seed=7, max_tokens=48):
    print(piece, end="", flush=True)
print()

image = client.images("digits", "a red seven on white", num_inference_steps=20, seed=1)[0]
Path("seven.png").write_bytes(image.data)
print(f"seven.png {image.width}x{image.height}, seed {image.seed}")

try:
    client.generate("no-such-model", "Hello")
except BlazeError as error:
    print(f"{error.http_status} {error.code}: {error.message}")
