"""Tensors in files: read as they were saved, mapped and not copied; every damaged or hostile file is one refusal, and executes nothing."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import official_state, tiny_model
from safetensors.torch import save_file
from torch import Tensor, nn

from mediatorize.errors import UserError
from mediatorize.formats.loading import load_model
from mediatorize.formats.tensors import StoredTensor, Weight, load_weights, read_pickle, read_safetensors, refuse_non_finite, write_beside

SMALL = {"depth": 1, "width": 16, "heads": 2, "mlp_width": 32, "classes": 5, "grid": (2, 2)}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]

Header = dict[str, Any]


def small_state() -> dict[str, Tensor]:
    return official_state(tiny_model(**SMALL))


def refusal(path: Path) -> str:
    """What a file is refused with, after its path (whose words would match anything)."""
    with pytest.raises(UserError) as caught:
        load_model(path, family="sit", num_heads=2)
    assert str(path) in caught.value.message
    assert caught.value.hint
    return str(caught.value).replace(str(path), "")


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def save_small(path: Path) -> Path:
    """A tiny model as a file of the format that its suffix says."""
    if path.suffix == ".safetensors":
        save_file(small_state(), path)
    else:
        torch.save(small_state(), path)
    return path


def header_and_data(state: dict[str, Tensor]) -> tuple[Header, bytes]:
    header, data = {}, b""
    for name, value in state.items():
        raw = value.contiguous().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return header, data


def write_raw_safetensors(path: Path, header: Any, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


# --- reading -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_reads_bitwise(tmp_path: Path, dtype: torch.dtype) -> None:
    values = (torch.arange(24).view(2, 3, 4) * 1.37).to(dtype)
    save_file({"first": torch.ones(3, dtype=torch.uint8), "values": values}, tmp_path / "a.safetensors")
    save(tmp_path / "a.pt", {"first": torch.ones(3, dtype=torch.uint8), "values": values})
    for stored in (read_safetensors(tmp_path / "a.safetensors")[0]["values"], read_pickle(tmp_path / "a.pt")["values"]):
        assert stored.dtype == dtype
        for loaded in (stored.read(), stored.mapped):
            assert loaded.dtype == dtype
            assert torch.equal(loaded, values)


def test_views_read_as_the_tensors_they_were(tmp_path: Path) -> None:
    large = torch.randn(6, 8, 5, generator=torch.Generator().manual_seed(0))
    content = {
        "whole": large,
        "slice": large[2:4, 1:7:2],
        "transposed": large.permute(2, 0, 1),
        "one row": large[5, 7],
        "repeated": large[0, 0].expand(3, 5),
        "number": large[3, 3, 3],
        "same": large,
        "last": large[-1:, -1:, -1:],
    }
    stored = read_pickle(save(tmp_path / "views.pt", content))
    for name, value in content.items():
        assert stored[name].shape == tuple(value.shape)
        assert torch.equal(stored[name].read(), value), name
        assert torch.equal(stored[name].mapped, value), name


def test_saved_parameters_are_tensors(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    stored = read_pickle(save(tmp_path / "parameters.pt", dict(layer.named_parameters())))
    assert torch.equal(stored["weight"].read(), layer.weight)
    assert torch.equal(stored["bias"].read(), layer.bias)


def test_containers_and_arguments_of_a_pickle_stay_what_they_are(tmp_path: Path) -> None:
    arguments = argparse.Namespace(model="SiT-XL/2", nested=argparse.Namespace(rate=0.1), sizes=[1, 2])
    content = read_pickle(save(tmp_path / "a.pt", {"args": arguments, "steps": 7, "ema": {"w": torch.ones(2)}, "opt": {"state": {0: {}}}}))
    assert content["args"] == arguments
    assert content["steps"] == 7
    assert isinstance(content["ema"]["w"], StoredTensor)


def test_safetensors_metadata_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", {"num_heads": "6", "note": "ünïcode"})
    assert read_safetensors(tmp_path / "a.safetensors")[1] == {"num_heads": "6", "note": "ünïcode"}


def test_weight_joins_its_parts_in_order_in_float32(tmp_path: Path) -> None:
    parts = [torch.full((rows, 4), rows / 3, dtype=torch.bfloat16) for rows in (1, 2, 3)]
    stored = read_pickle(save(tmp_path / "a.pt", {str(index): part for index, part in enumerate(parts)}))
    weight = Weight(tuple(stored.values()))
    assert weight.shape == (6, 4)
    loaded = load_weights({"w": weight})["w"]
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, torch.cat(parts).float())


def open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


def test_many_tensors_of_a_file_take_one_mapping(tmp_path: Path) -> None:
    save_file({str(index): torch.full((3,), float(index)) for index in range(400)}, tmp_path / "a.safetensors")
    weights = {name: Weight((stored,)) for name, stored in read_safetensors(tmp_path / "a.safetensors")[0].items()}
    before = open_files()
    loaded = load_weights(weights)
    after = open_files()
    assert after - before <= 2
    assert all(value.tolist() == [float(name)] * 3 for name, value in loaded.items())


# --- memory --------------------------------------------------------------------------------------------------------------------


def overwrite(stored: StoredTensor, value: float) -> None:
    """Replaces the first number of a tensor in its file, in place."""
    offset = stored.path.read_bytes().index(stored.read().numpy().tobytes())
    with stored.path.open("rb+") as file:
        file.seek(offset)
        file.write(struct.pack("<f", value))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_mapped_tensor_sees_the_file_and_a_read_one_is_a_copy(tmp_path: Path, suffix: str) -> None:
    path = save_small(tmp_path / f"a{suffix}")
    stored = (read_pickle(path) if suffix == ".pt" else read_safetensors(path)[0])["pos_embed"]
    mapped, copied = stored.mapped, stored.read()
    before = copied.flatten()[0].item()
    overwrite(stored, 123.5)
    assert mapped.flatten()[0] == 123.5
    assert copied.flatten()[0] == before != 123.5


def test_changes_to_a_mapped_tensor_stay_in_memory(tmp_path: Path) -> None:
    path = save_small(tmp_path / "a.pt")
    content = path.read_bytes()
    mapped = read_pickle(path)["pos_embed"].mapped
    mapped.add_(1)
    assert torch.equal(mapped, small_state()["pos_embed"] + 1)
    assert path.read_bytes() == content


def test_tensors_that_share_memory_are_loaded_apart(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    content = {"whole": whole, "same": whole, "row": whole[1], "transposed": whole.T, "repeated": whole[0].expand(2, 4)}
    stored = read_pickle(save(tmp_path / "a.pt", content))
    loaded = load_weights({name: Weight((part,)) for name, part in stored.items()})
    assert loaded["whole"].data_ptr() == stored["whole"].mapped.data_ptr(), "the first was copied"
    for name, value in content.items():
        assert torch.equal(loaded[name], value), name
        others = {other: tensor.clone() for other, tensor in loaded.items() if other != name}
        loaded[name].neg_()
        assert all(torch.equal(loaded[other], tensor) for other, tensor in others.items()), name
        loaded[name].neg_()


def test_weights_at_odd_addresses_of_a_file_are_loaded_to_even_ones(tmp_path: Path) -> None:
    """`torch.save` aligns what it writes; other zip tools do not."""
    state = small_state()
    with zipfile.ZipFile(save(tmp_path / "a.pt", state)) as source, zipfile.ZipFile(tmp_path / "b.pt", "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    stored = read_pickle(tmp_path / "b.pt")
    assert any(part.mapped.data_ptr() % 4 for part in stored.values()), "nothing is tested"
    for name, value in load_weights({name: Weight((part,)) for name, part in stored.items()}).items():
        assert value.data_ptr() % 4 == 0
        assert torch.equal(value, state[name])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_listing_and_checking_copy_no_weights(tmp_path: Path, suffix: str) -> None:
    """What a file's pages take can be dropped and read again; memory of the process's own cannot."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("memory is read from /proc")

    def own_bytes() -> int:
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("RssAnon"))

    path = tmp_path / f"a{suffix}"
    state = {str(index): torch.ones(2**22) for index in range(8)}
    (torch.save if suffix == ".pt" else save_file)(state, path)
    before = own_bytes()
    stored = read_pickle(path) if suffix == ".pt" else read_safetensors(path)[0]
    weights = {name: Weight((part,)) for name, part in stored.items()}
    refuse_non_finite(weights.items())
    load_weights(weights)
    assert own_bytes() - before < path.stat().st_size / 8


