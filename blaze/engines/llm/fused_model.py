"""The Llama family as plain numbers: what a fused runner needs of a model, without transformers' modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_ROPES = ("default", "linear", "llama3", "yarn")  # those whose angles depend on the position alone

LinearT = TypeVar("LinearT")
MadeT_co = TypeVar("MadeT_co", covariant=True)


class LinearFormat(Protocol[MadeT_co]):
    """How weights are laid out, once, when a model is loaded. Weights are [out, in], biases [out]."""

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> MadeT_co: ...

    def gate_up(self, gate: torch.Tensor, up: torch.Tensor, bias: torch.Tensor | None) -> MadeT_co:
        """Both as one matrix; ``bias`` is that of gate, then that of up."""
        ...


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
class Layer(Generic[LinearT]):
    heads: Heads
    input_norm: torch.Tensor  # [hidden]
    qkv: LinearT
    output: LinearT
    mlp_norm: torch.Tensor
    gate_up: LinearT
    down: LinearT


@dataclass(frozen=True, slots=True)
class FusedModel(Generic[LinearT]):
    embedding: torch.Tensor  # [vocabulary, hidden]
    layers: tuple[Layer[LinearT], ...]
    final_norm: torch.Tensor
    head: LinearT
    eps: float
    cos: torch.Tensor  # float32 [positions, dim]
    sin: torch.Tensor
    tied: bool  # the head is the embedding


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


def fuse(model: PreTrainedModel, max_model_len: int, linears: LinearFormat[LinearT]) -> FusedModel[LinearT]:
    """Take the weights over from ``model``, which cannot be used afterwards: never is there a second copy."""
    config = model.config
    decoder = model.model
    cos, sin = _rotary(model, max_model_len)
    embedding, head = decoder.embed_tokens.weight.detach(), model.lm_head.weight.detach()
    layers = []
    for index, block in enumerate(decoder.layers):
        attention, mlp = block.self_attn, block.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        layers.append(
            Layer(
                heads=_heads(config, attention, index),
                input_norm=block.input_layernorm.weight.detach(),
                qkv=linears.linear(
                    torch.cat([_taken(module) for module in projections]), _bias(*projections)
                ),
                output=linears.linear(_taken(attention.o_proj), _bias(attention.o_proj)),
                mlp_norm=block.post_attention_layernorm.weight.detach(),
                gate_up=linears.gate_up(
                    _taken(mlp.gate_proj), _taken(mlp.up_proj), _bias(mlp.gate_proj, mlp.up_proj)
                ),
                down=linears.linear(_taken(mlp.down_proj), _bias(mlp.down_proj)),
            )
        )
    _taken(model.lm_head)
    _taken(decoder.embed_tokens)
    return FusedModel(
        embedding=embedding,
        layers=tuple(layers),
        final_norm=decoder.norm.weight.detach(),
        head=linears.linear(head, None),
        eps=config.rms_norm_eps,
        cos=cos,
        sin=sin,
        tied=embedding.data_ptr() == head.data_ptr(),
    )


def _taken(module: nn.Linear | nn.Embedding) -> torch.Tensor:
    """The module's weight, which it has no longer."""
    weight = module.weight.detach()
    module.weight = torch.nn.Parameter(weight.new_empty(0), requires_grad=False)
    return weight


def _bias(*modules: nn.Linear) -> torch.Tensor | None:
    biases = [module.bias.detach() for module in modules if module.bias is not None]
    return torch.cat(biases) if biases else None


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
