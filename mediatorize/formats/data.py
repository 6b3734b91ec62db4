"""Training data on disk: latents in the layouts people already have, and pixels. Nothing is unpickled; a bad item is named."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mediatorize import randomness
from mediatorize.errors import UserError
from mediatorize.formats.images import VAE_SCALE, encode, load_vae, refuse_unknown_scale
from mediatorize.formats.tensors import StoredTensor, read_pickle, read_safetensors
from mediatorize.model.architecture import Architecture

Shape = tuple[int, int, int]
"""Channels, height and width of what a layout holds: the model's input, or pictures for a VAE."""

HASHED_ITEMS = 8
"""How many items, spread evenly, stand for the content of a data set."""


@dataclass(frozen=True)
class DataFacts:
    """What a data set is, without where it lies: other facts are other data."""

    name: str
    layout: str
    items: int
    sha256: str
    """Of `HASHED_ITEMS` items and their labels, as stored."""
    vae_sha256: str | None
    """Of the VAE's encoder, where there is one."""
    encode_flops: int
    """FLOPs of the VAE per item."""

    def __str__(self) -> str:
        encoded = ", encoded by a VAE" if self.vae_sha256 else ""
        return f"{self.name} ({self.items} item{'s' * (self.items != 1)}, {self.layout}{encoded})"


class Items(Protocol):
    """One layout: its items as they are stored, and how they become clean data."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one item as stored."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Where an item lies, for messages."""

    def stored(self, index: int) -> tuple[Tensor, int]:
        """An item and its label."""

    def clean(self, stored: Tensor, generator: torch.Generator) -> Tensor:
        """(c, h, w) in the scale the model (or the VAE) takes; what is random is drawn from `generator`."""