# --- hostile pickles -----------------------------------------------------------------------------------------------------------


class Payload:
    """Unpickling it calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("hidden_in", ["itself", "weights", "arguments", "a key"])
@pytest.mark.parametrize(("function", "named"), [(os.mkdir, "mkdir"), (exec, "exec"), (os.system, "system")])
def test_hostile_pickle_is_named_and_not_executed(tmp_path: Path, function: Callable[..., Any], named: str, hidden_in: str) -> None:
    touched = tmp_path / "touched"
    argument = {"mkdir": str(touched), "exec": f"import os; os.mkdir({str(touched)!r})", "system": f"mkdir {touched}"}[named]
    payload = Payload(function, argument)
    content = {
        "itself": payload,
        "weights": {"ema": small_state() | {"pos_embed": payload}},
        "arguments": {"ema": small_state(), "args": argparse.Namespace(model=payload)},
        "a key": small_state() | {("pos_embed", payload): 1},
    }[hidden_in]
    path = save(tmp_path / "hostile.pt", content)

    torch.load(path, weights_only=False)
    assert touched.exists(), "the payload does nothing, so nothing is tested"
    touched.rmdir()

    message = refusal(path)
    assert not touched.exists()
    assert named in message
    assert "not executed" in message


def test_namespace_is_no_way_around_the_refusal(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    chained = Payload(argparse.Namespace, Payload(os.mkdir, str(touched)))
    assert "mkdir" in refusal(save(tmp_path / "hostile.pt", chained))
    assert not touched.exists()


def test_whole_pickled_model_is_refused_by_its_class(tmp_path: Path) -> None:
    message = refusal(save(tmp_path / "model.pt", tiny_model(**SMALL)))
    assert "mediatorize.model.transformer.DiffusionTransformer" in message
    assert "state dict" in message


def test_dictionary_that_holds_itself_is_refused(tmp_path: Path) -> None:
    content: dict[str, Any] = small_state()
    content["model"] = content
    refusal(save(tmp_path / "loop.pt", content))


def test_old_pickle_with_an_archive_behind_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "both.pt"
    torch.save(small_state(), path, _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/b", "c")
    refusal(path)


# --- other files than weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 2700611775\n", "Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>", "web page"),
        (b"\n  <html><body>404</body></html>", "web page"),
    ],
    ids=["empty", "lfs", "html", "html later"],
)
def test_file_that_is_no_checkpoint_is_called_what_it_is(tmp_path: Path, suffix: str, content: bytes, words: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    assert words in refusal(path)


def test_missing_path_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "nowhere.pt")


@pytest.mark.parametrize(
    ("content", "kind"),
    [([torch.ones(2)], "list"), (torch.ones(2), "Tensor"), (None, "None"), ({}, "no tensors"), ({"epoch": 3}, "no tensors")],
    ids=["list", "tensor", "none", "empty", "numbers"],
)
def test_pickle_without_named_tensors_is_called_what_it_is(tmp_path: Path, content: Any, kind: str) -> None:
    assert kind in refusal(save(tmp_path / "model.pt", content))


def test_numpy_files_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "latents.npy", np.zeros((2, 2)))
    np.savez(tmp_path / "latents.npz", a=np.zeros((2, 2)))
    assert "neither safetensors nor a torch zip" in refusal(tmp_path / "latents.npy")
    assert "torch checkpoint" in refusal(tmp_path / "latents.npz")


def test_pickle_from_before_zip_archives_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(small_state(), path, _use_new_zipfile_serialization=False)
    assert "`torch.save` it again" in refusal(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    assert "`torch.save` it again" in refusal(path)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("tensor", [torch.ones(3, device="meta"), torch.eye(3).to_sparse()], ids=["meta", "sparse"])
def test_tensor_without_plain_stored_bytes_is_refused(tmp_path: Path, tensor: Any) -> None:
    path = save(tmp_path / "model.pt", small_state() | {"pos_embed": tensor})
    assert "without plain stored bytes" in refusal(path)


def test_safetensors_type_that_is_no_weight_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(small_state() | {"pos_embed": torch.ones(1, 4, 16).to(torch.float8_e4m3fn)}, path)
    assert "pos_embed is of type torch.float8_e4m3fn" in refusal(path)


def test_compressed_archive_is_not_read_as_if_it_were_plain(tmp_path: Path) -> None:
    """`torch.save` stores, other tools deflate: compressed bytes are no weights."""
    plain, packed = save_small(tmp_path / "plain.pt"), tmp_path / "packed.pt"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert "compressed" in refusal(packed)


# --- truncation ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [1, 2, 3, 10, 63, 64, 65, 0.1, 0.5, 0.9, -1, -21, -22, -23, -100, -2000])
def test_truncated_archive_is_refused(tmp_path: Path, left: float) -> None:
    path = save_small(tmp_path / "model.pt")
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])
    message = refusal(path)
    assert "cut off" in message or path.stat().st_size < 4


@pytest.mark.parametrize("start", [0, 100, 3000, 10000])
def test_archive_with_a_hole_is_refused(tmp_path: Path, start: int) -> None:
    path = save_small(tmp_path / "model.pt")
    content = path.read_bytes()
    path.write_bytes(content[:start] + content[start + 500 :])
    refusal(path)


def test_archive_whose_data_are_shorter_than_its_tensors_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "plain.pt", small_state())
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry)[: 8 if "/data/" in entry.filename else None])
    refusal(packed)


@pytest.mark.parametrize("left", [1, 7, 8, 9, 500, 0.5, 0.9, -1])
def test_truncated_safetensors_is_refused(tmp_path: Path, left: float) -> None:
    path = save_small(tmp_path / "model.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[: int(left * len(content)) if isinstance(left, float) else left])
    message = refusal(path)
    assert "not a whole safetensors file" in message
    assert "truncated" in message


# --- malformed safetensors headers ---------------------------------------------------------------------------------------------


def changed(**fields: Any) -> Callable[[Header], Any]:
    """A change to the entry of pos_embed, 256 bytes of float32 at [0, 256)."""
    return lambda header: header | {"pos_embed": header["pos_embed"] | fields}


MALFORMED: dict[str, Callable[[Header], Any]] = {
    "before the data": changed(data_offsets=[-256, 0]),
    "before the file": changed(data_offsets=[-(10**9) - 256, -(10**9)]),
    "behind the file": changed(data_offsets=[10**9, 10**9 + 256]),
    "backwards": changed(data_offsets=[256, 0]),
    "one offset": changed(data_offsets=[256]),
    "fractional offsets": changed(data_offsets=[0.0, 256.0]),
    "offsets of text": changed(data_offsets=["0", "256"]),
    "too few bytes": changed(data_offsets=[0, 252]),
    "negative shape": changed(shape=[-1, -4, 16]),
    "fractional shape": changed(shape=[1.0, 4.0, 16.0]),
    "shape of text": changed(shape="1416"),
    "no shape": lambda header: header | {"pos_embed": {"dtype": "F32", "data_offsets": [0, 256]}},
    "unknown dtype": changed(dtype="F31"),
    "dtype is a list": changed(dtype=["F32"]),
    "entry is a list": lambda header: header | {"pos_embed": [1, 2]},
    "overlap": lambda header: header | {"blocks.0.attn.proj.bias": header["blocks.0.attn.proj.bias"] | {"data_offsets": [32, 96]}},
    "metadata is a list": lambda header: header | {"__metadata__": [1]},
    "metadata is text": lambda header: header | {"__metadata__": "text"},
    "header is a list": lambda _: [1, 2],
    "header is null": lambda _: None,
    "header nests without end": lambda _: b"[" * 200_000,
    "header is no JSON": lambda _: b"{'a': 1}",
    "header is no UTF-8": lambda _: b'{"\xff": 1}',
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_safetensors_header_is_refused(tmp_path: Path, change: Callable[[Header], Any]) -> None:
    state = small_state()
    header, data = header_and_data({"pos_embed": state.pop("pos_embed"), **state})
    path = tmp_path / "model.safetensors"
    load_model(write_raw_safetensors(path, header, data), family="sit", num_heads=2)
    assert "not a whole safetensors file" in refusal(write_raw_safetensors(path, change(header), data))


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40])
def test_safetensors_header_of_absurd_length_is_refused(tmp_path: Path, length: int) -> None:
    path = save_small(tmp_path / "model.safetensors")
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    assert "not a whole safetensors file" in refusal(path)


# --- values --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_value_is_found_at_any_precision(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    tensors = {"fine": torch.ones(4, 4, dtype=dtype), "broken": torch.ones(4, 4, dtype=dtype)}
    tensors["broken"][1, 2] = value
    stored = read_pickle(save(tmp_path / "a.pt", tensors))
    refuse_non_finite([("fine", Weight((stored["fine"],)))])
    with pytest.raises(UserError, match=r"a\.pt: broken has 1 value that"):
        refuse_non_finite((name, Weight((tensor,))) for name, tensor in stored.items())


def test_infinities_that_cancel_are_found(tmp_path: Path) -> None:
    stored = read_pickle(save(tmp_path / "a.pt", {"broken": torch.tensor([float("inf"), 1, -float("inf")])}))
    with pytest.raises(UserError, match="2 values"):
        refuse_non_finite([("broken", Weight((stored["broken"],)))])


def test_largest_finite_numbers_are_accepted(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        stored = read_pickle(save(tmp_path / "a.pt", {"large": torch.full((64,), torch.finfo(dtype).max, dtype=dtype)}))
        refuse_non_finite([("large", Weight((stored["large"],)))])


def test_number_that_float32_cannot_hold_is_refused(tmp_path: Path) -> None:
    """Weights are used in float32, where 1e300 is infinite."""
    state = small_state()
    state["pos_embed"] = state["pos_embed"].double()
    state["pos_embed"][0, 0, 0] = 1e300
    assert "pos_embed" in refusal(save(tmp_path / "model.pt", state))


# --- writing -------------------------------------------------------------------------------------------------------------------


def test_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_beside(path, lambda beside: beside.write_text("old"))

    def fail(beside: Path) -> None:
        beside.write_text("half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_beside(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_file_is_replaced_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    seen = []

    def write(beside: Path) -> None:
        beside.write_text("new")
        seen.append((path.read_text(), beside.parent))

    write_beside(path, write)
    assert seen == [("old", tmp_path)]
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]
