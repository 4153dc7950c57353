"""An adapter's folder damaged in every way is refused in a sentence that names the file."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import fastbound
from fastbound.errors import InputError
from fastbound.unlearning.model import load_adapter
from tests.support.models import stir

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
KEY = "base_model.model.up.fastbound_ab"


def network() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)})


def state(model: nn.Module) -> list[Any]:
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    numbers = [(n, p.requires_grad, p.tolist()) for n, p in model.named_parameters()]
    return [*kinds, *numbers]


def config_with(**fields: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        for name, value in fields.items():
            config[name] = value(config[name]) if callable(value) else value
        (folder / CONFIG).write_text(json.dumps(config))

    return damage


def config_without(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        del config[name]
        (folder / CONFIG).write_text(json.dumps(config))

    return damage


def text(content: str | bytes) -> Callable[[Path], None]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / CONFIG).write_bytes(data)


def data(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Change the bytes of the tensors, and say so in the config."""

    def damage(folder: Path) -> None:
        changed = change((folder / TENSORS).read_bytes())
        (folder / TENSORS).write_bytes(changed)
        config_with(tensors_sha256=hashlib.sha256(changed).hexdigest())(folder)

    return damage


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def change_data(found: bytes) -> bytes:
        held = safetensors.torch.load(found)
        change(held)
        return safetensors.torch.save(held)

    return data(change_data)


def tensor(value: Callable[[Tensor], Tensor], factor: str = "A") -> Callable[[Path], None]:
    key = f"{KEY}.{factor}"
    return tensors(lambda held: held.update({key: value(held[key]).contiguous()}))


