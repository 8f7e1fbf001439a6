from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from blaze.engines.diffusion.arguments import Arguments, Signature, join
from blaze.engines.diffusion.outputs import join_outputs, split, tensors_of


class Denoiser(nn.Module):
    def forward(  # noqa: PLR0917
        self,
        sample: Any,
        timestep: Any,
        encoder_hidden_states: Any = None,
        img_ids: Any = None,
        guidance: Any = None,
        added_cond_kwargs: Any = None,
        layers: Any = None,
        scale: float = 1.0,
        return_dict: bool = True,
    ) -> None: ...


SIGNATURE = Signature.of(Denoiser())
assert SIGNATURE is not None


def read(rows: int = 1, **given: Any) -> Arguments:
    """Of a call with so many rows, each of them its own number."""
    assert SIGNATURE is not None
    sample = given.pop("sample", torch.arange(rows).float().view(-1, 1, 1, 1).expand(-1, 2, 4, 4))
    arguments = Arguments.read(SIGNATURE, (sample, given.pop("timestep", torch.tensor(7))), given)
    assert arguments is not None
    return arguments


def rows_of(joined: dict[str, object], name: str) -> list[float]:
    value = joined[name]
    assert isinstance(value, Tensor)
    return [float(row.flatten()[0]) for row in value]


# --- What goes together --------------------------------------------------------------------------------


def test_rows_are_joined_in_order_whatever_their_number() -> None:
    parts = [read(rows) for rows in (1, 2, 3)]
    assert all(part.goes_with(parts[0]) for part in parts)
    joined = join(parts)
    assert rows_of(joined, "sample") == [0, 0, 1, 0, 1, 2]
    assert rows_of(joined, "timestep") == [7] * 6


@pytest.mark.parametrize(
    "timestep", [torch.tensor(7), torch.tensor([7]), torch.tensor([7, 7]), 7, 7.0, torch.tensor(7.0)]
)
def test_timesteps_become_one_per_row_however_they_are_given(timestep: object) -> None:
    one = read(2, timestep=timestep)
    other = read(1, timestep=torch.tensor(3))
    assert one.goes_with(other)
    joined = join([one, other])
    assert rows_of(joined, "timestep") == [7, 7, 3]


def test_timesteps_of_whole_numbers_and_fractions_mix_without_rounding() -> None:
    joined = join([read(timestep=torch.tensor(999)), read(timestep=torch.tensor(998.5))])
    assert rows_of(joined, "timestep") == [999, 998.5]


def test_timesteps_of_16_bits_do_not_mix_with_others() -> None:
    assert not read(timestep=torch.tensor([0.5], dtype=torch.bfloat16)).goes_with(read())


def test_guidance_is_per_row_too() -> None:
    joined = join([read(2, guidance=torch.tensor([3.5])), read(1, guidance=torch.tensor([1.0]))])
    assert rows_of(joined, "guidance") == [3.5, 3.5, 1.0]


@pytest.mark.parametrize(
    "other",
    [
        {"sample": torch.zeros(1, 2, 8, 8)},
        {"sample": torch.zeros(1, 2, 4, 4, dtype=torch.float64)},
        {"encoder_hidden_states": torch.zeros(1, 5, 8)},
        {"encoder_hidden_states": torch.zeros(1, 3, 8, dtype=torch.bfloat16)},
        {"encoder_hidden_states": None},
        {"added_cond_kwargs": {"time_ids": torch.zeros(1, 6)}},
        {"added_cond_kwargs": {"text_embeds": torch.zeros(1, 5), "time_ids": torch.zeros(1, 6)}},
        {"added_cond_kwargs": None},
        {"scale": 0.5},
        {"scale": 1},
        {"return_dict": False},
        {"layers": (1, 2)},
        {"guidance": torch.tensor([1.0])},
    ],
)
def test_what_differs_in_anything_but_rows_does_not_go_together(other: dict[str, Any]) -> None:
    usual = {
        "encoder_hidden_states": torch.zeros(1, 3, 8),
        "added_cond_kwargs": {"text_embeds": torch.zeros(1, 4), "time_ids": torch.zeros(1, 6)},
    }
    assert read(**usual).goes_with(read(**usual))
    assert not read(**usual).goes_with(read(**(usual | other)))


def test_what_is_left_out_is_its_default() -> None:
    assert read().goes_with(read(scale=1.0, return_dict=True, encoder_hidden_states=None))


def test_nested_arguments_are_joined_in_their_places() -> None:
    def nested(rows: int, value: float) -> Arguments:
        tensors = [torch.full((rows, 2), value), torch.full((rows, 3), value)]
        return read(rows, added_cond_kwargs={"time_ids": tensors[0], "more": (tensors[1], None)})

    joined = join([nested(1, 5.0), nested(2, 6.0)])["added_cond_kwargs"]
    assert isinstance(joined, dict)
    assert joined["time_ids"].tolist() == [[5.0] * 2, [6.0] * 2, [6.0] * 2]
    assert joined["more"][0].tolist() == [[5.0] * 3, [6.0] * 3, [6.0] * 3]
    assert joined["more"][1] is None


