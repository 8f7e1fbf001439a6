"""The Llama family in a few fused operations per layer, instead of transformers' modules.

Same weights, same numbers (checked against the stock model when it is loaded), less in between: QKV is one
matrix, gate and up are one, weights lie the way the processor wants them, and all tokens of a step - decodes
and prompt chunks of any sequences - go through each matrix together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F

from blaze.engines.llm.kv_store import KVStore, LayerShape
from blaze.engines.llm.linear import Linear, make_linear, needs_two_rows
from blaze.engines.llm.runner import StepResult
from blaze.engines.llm.scheduler import Step
from blaze.engines.llm.step_rows import StepRows

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_ROPES = ("default", "linear", "llama3", "yarn")  # those whose angles depend on the position alone


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention of one layer."""

    queries: int
    keys: int  # heads of keys and values
    dim: int
    scale: float
    window: int | None  # tokens that one sees, itself counted
    q_norm: torch.Tensor | None  # [dim]
    k_norm: torch.Tensor | None
    eps: float


@dataclass(frozen=True, slots=True)
class Layer:
    heads: Heads
    input_norm: torch.Tensor  # [hidden]
    qkv: Linear
    output: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class FusedModel:
    embedding: torch.Tensor  # [vocabulary, hidden]
    layers: tuple[Layer, ...]
    final_norm: torch.Tensor
    head: Linear
    eps: float
    cos: torch.Tensor  # float32 [positions, dim]
    sin: torch.Tensor
    two_rows: bool  # a row that is alone takes another way through some kernel

    @property
    def shapes(self) -> tuple[LayerShape, ...]:
        return tuple(LayerShape(layer.heads.keys, layer.heads.dim, layer.heads.dim) for layer in self.layers)


class LayerOperations(Protocol):
    """What lies between the matrices, and the keys and values of the step."""

    @property
    def name(self) -> str: ...

    def begin(self, rows: StepRows) -> None: ...

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root mean square norm of each row."""
        ...

    def attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """Rotate, keep keys and values, attend: [rows, (queries + 2 keys) * dim] -> [rows, queries * dim]."""
        ...

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[rows, gate + up] -> silu(gate) * up."""
        ...


class FusedRunner:
    def __init__(self, model: FusedModel, store: KVStore, operations: LayerOperations) -> None:
        self._model = model
        self._operations = operations
        self.store = store

    @property
    def name(self) -> str:
        return f"fused, {self._operations.name}"

    @torch.inference_mode()
    def execute(self, step: Step) -> StepResult:
        self.store.copy(step.copies)
        model, operations = self._model, self._operations
        rows = StepRows.of(step, model.embedding.device)
        operations.begin(rows)
        x = F.embedding(rows.ids, model.embedding)
        if model.two_rows and x.shape[0] == 1:
            x = x.expand(2, -1).contiguous()
        for index, layer in enumerate(model.layers):
            h = operations.norm(x, layer.input_norm, model.eps)
            x = layer.output.plus(operations.attend(index, layer.qkv(h)), x)
            h = operations.norm(x, layer.mlp_norm, model.eps)
            x = layer.down.plus(operations.silu_mul(layer.gate_up(h)), x)
        return rows.result(step, self._logits(x, rows.logit_rows))

    def _logits(self, x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        x = x[wanted]
        count = x.shape[0]
        if self._model.two_rows and count == 1:
            x = x.expand(2, -1)
        return self._model.head(
            self._operations.norm(x.contiguous(), self._model.final_norm, self._model.eps)
        )[:count]


def why_not_fused(model: PreTrainedModel) -> str | None:
    """None when :func:`fuse` serves this model."""
    config = model.config
    if type(model).__name__ not in FAMILY:
        return f"{type(model).__name__} is not one of {', '.join(FAMILY)}"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _ROPES:
        return f"its rotary embedding is {rope}"
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return "it has layers of another kind than attention"
    return None


def fuse(model: PreTrainedModel, max_model_len: int, *, int8: bool) -> FusedModel:
    """Take the weights over from ``model``, which cannot be used afterwards: never is there a second copy."""
    config = model.config
    decoder = model.model
    shapes: dict[tuple[int, ...], torch.Tensor] = {}

    def linear(*modules: nn.Linear) -> Linear:
        weight = torch.cat([module.weight.detach() for module in modules])
        biases = [module.bias.detach() for module in modules if module.bias is not None]
        shapes.setdefault(tuple(weight.shape), weight)
        made = make_linear(weight, torch.cat(biases) if biases else None, int8=int8)
        for module in modules:
            module.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)
        return made

    cos, sin = _rotary(model, max_model_len)
    embedding = decoder.embed_tokens.weight.detach()
    head = make_linear(model.lm_head.weight.detach(), None, int8=int8)
    shapes[tuple(embedding.shape)] = model.lm_head.weight.detach()
    layers = []
    for index, block in enumerate(decoder.layers):
        attention, mlp = block.self_attn, block.mlp
        layers.append(
            Layer(
                heads=_heads(config, attention, index),
                input_norm=block.input_layernorm.weight.detach(),
                qkv=linear(attention.q_proj, attention.k_proj, attention.v_proj),
                output=linear(attention.o_proj),
                mlp_norm=block.post_attention_layernorm.weight.detach(),
                gate_up=linear(mlp.gate_proj, mlp.up_proj),
                down=linear(mlp.down_proj),
            )
        )
    return FusedModel(
        embedding=embedding,
        layers=tuple(layers),
        final_norm=decoder.norm.weight.detach(),
        head=head,
        eps=config.rms_norm_eps,
        cos=cos,
        sin=sin,
        two_rows=not int8 and any(needs_two_rows(weight) for weight in shapes.values()),
    )


def _heads(config: PretrainedConfig, attention: Any, index: int) -> Heads:
    """``attention``: the layer's module; its attributes have no types that could be named."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is not None and kinds[index] != "sliding_attention":
        window = None
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    q_norm, k_norm = (None if norm is None else norm.weight.detach() for norm in norms)
    return Heads(
        queries=config.num_attention_heads,
        keys=config.num_key_value_heads,
        dim=attention.head_dim,
        scale=attention.scaling,
        window=window,
        q_norm=q_norm,
        k_norm=k_norm,
        eps=config.rms_norm_eps,
    )


@torch.inference_mode()
def _rotary(model: PreTrainedModel, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own angles, [positions, dim], in float32 whatever its dtype."""
    device = model.lm_head.weight.device
    at = torch.arange(positions, device=device).unsqueeze(0)
    cos, sin = model.model.rotary_emb(torch.zeros(1, dtype=torch.float32, device=device), at)
    return cos[0].float().contiguous(), sin[0].float().contiguous()