def as_folder(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def dangling(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(folder / "nowhere")

    return damage


def as_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def bit(found: bytes) -> bytes:
    return found[:-3] + bytes([found[-3] ^ 0x40]) + found[-2:]


def layer(value: object) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda found: {**found, "up": value}


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "does not exist"),
    "a file for the folder": (as_file, "is a file"),
    "no config": (lambda f: (f / CONFIG).unlink(), CONFIG),
    "no tensors": (lambda f: (f / TENSORS).unlink(), "does not exist"),
    "a folder for the config": (as_folder(CONFIG), "cannot be read: Is a directory"),
    "a folder for the tensors": (as_folder(TENSORS), "cannot be read: Is a directory"),
    "a dangling link for the config": (dangling(CONFIG), CONFIG),
    "a dangling link for the tensors": (dangling(TENSORS), "does not exist"),
    "empty config": (text(""), "is damaged"),
    "half a config": (text('{"peft_type": "FASTBOUND", "r'), "is damaged"),
    "config of zeros": (text(bytes(200)), "is damaged"),
    "config not UTF-8": (text(b'{"peft_type": "\xff"}'), "is damaged"),
    "config nested deeply": (text("[" * 100_000), "is damaged"),
    "an integer of 5000 digits": (text('{"r": ' + "9" * 5000 + "}"), "is damaged"),
    "config a list": (text("[]"), "must hold a JSON object"),
    "config a number": (text("3"), "must hold a JSON object"),
    "config without all": (text("{}"), "peft_type"),
    "method that nobody knows": (config_with(peft_type="WHATEVER"), "WHATEVER"),
    "method a list": (config_with(peft_type=["FASTBOUND"]), "peft_type must"),
    "a later format": (config_with(format_version=3), "reads format_version 1 and 2"),
    "another form's format": (config_with(format_version=2), "do not belong together"),
    "no such form": (config_with(form="sum"), "do not belong together"),
    "no format": (config_without("format_version"), "format_version None"),
    "rank a text": (config_with(r="2"), "r must be a int"),
    "rank true": (config_with(r=True), "r must be a int"),
    "alpha a list": (config_with(alpha=[1]), "alpha must be"),
    "dropout a text": (config_with(dropout="0"), "dropout must be"),
    "dropout 1": (config_with(dropout=1.0), "0 <= dropout < 1"),
    "ranks a list": (config_with(rank_pattern=[2, 2]), "rank_pattern must be a dict"),
    "a rank of a layer a text": (config_with(rank_pattern=layer("2")), "rank_pattern of up"),
    "a rank of a layer 0": (config_with(rank_pattern=layer(0)), "rank_pattern of up"),
    "another rank": (config_with(rank_pattern=layer(3)), r"says \[3, 4\] and \[6, 3\]"),
    "rank of a billion": (config_with(rank_pattern=layer(10**9)), "says .1000000000, 4."),
    "no rank of a layer": (config_with(rank_pattern={"down": 2}), "rank_pattern do not agree"),
    "alpha of a layer null": (config_with(alpha_pattern=layer(None)), "alpha_pattern of up"),
    "alpha of a layer NaN": (config_with(alpha_pattern=layer(float("nan"))), "alpha_pattern of up"),
    "alpha of a layer of 400 digits": (
        config_with(alpha_pattern=layer(10**400)),
        "alpha_pattern of up must be positive and finite",
    ),
    "alpha of a layer 1e300": (
        config_with(alpha_pattern=layer(1e300)),
        "up: alpha must lie between 1e-12 and 1e.12, .* got 1e.300",
    ),
    "bound of a layer -1": (config_with(bound_pattern=layer(-1)), "bound_pattern of up"),
    "bound of a layer a text": (config_with(bound_pattern=layer("auto")), "bound_pattern of up"),
    "a layer more": (config_with(shapes=lambda s: {**s, "side": [4, 4]}), "do not agree"),
    "shape a number": (config_with(shapes=layer(4)), r"shapes of up must be \[N, K\]"),
    "shape of texts": (config_with(shapes=layer(["6", "4"])), r"shapes of up must be \[N, K\]"),
    "another shape": (config_with(shapes=layer([4, 6])), r"says \[2, 6\] and \[4, 2\]"),
    "targets a number": (config_with(target_modules=4), "target_modules must be"),
    "other targets": (config_with(target_modules=["up", 3]), "target_modules do not agree"),
    "a digest of another file": (config_with(tensors_sha256="0" * 64), "is not the file that"),
    "a digest that is none": (config_with(tensors_sha256=4), "tensors_sha256 must be a str"),
    "one bit of the tensors": (lambda f: _flip(f / TENSORS), "is not the file that"),
    "empty tensors": (data(lambda _: b""), "is damaged"),
    "half the tensors": (data(lambda found: found[: len(found) // 2]), "is damaged"),
    "eight bytes less": (data(lambda found: found[:-8]), "is damaged"),
    "tensors of zeros": (data(lambda found: bytes(len(found))), "is damaged"),
    "a header that is too long": (data(lambda found: b"\xff" * 8 + found[8:]), "is damaged"),
    "a pickle": (data(lambda _: b"PK\x03\x04" + bytes(60)), "is damaged"),
    "no tensor": (tensors(dict.clear), "missing"),
    "a tensor less": (tensors(lambda held: held.pop(f"{KEY}.B")), "missing .*up.fastbound_ab.B"),
    "a foreign tensor": (tensors(lambda held: held.update(x=torch.ones(2))), "unexpected 'x'"),
    "tensors of LoRA": (
        tensors(lambda held: held.update({"up.lora_A.weight": held.pop(f"{KEY}.A")})),
        "unexpected 'up.lora_A.weight'",
    ),
    "a NaN": (tensor(lambda A: A * float("nan")), "holds a NaN or an infinity"),
    "an infinity": (tensor(lambda A: A / 0), "holds a NaN or an infinity"),
    "another width": (tensor(lambda A: torch.ones(2, 9)), r"A of up is torch.float32 \[2, 9\]"),
    "transposed": (tensor(lambda A: A.t()), r"A of up is torch.float32 \[4, 2\]"),
    "a vector": (tensor(lambda A: A[0]), "must be matrices"),
    "a scalar": (tensor(lambda A: A[0, 0]), "must be matrices"),
    "integers": (tensor(lambda A: A.int()), "torch.int32, a dtype that adapters do not have"),
    "complex": (tensor(lambda A: A.cfloat()), "torch.complex64, a dtype that adapters do not have"),
    "float8": (tensor(lambda A: A.to(torch.float8_e4m3fn)), "a dtype that adapters do not have"),
    "two dtypes": (tensor(lambda A: A.half()), "of one dtype"),
}


def _flip(path: Path) -> None:
    path.write_bytes(bit(path.read_bytes()))


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    model = network()
    fastbound.inject(model, 2, bound=0.5, target_modules=["up", "down"])
    stir(model)
    folder = tmp_path_factory.mktemp("adapters") / "good"
    fastbound.save_adapter(model, folder)
    return folder


@pytest.mark.parametrize("way", DAMAGE)
@pytest.mark.parametrize("load", [fastbound.load_adapter, load_adapter])
def test_a_damaged_folder_is_named_and_the_model_left_alone(good, tmp_path, way, load):
    damage, message = DAMAGE[way]
    folder = tmp_path / "adapter"
    shutil.copytree(good, folder)
    damage(folder)
    model = network()
    before = state(model)
    with pytest.raises(InputError, match=message) as raised:
        load(model, folder)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)
    assert state(model) == before


def test_a_good_folder_loads(good):
    for load in (fastbound.load_adapter, load_adapter):
        model = network()
        load(model, good)
        assert isinstance(model["up"], fastbound.FusedBoundedLinear)


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    config = peft.LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False)
    peft.get_peft_model(network(), config).save_pretrained(folder)
    return folder


def lora_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        held = safetensors.torch.load_file(folder / TENSORS)
        change(held)
        safetensors.torch.save_file(held, folder / TENSORS)

    return damage


LORA = "base_model.model.up.lora_A.weight"
DAMAGE_OF_LORA: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tensors": (lambda f: (f / TENSORS).unlink(), "has no adapter_model.safetensors or"),
    "empty tensors": (lambda f: (f / TENSORS).write_bytes(b""), "cannot be loaded"),
    "half the tensors": (
        lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:-40]),
        "cannot be loaded",
    ),
    "empty config": (text(""), "is damaged"),
    "config a text": (text('"LORA"'), "must hold a JSON object"),
    "no method": (config_without("peft_type"), "peft_type must name the adapter's method"),
    "a method that nobody knows": (config_with(peft_type="WHATEVER"), "cannot be loaded"),
    "rank a text": (config_with(r="two"), "cannot be loaded"),
    "another rank": (config_with(r=3), "cannot be loaded"),
    "other targets": (config_with(target_modules=["side"]), "cannot be loaded"),
    "fewer targets": (config_with(target_modules=["up"]), "unexpected .*down"),
    "other names": (
        lora_tensors(lambda held: held.update({f"not.{k}": held.pop(k) for k in list(held)})),
        "missing .* unexpected 'not.base_model",
    ),
    "a tensor less": (lora_tensors(lambda held: held.pop(LORA)), f"missing '{LORA}'"),
    "a tensor more": (lora_tensors(lambda held: held.update(x=torch.ones(1))), "unexpected 'x'"),
    "another shape": (
        lora_tensors(lambda held: held.update({LORA: torch.ones(2, 9)})),
        "cannot be loaded",
    ),
    "a NaN": (lora_tensors(lambda held: held[LORA].fill_(float("nan"))), "holds a NaN"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", DAMAGE_OF_LORA)
def test_a_damaged_folder_of_lora_is_refused(lora, tmp_path, way):
    damage, message = DAMAGE_OF_LORA[way]
    folder = tmp_path / "adapter"
    shutil.copytree(lora, folder)
    damage(folder)
    with pytest.raises(InputError, match=message) as raised:
        load_adapter(network(), folder)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


def test_a_good_folder_of_lora_loads(lora):
    assert isinstance(load_adapter(network(), lora), peft.PeftModel)


def test_what_peft_trained_beside_the_adapter_is_loaded_by_peft(tmp_path):
    config = fastbound.BoundedConfig(r=2, target_modules=["up"], modules_to_save=["down"])
    model = peft.get_peft_model(network(), config)
    stir(model)
    with torch.no_grad():
        model.base_model.model["down"].modules_to_save["default"].weight.add_(1)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"modules_to_save is \['down'\].*PeftModel.from_pretrained"
    ):
        fastbound.load_adapter(network(), tmp_path)
    loaded = load_adapter(network(), tmp_path)
    x = torch.randn(3, 4)
    for name in ("up", "down"):
        assert torch.equal(loaded.base_model.model[name](x), model.base_model.model[name](x))
        x = x.repeat(1, 2)[:, :6]
