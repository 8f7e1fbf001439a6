"""What the documentation shows is what the code accepts: examples parse, and every field is described."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from blaze.config import STRATEGIES, BlazeConfig, blaze_application, load_serve_config, parse_args

ROOT = Path(__file__).parents[2]
CONFIGURATION = ROOT / "docs" / "configuration.md"
WITH_EXAMPLES = (ROOT / "README.md", CONFIGURATION)


def yaml_examples(path: Path) -> list[dict[str, Any]]:
    """The fenced YAML blocks of a document that deploy models."""
    blocks = re.findall(r"^```yaml\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [yaml.safe_load(block) for block in blocks if "models:" in block]


def application_args(example: dict[str, Any]) -> dict[str, Any]:
    """An example is a whole Serve config, or the ``args`` of its application."""
    args: dict[str, Any] = blaze_application(example)["args"] if "applications" in example else example
    return args


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every settings class with the path that it has in the file: ``models[].llm``."""
    yield path, model
    for name, field in model.model_fields.items():
        is_list, nested = nested_settings(field.annotation)
        if nested is not None:
            yield from sections(nested, f"{path}.{name}".lstrip(".") + ("[]" if is_list else ""))


def nested_settings(annotation: Any) -> tuple[bool, type[BaseModel] | None]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return False, annotation
    for part in get_args(annotation):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return Ellipsis in get_args(annotation), part
    return False, None


def documented(path: str) -> dict[str, str]:
    """Field and default, as the table of that section gives them."""
    text = CONFIGURATION.read_text(encoding="utf-8")
    heading = f"### `{path}`" if path else "## Fields"
    section = re.split(r"^#", text.split(f"{heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]
    return dict(re.findall(r"^\| `(\w+)` \| ([^|]*?) \|", section, re.MULTILINE))


def expected_default(default: Any, factory: Any) -> str:
    if factory is not None:
        default = factory()
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, BaseModel):
        return "see below"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if default == ():
        return "`[]`"
    if isinstance(default, float) and default.is_integer():
        default = int(default)
    return f"`{'null' if default is None else default}`"


def test_the_default_config_is_valid() -> None:
    config = parse_args(blaze_application(load_serve_config(ROOT / "serve_config.yaml"))["args"])
    assert {model.engine.value for model in config.models} == {"llm", "diffusion"}


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: path.name)
def test_every_yaml_example_is_valid(path: Path) -> None:
    examples = yaml_examples(path)
    assert examples
    for example in examples:
        parse_args(application_args(example))


def test_the_readme_shows_every_kind_of_model() -> None:
    configs = [parse_args(application_args(example)) for example in yaml_examples(ROOT / "README.md")]
    assert {model.engine.value for config in configs for model in config.models} == {
        "llm",
        "diffusion",
        "simulator",
    }


@pytest.mark.parametrize(
    ("path", "model"), [pytest.param(*section, id=section[0] or "args") for section in sections(BlazeConfig)]
)
def test_every_field_is_documented_with_its_default(path: str, model: type[BaseModel]) -> None:
    assert documented(path) == {
        name: expected_default(field.default, field.default_factory)
        for name, field in model.model_fields.items()
    }


def test_the_strategies_that_exist_are_documented() -> None:
    row = next(
        line for line in CONFIGURATION.read_text(encoding="utf-8").splitlines() if "`strategy`" in line
    )
    assert all(f"`{name}`" in row for name in STRATEGIES)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_the_python_examples_compile(path: Path) -> None:
    ast.parse(path.read_text(encoding="utf-8"), filename=path.name)