class Latents:
    """Clean data for a model, its items checked as they are read. Made by `open_data`."""

    def __init__(self, path: Path, layout: str, items: Items, arch: Architecture, encoder: Encoder | None = None) -> None:
        self.path = path
        self.layout = layout
        self.items = items
        self.arch = arch
        self.encoder = encoder

    def __len__(self) -> int:
        return len(self.items)

    def read(self, indices: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
        """Clean data (b, c, h, w) in the model's scale, float32, and labels (b,), long, on the CPU.

        What is drawn for an item (noise of its posterior, flipped or not) is a function of (seed, index) alone.

        Raises:
            UserError: an item is unreadable, not finite, of another shape or of an unknown class; its path is in the message.
        """
        pairs = [self.stored(index) for index in indices]
        clean = []
        for index, (stored, _) in zip(indices, pairs, strict=True):
            generator = randomness.generator(seed, "data item", index)
            item = self.items.clean(stored, generator)
            clean.append(item if self.encoder is None else self.encoder.encode(item, generator))
        return torch.stack(clean), torch.tensor([label for _, label in pairs])

    def stored(self, index: int) -> tuple[Tensor, int]:
        """An item as stored, float32, and its label, both checked."""
        stored, label = self.items.stored(index)
        if tuple(stored.shape) != self.items.shape:
            raise UserError(
                f"{self.items.name(index)}: shape {list(stored.shape)} where {self.arch.name} needs {list(self.items.shape)}.",
                hint=f"Its input has {self.arch.channels} channels of {self.arch.input_size[0]}x{self.arch.input_size[1]}.",
            )
        if not stored.isfinite().all():
            raise UserError(
                f"{self.items.name(index)}: has values that are NaN or infinite.", hint="Write this item again, or leave it out."
            )
        refuse_labels([label], self.arch.classes, lambda _: self.items.name(index))
        return stored.float(), label

    def facts(self) -> DataFacts:
        digest = hashlib.sha256()
        for index in sorted(set(np.linspace(0, len(self) - 1, HASHED_ITEMS).astype(int).tolist())):
            stored, label = self.stored(index)
            digest.update(stored.contiguous().numpy().tobytes() + str(label).encode())
        vae, flops = (None, 0) if self.encoder is None else (self.encoder.sha256(), self.encoder.flops())
        return DataFacts(self.path.resolve().name, self.layout, len(self), digest.hexdigest(), vae, flops)


@dataclass(frozen=True)
class Encoder:
    """A VAE that turns pictures into the latents of a model."""

    vae: Any
    picture: Shape
    latent: Shape
    device: torch.device
    arch: Architecture

    def encode(self, picture: Tensor, generator: torch.Generator) -> Tensor:
        """(3, 8h, 8w) in [-1, 1] -> (4, h, w), one at a time, so that no result hangs on its batch."""
        noise = torch.randn(self.latent, generator=generator)
        return encode(self.vae, picture[None].to(self.device), noise[None].to(self.device), self.arch)[0].float().cpu()

    def sha256(self) -> str:
        """Of the encoder's weights: sd-vae-ft-ema and -mse differ in their decoders only."""
        digest = hashlib.sha256()
        for name, value in sorted(self.vae.state_dict().items()):
            if not name.startswith(("decoder.", "post_quant_conv.")):
                digest.update(name.encode() + value.float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def flops(self) -> int:
        """Of one picture, counted on a copy without memory."""
        from torch.utils.flop_counter import FlopCounterMode

        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            type(self.vae).from_config(self.vae.config).encode(torch.empty(1, *self.picture))
        return counter.get_total_flops()


def open_data(path: Path, arch: Architecture, vae: Path | None = None, device: torch.device | None = None) -> Latents:
    """Recognises the layout of a data set and checks its first item against a model.

    Args:
        path: a folder or file in one of `LAYOUTS`.
        arch: whose channels, input size and classes the data must have.
        vae: a diffusers AutoencoderKL folder, which a latent model needs for pictures.
        device: where the VAE computes; the CPU by default.

    Raises:
        UserError: the data are not there, of no known layout, pickled, damaged, or of another shape or other classes than the model's.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder.", hint="Check the path of --data.")
    name = next((name for name, layout in LAYOUTS.items() if layout.matches(path)), None)
    if name is None:
        _refuse_unknown(path)
    layout = LAYOUTS[name]
    shape = (arch.channels, *arch.input_size)
    encoder = None
    if vae is not None:
        if not layout.pixels or arch.channels in (1, 3):
            what = f"{path} holds latents already" if not layout.pixels else f"{arch.name} works on pixels"
            raise UserError(f"{what}: there is nothing for a VAE to encode.", hint="Leave --vae out.")
        encoder = open_encoder(vae, arch, device or torch.device("cpu"))
        shape = encoder.picture
    elif layout.pixels and arch.channels not in (1, 3):
        raise UserError(f"{path}: holds pictures, and {arch.name} works on latents of {arch.channels} channels.", hint="Pass --vae PATH.")
    elif arch.latent_std and arch.channels == 4 and not layout.pixels:
        raise UserError(
            f"{path}: latents in the layout {name} are multiplied by {VAE_SCALE}; {arch.name} has a mean and deviation of its own.",
            hint="Pass pictures and --vae PATH.",
        )
    items = layout.open(path, shape, arch.classes)
    if not len(items):
        raise UserError(f"{path}: is laid out as {name}, but holds no items.", hint="Check the path of --data.")
    data = Latents(path, name, items, arch, encoder)
    data.stored(0)
    return data


def open_encoder(path: Path, arch: Architecture, device: torch.device) -> Encoder:
    """A VAE whose latents have a model's channels."""
    vae = load_vae(path, device)
    if vae.config.latent_channels != arch.channels:
        raise UserError(
            f"{path}: its latents have {vae.config.latent_channels} channels, those of {arch.name} {arch.channels}.",
            hint="Pass the VAE that the model was trained with.",
        )
    refuse_unknown_scale(arch)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = arch.input_size
    return Encoder(vae, (vae.config.in_channels, factor * height, factor * width), (arch.channels, height, width), device, arch)


def refuse_labels(labels: ArrayLike, classes: int, name: Callable[[int], str]) -> None:
    """Refuses the first label that is no class of the model."""
    array = np.asarray(labels)
    bad = np.flatnonzero((array < 0) | (array >= classes))
    if len(bad):
        index = int(bad[0])
        raise UserError(f"{name(index)}: label {array[index]} is not one of 0 to {classes - 1}.", hint="Take data of the model's classes.")


# --- latents -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FastDitItems:
    """fast-DiT (github.com/chuanyangjin/fast-DiT, extract_features.py): X_features/{i}.npy (1, c, h, w), a sample of the SD VAE already
    times 0.18215, and X_labels/{i}.npy (1,). Paired by name here; fast-DiT pairs two listings."""

    shape: tuple[int, ...]
    features: Path
    labels: Path
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return str(self.features / self.names[index])

    def stored(self, index: int) -> tuple[Tensor, int]:
        label = read_npy(self.labels / self.names[index])
        if label.size != 1 or label.dtype.kind not in "iu":
            raise UserError(
                f"{self.labels / self.names[index]}: {list(label.shape)} of {label.dtype} is no label.", hint="It must be one whole number."
            )
        return read_floats(self.features / self.names[index]), int(label.item())

    def clean(self, stored: Tensor, generator: torch.Generator) -> Tensor:
        return stored[0]


def open_fast_dit(path: Path, shape: Shape, classes: int) -> FastDitItems:
    features = next(_feature_folders(path))
    labels = path / f"{features.name.removesuffix('_features')}_labels"
    names = sorted((file.name for file in features.glob("*.npy")), key=lambda name: (len(name), name))
    if not labels.is_dir():
        if names:
            read_npy(features / names[0])  # U-ViT has labels inside, pickled, and a folder of the same name
        raise UserError(f"{path}: has {features.name}, but no {labels.name} beside it.", hint="Every latent needs a label.")
    if missing := set(names) - {file.name for file in labels.glob("*.npy")}:
        raise UserError(f"{labels / min(missing)}: missing, though {features.name} has it.", hint="Every latent needs a label.")
    return FastDitItems((1, *shape), features, labels, tuple(names))


def _feature_folders(path: Path) -> Any:
    return (folder for folder in sorted(path.glob("*_features")) if folder.is_dir())


@dataclass(frozen=True)
class RepaItems:
    """REPA (github.com/sihyun-yu/REPA, dataset.py and preprocessing): vae-sd/dataset.json lists names and labels; each .npy (2c, h, w)
    holds mean, then standard deviation of the SD VAE's posterior, unscaled. Training draws from it and multiplies by 0.18215."""

    shape: tuple[int, ...]
    folder: Path
    names: tuple[str, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return str(self.folder / self.names[index])

    def stored(self, index: int) -> tuple[Tensor, int]:
        return read_floats(self.folder / self.names[index]), self.labels[index]

    def clean(self, stored: Tensor, generator: torch.Generator) -> Tensor:
        mean, std = stored.chunk(2)
        return (mean + std * torch.randn(mean.shape, generator=generator)) * VAE_SCALE


def open_repa(path: Path, shape: Shape, classes: int) -> RepaItems:
    folder = path / "vae-sd" if (path / "vae-sd").is_dir() else path
    file = folder / "dataset.json"
    if shape[0] != 4:
        raise UserError(f"{path}: REPA's latents are the SD VAE's, of 4 channels; this model has {shape[0]}.", hint="Take other --data.")
    try:
        listed = json.loads(file.read_text())["labels"]
        if not listed:
            raise UserError(f"{file}: has no labels.", hint="Encode the data set again, with labels.")
        labels = {str(name): label for name, label in listed}
    except FileNotFoundError:
        raise UserError(f"{file}: missing; it has the labels.", hint="Copy it beside the latents.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not REPA's list of names and labels ({error!r}).", hint="Copy it again.") from error
    names = tuple(sorted(labels))
    for name in names:
        if not isinstance(labels[name], int):
            raise UserError(f"{file}: the label of {name} is {labels[name]!r}.", hint="It must be one whole number.")
    items = RepaItems((2 * shape[0], *shape[1:]), folder, names, tuple(labels[name] for name in names))
    refuse_labels(items.labels, classes, items.name)
    return items


@dataclass(frozen=True)
class LightningDitItems:
    """LightningDiT (github.com/hustvl/LightningDiT, extract_features.py and datasets/img_latent_dataset.py): shards with latents,
    latents_flip (n, c, h, w) and labels (n,), as the tokenizer gives them; one of the two is taken at random.

    There, `latent_norm` (off by default, on in the published VA-VAE configs, with `latent_multiplier` 1) subtracts the mean and divides by
    the standard deviation of latents_stats.pt, and `latent_multiplier` (0.18215 by default) multiplies. The extraction writes
    latents_stats.pt for every tokenizer, so that its presence tells nothing. Here, 4 channels are the SD VAE's and multiplied by 0.18215,
    as all DiT and SiT of 4 channels take them; any other number of channels is normalised by latents_stats.pt.
    """

    shape: tuple[int, ...]
    files: tuple[Path, ...]
    ends: tuple[int, ...]
    """Items up to and with each shard."""
    labels: Tensor
    statistics: tuple[Tensor, Tensor] | None
    """Mean and standard deviation (c, 1, 1)."""

    def __len__(self) -> int:
        return self.ends[-1]

    def place(self, index: int) -> tuple[int, int]:
        """Shard and row of an item."""
        shard = bisect_right(self.ends, index)
        return shard, index - (self.ends[shard - 1] if shard else 0)

    def name(self, index: int) -> str:
        shard, row = self.place(index)
        return f"{self.files[shard]}: item {row}"

    def stored(self, index: int) -> tuple[Tensor, int]:
        shard, row = self.place(index)
        try:
            with safe_open(self.files[shard], framework="pt") as file:
                both = [file.get_slice(key)[row] for key in ("latents", "latents_flip")]
                return torch.stack(both), int(self.labels[index])
        except (OSError, IndexError, RuntimeError, SafetensorError) as error:  # whole when it was opened
            raise UserError(f"{self.name(index)}: cannot be read any more ({_first_line(error)}).", hint="Copy it again.") from error

    def clean(self, stored: Tensor, generator: torch.Generator) -> Tensor:
        latent = stored[int(torch.randint(2, (), generator=generator))]
        if self.statistics is None:
            return latent * VAE_SCALE
        mean, std = self.statistics
        return (latent - mean) / std


def open_lightning_dit(path: Path, shape: Shape, classes: int) -> LightningDitItems:
    files = tuple(sorted(path.glob("*.safetensors")))
    shards = []
    for file in files:
        shard = read_safetensors(file)[0]
        for key in ("latents", "latents_flip", "labels"):
            if key not in shard:
                raise UserError(f"{file}: has no {key}.", hint="LightningDiT's shards have latents, latents_flip and labels.")
        counts = [len(shard[key].shape) and shard[key].shape[0] for key in ("latents", "latents_flip", "labels")]
        if len(set(counts)) > 1 or shard["latents"].shape != shard["latents_flip"].shape:
            raise UserError(
                f"{file}: {counts[0]} latents, {counts[1]} flipped and {counts[2]} labels do not go together.", hint="Copy it again."
            )
        if not shard["latents"].dtype.is_floating_point or not shard["latents_flip"].dtype.is_floating_point:
            raise UserError(f"{file}: latents of type {shard['latents'].dtype}.", hint="They must be floating-point.")
        if shard["labels"].dtype not in (torch.int64, torch.int32, torch.uint8) or len(shard["labels"].shape) != 1:
            raise UserError(f"{file}: labels are no list of whole numbers.", hint="Extract the latents again, with labels.")
        shards.append(shard)
    labels = torch.cat([shard["labels"].read().long() for shard in shards])
    ends = tuple(accumulate(shard["labels"].shape[0] for shard in shards))
    statistics = None if shape[0] == 4 else read_statistics(path / "latents_stats.pt", shape[0])
    items = LightningDitItems((2, *shape), files, ends, labels, statistics)
    refuse_labels(labels.numpy(), classes, items.name)
    return items


def read_statistics(path: Path, channels: int) -> tuple[Tensor, Tensor]:
    """LightningDiT's mean and standard deviation per channel, (c, 1, 1) each."""
    if not path.exists():
        raise UserError(
            f"{path}: missing; latents of {channels} channels are normalised by it.", hint="It comes with the latents or their tokenizer."
        )
    content = read_pickle(path)
    found = [content.get(key) if isinstance(content, dict) else None for key in ("mean", "std")]
    values = [value.read().float().flatten() for value in found if isinstance(value, StoredTensor)]
    if len(values) != 2 or any(len(value) != channels for value in values):
        raise UserError(f"{path}: has no mean and std of {channels} channels.", hint="Take the one that was made with these latents.")
    mean, std = (value.view(channels, 1, 1) for value in values)
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise UserError(f"{path}: has a mean that is not finite, or a std that is not above 0.", hint="Extract the latents again.")
    return mean, std


def read_npy(path: Path) -> NDArray[Any]:
    """A plain array; pickled ones are refused unopened."""
    try:
        with path.open("rb") as file:
            try:
                return np.lib.format.read_array(file, allow_pickle=False)
            except ValueError as error:
                file.seek(0)
                if "Object arrays" in str(error) or file.read(1) == b"\x80":
                    raise UserError(
                        f"{path}: is a pickled object, as U-ViT writes its latents; it was not opened.",
                        hint="If you trust it, write latents and labels as plain arrays in fast-DiT's layout.",
                    ) from error
                raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).", hint="Every item of a data set must be there.") from error
    except (ValueError, EOFError, MemoryError) as error:
        raise UserError(f"{path}: not a whole .npy file ({_first_line(error)}).", hint="Write or copy it again.") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def read_floats(path: Path) -> Tensor:
    array = read_npy(path)
    if array.dtype.kind != "f":
        raise UserError(f"{path}: latents of type {array.dtype}.", hint="They must be floating-point.")
    return torch.from_numpy(array.astype(np.float32))


# --- pixels --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PixelArrayItems:
    """Pictures held in memory."""

    shape: tuple[int, ...]
    path: Path
    images: NDArray[Any]
    """(n, h, w, c), bytes or floats in [-1, 1]."""
    labels: NDArray[Any]
    """(n,)"""

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"{self.path}: item {index}"

    def stored(self, index: int) -> tuple[Tensor, int]:
        image = torch.from_numpy(self.images[index].astype(np.float32)).permute(2, 0, 1)
        if self.images.dtype == np.uint8:
            image = from_bytes(image)
        elif image.abs().max() > 1 + 1e-3:
            raise UserError(f"{self.name(index)}: values up to {image.abs().max():.3g}.", hint="Floats must be in [-1, 1]; or write bytes.")
        return image, int(self.labels[index])

    def clean(self, stored: Tensor, generator: torch.Generator) -> Tensor:
        return stored


def open_pixel_array(path: Path, shape: Shape, classes: int) -> PixelArrayItems:
    """An .npz: arr_0 or images, bytes or floats; labels or arr_1."""
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not a whole .npz (no zip archive).", hint="Write it again with numpy.savez.")
    try:
        with np.load(path, allow_pickle=False) as file:
            images = next((file[key] for key in ("arr_0", "images") if key in file), None)
            labels = next((file[key] for key in ("labels", "arr_1") if key in file), None)
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        reason = "it holds pickled objects, which are not opened" if "Object arrays" in str(error) else _first_line(error)
        raise UserError(f"{path}: cannot be read as an .npz ({reason}).", hint="Write it again with numpy.savez.") from error
    if images is None or images.ndim != 4 or not (images.dtype == np.uint8 or images.dtype.kind == "f"):
        found = "no arr_0 or images" if images is None else f"images {list(images.shape)} of {images.dtype}"
        raise UserError(f"{path}: has {found}.", hint="It must hold arr_0 (n, h, w, c), bytes or floats in [-1, 1].")
    if labels is None:
        raise UserError(f"{path}: has no labels.", hint="Store them beside the images as labels (n,).")
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise UserError(
            f"{path}: labels {list(labels.shape)} of {labels.dtype} for {len(images)} images.", hint="Store one whole number each."
        )
    items = PixelArrayItems(shape, path, images, labels)
    refuse_labels(labels, classes, items.name)
    return items


def open_idx(path: Path, shape: Shape, classes: int, part: str = "train") -> PixelArrayItems:
    """MNIST's files, or another data set's in that form: PART-images-idx3-ubyte and PART-labels-idx1-ubyte, each with .gz or without.

    Args:
        part: `train`, or `t10k` for the test set.
    """
    files = [_idx_file(path, part, kind) for kind in ("images-idx3", "labels-idx1")]
    images, labels = (read_idx(file, axes) for file, axes in zip(files, (3, 1), strict=True))
    if len(images) != len(labels):
        raise UserError(f"{files[1]}: {len(labels)} labels for {len(images)} images.", hint="Copy both files again.")
    items = PixelArrayItems(shape, files[0], images[..., None], labels)
    refuse_labels(labels, classes, items.name)
    return items


def _idx_file(folder: Path, part: str, kind: str) -> Path:
    plain = folder / f"{part}-{kind}-ubyte"
    packed = plain.with_name(f"{plain.name}.gz")
    return packed if packed.is_file() else plain


def read_idx(path: Path, axes: int) -> NDArray[np.uint8]:
    """An array of bytes in MNIST's IDX format, unpacked if its name ends with .gz.

    The bytes 0, 0, 8 (unsigned bytes) and the number of axes; the length of each axis as four bytes, the highest first; then the values.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise UserError(f"{path}: cannot be read ({reason}).", hint="Copy it again.") from error
    begin = 4 * (axes + 1)
    if len(content) < begin or content[:4] != bytes((0, 0, 8, axes)):
        raise UserError(f"{path}: is no IDX file of bytes with {axes} axes.", hint="Copy it again.")
    shape = np.frombuffer(content[4:begin], ">u4").tolist()
    if len(content) - begin != math.prod(shape):
        raise UserError(
            f"{path}: holds {len(content) - begin} bytes, where {shape} needs {math.prod(shape)}.", hint="It is not whole: copy it again."
        )
    return np.frombuffer(content, np.uint8, offset=begin).reshape(shape)


@dataclass(frozen=True)
class ImageItems:
    """Pictures in one folder per class, numbered in the order of the folders' names as torchvision's ImageFolder does; the middle of
    each, in the model's proportions, is resized to its size."""

    shape: tuple[int, ...]
    samples: tuple[tuple[str, int], ...]

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, index: int) -> str:
        return self.samples[index][0]

    def stored(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        channels, height, width = self.shape
        try:
            with Image.open(path) as image:
                picture = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.BICUBIC)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(
                f"{path}: cannot be read as an image ({error}).", hint="Copy it again, or take it out of the folder."
            ) from error
        pixels = torch.from_numpy(np.array(picture, dtype=np.float32)).view(height, width, channels)
        return from_bytes(pixels.permute(2, 0, 1)), label

    def clean(self, stored: Tensor, generator: torch.Generator) -> Tensor:
        return stored


def open_images(path: Path, shape: Shape, classes: int) -> ImageItems:
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(path, allow_empty=True)
    if not folder.samples:
        raise UserError(f"{path}: no images in its folders.", hint="It must have one folder of images per class.")
    if len(folder.classes) != classes:
        raise UserError(
            f"{path}: has {len(folder.classes)} folders, the model {classes} classes.",
            hint="Make one for every class, empty where there are no images: their sorted names number the classes.",
        )
    return ImageItems(shape, tuple(folder.samples))


def from_bytes(values: Tensor) -> Tensor:
    """0..255 -> [-1, 1]"""
    return values / 127.5 - 1


# --- layouts -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    matches: Callable[[Path], bool]
    open: Callable[[Path, Shape, int], Items]
    """From the path, what an item must be and the number of classes."""
    pixels: bool
    """Whether it holds pictures rather than latents."""
    looks: str
    """What it is recognised by, for messages."""


LAYOUTS: dict[str, Layout] = {
    "fast-DiT": Layout(lambda path: any(_feature_folders(path)), open_fast_dit, False, "X_features/ and X_labels/ of .npy"),
    "REPA": Layout(
        lambda path: (path / "vae-sd").is_dir() or (path / "dataset.json").is_file(), open_repa, False, "vae-sd/ with dataset.json"
    ),
    "LightningDiT": Layout(lambda path: any(path.glob("*.safetensors")), open_lightning_dit, False, "latents_*.safetensors"),
    "npz": Layout(lambda path: path.is_file() and path.suffix == ".npz", open_pixel_array, True, "an .npz of arr_0 and labels"),
    "IDX": Layout(
        lambda path: _idx_file(path, "train", "images-idx3").is_file(), open_idx, True, "train-images-idx3-ubyte and its labels, as MNIST's"
    ),
    "images": Layout(
        lambda path: path.is_dir() and any(folder.is_dir() for folder in path.iterdir()),
        open_images,
        True,
        "one folder of images per class",
    ),
}
"""Layouts by name, the first that matches is taken. To add one: an `Items` class, a function that opens it, and an entry."""


def _refuse_unknown(path: Path) -> NoReturn:
    if path.is_dir() and (array := next(path.glob("*.npy"), None)) is not None:
        read_npy(array)  # names U-ViT's pickles
    known = "; ".join(f"{layout.looks} ({name})" for name, layout in LAYOUTS.items())
    empty = "the folder is empty" if path.is_dir() and not any(path.iterdir()) else "no data of a known layout"
    raise UserError(f"{path}: {empty}.", hint=f"Known are {known}.")