@pytest.mark.parametrize("length", [2, 5])
def test_positions_are_shared_and_must_be_equal_however_many_there_are(length: int) -> None:
    """Two rows and two positions: the positions are no rows."""
    positions = torch.arange(length * 3).view(length, 3)
    one, same = read(2, img_ids=positions), read(2, img_ids=positions.clone())
    assert one.goes_with(same)
    joined = join([one, same])["img_ids"]
    assert isinstance(joined, Tensor)
    assert torch.equal(joined, positions)
    assert not one.goes_with(read(2, img_ids=positions + 1))


def test_batched_positions_are_rows() -> None:
    joined = join([read(2, img_ids=torch.zeros(2, 5, 3)), read(1, img_ids=torch.ones(1, 5, 3))])
    assert rows_of(joined, "img_ids") == [0, 0, 1]


def test_lists_with_an_entry_per_row_are_joined_and_lists_of_layers_are_not() -> None:
    shapes = [[(1, 8, 8)], [(1, 8, 8)]]
    assert join([read(2, layers=shapes), read(1, layers=shapes[:1])])["layers"] == [[(1, 8, 8)]] * 3
    layers = [torch.zeros(2, 4), torch.ones(2, 4)]  # two layers, each with both rows
    joined = join([read(2, layers=layers), read(2, layers=layers)])["layers"]
    assert isinstance(joined, list)
    assert [tuple(layer.shape) for layer in joined] == [(4, 4), (4, 4)]


def test_samples_in_a_list_may_differ_in_size() -> None:
    one = read(sample=[torch.zeros(4, 2, 2), torch.zeros(4, 3, 3)], timestep=torch.tensor([1, 2]))
    other = read(sample=[torch.zeros(4, 5, 5)], timestep=torch.tensor([3]))
    assert (one.rows, other.rows) == (2, 1)
    assert one.goes_with(other)
    joined = join([one, other])
    assert isinstance(joined["sample"], list)
    assert [len(sample[0]) for sample in joined["sample"]] == [2, 3, 5]


def test_an_object_goes_with_itself_only() -> None:
    cache = object()
    assert read(layers=cache).goes_with(read(layers=cache))
    assert not read(layers=cache).goes_with(read(layers=object()))


def test_pieces_of_a_call_put_together_are_the_call() -> None:
    whole = read(5, encoder_hidden_states=torch.rand(5, 3, 8), guidance=torch.arange(5).float())
    again = join([whole.cut(0, 2), whole.cut(2, 4), whole.cut(4, 5)])
    for name, value in join([whole]).items():
        if isinstance(value, Tensor):
            assert torch.equal(value, again[name]), name  # type: ignore[arg-type]
        else:
            assert value == again[name]


def test_calls_without_rows_or_with_a_hidden_signature_are_not_read() -> None:
    class Hidden(nn.Module):
        def forward(self, *args: Any) -> None: ...

    assert Signature.of(Hidden()) is None
    assert SIGNATURE is not None
    assert Arguments.read(SIGNATURE, (None, torch.tensor(1)), {}) is None
    assert Arguments.read(SIGNATURE, (), {}) is None


# --- Outputs -------------------------------------------------------------------------------------------


def test_outputs_are_split_as_they_would_have_been_returned() -> None:
    rows = torch.arange(6).view(6, 1)
    first, second = split((rows, None), [2, 4])
    assert isinstance(first, tuple)
    assert (first[0].tolist(), first[1]) == ([[0], [1]], None)
    assert isinstance(second, tuple)
    assert second[0].tolist() == [[2], [3], [4], [5]]
    parts = split(UNet2DConditionOutput(sample=rows), [1, 5])
    assert all(isinstance(part, UNet2DConditionOutput) for part in parts)
    assert [len(part.sample) for part in parts if isinstance(part, UNet2DConditionOutput)] == [1, 5]
    assert split(rows, [3, 3])[1].tolist() == [[3], [4], [5]]  # type: ignore[attr-defined]
    assert split([*"abcdef"], [2, 3, 1]) == [["a", "b"], ["c", "d", "e"], ["f"]]


@pytest.mark.parametrize("output", [torch.zeros(5), torch.tensor(1.0), "text", (torch.zeros(5),), ()])
def test_outputs_without_rows_are_an_error(output: object) -> None:
    with pytest.raises(TypeError):
        split(output, [2, 4])


@pytest.mark.parametrize(
    "make",
    [
        lambda rows: rows,
        lambda rows: (rows, None),
        lambda rows: UNet2DConditionOutput(sample=rows),
        lambda rows: [*rows],
    ],
)
def test_outputs_of_pieces_become_one_again(make: Any) -> None:
    rows = torch.rand(6, 2)
    whole = make(rows)
    again = join_outputs(split(whole, [1, 2, 3]))
    assert type(again) is type(whole)
    assert all(
        torch.equal(one, other) for one, other in zip(tensors_of(whole), tensors_of(again), strict=True)
    )
