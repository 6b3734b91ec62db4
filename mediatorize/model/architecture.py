"""What the network is: frozen sizes and conventions. No torch here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mediatorize.errors import UserError

Family = Literal["dit", "sit", "lightningdit"]
NormKind = Literal["layer", "rms"]
MlpKind = Literal["gelu", "swiglu"]


@dataclass(frozen=True)
class FamilyFacts:
    """What a family of models is called, what its forward gives, and what its published models are made of."""

    name: str
    keeps_variance: bool
    """Whether the rows for the variance are part of the output, where the last layer has them."""
    code: str = "models.py"
    """The file of its code that holds the model."""
    cell: int = 8
    """Pixels to a side of one latent of its published models."""
    mlp_ratio: float = 4
    """Hidden width of the MLP of its published models, as a multiple of the width."""
    published: dict[str, Any] = field(default_factory=dict)
    """Fields of `Architecture` in which its published models differ from DiT's."""


FAMILIES: dict[Family, FamilyFacts] = {
    "dit": FamilyFacts("DiT", keeps_variance=True),
    "sit": FamilyFacts("SiT", keeps_variance=False),
    "lightningdit": FamilyFacts(
        "LightningDiT",
        keeps_variance=False,
        code="models/lightningdit.py",
        cell=16,
        mlp_ratio=8 / 3,
        published={"channels": 32, "learn_sigma": False, "norm": "rms", "mlp": "swiglu", "rotary": True},
    ),
}
"""Families of models. What their outputs mean is in `diffusion/process.py`."""


@dataclass(frozen=True)
class MlpFacts:
    """How a kind of MLP is stored, and what it costs."""

    first: str
    last: str
    """Names of its two linear layers."""
    rows: int
    """Rows of the first layer for each hidden unit."""


MLPS: dict[MlpKind, MlpFacts] = {"gelu": MlpFacts("fc1", "fc2", 1), "swiglu": MlpFacts("w12", "w3", 2)}
"""Kinds of MLP. What they compute is in `model/mlp.py`."""

HEADS_OF_WIDTH = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}
"""Head counts of the published sizes of DiT, SiT and LightningDiT; a checkpoint's tensors do not hold them."""

SIZE_OF_WIDTH_AND_DEPTH = {(384, 12): "S", (768, 12): "B", (1024, 24): "L", (1152, 28): "XL", (1536, 24): "1p0B", (1792, 28): "1p6B"}

FREQUENCIES = 256
"""Width of the sinusoidal timestep embedding in every published DiT and SiT."""

PUBLISHED_GRID = 7
"""Side of the grid that the published form's bilinear position terms are stored on."""

COARSE_GRID = 16
"""Longest side of the position grid that pooling matrices and position terms are stored on."""


CELLS = {1: 1, 3: 1, 4: 8, 32: 16}
"""Pixels to a side of one value of a model's input, by its channels: 1 and 3 are pixels, 4 the SD VAE's latents, 32 those of VA-VAE and of
REPA-E's VAEs."""


@dataclass(frozen=True)
class Architecture:
    """Sizes and conventions of a DiT (arXiv 2212.09748), SiT (arXiv 2401.08740) or LightningDiT (arXiv 2501.01423).

    The last fields hold what differs between implementations: diffusers' DiT divides the timestep frequencies by one less and has a larger
    epsilon in the norm before the MLP; REPA's SiT runs time backwards (t = 1 is noise, the output is noise - data).
    """

    family: Family
    depth: int
    width: int
    heads: int
    patch: int
    channels: int
    grid: tuple[int, int]
    """Tokens per column and per row."""
    classes: int
    null_class: bool
    """Whether row `classes` of the label table is the null class that guidance needs."""
    learn_sigma: bool
    """Whether the last layer has rows for the variance (DiT uses them, SiT drops them)."""
    mlp_width: int
    frequency_shift: int = 0
    mlp_norm_eps: float = 1e-6
    reversed_time: bool = False
    mediators: int = 0
    """Mediators of the checkpoint's own attention, in the published form (arXiv 2408.05710); 0: it is softmax attention."""
    norm: NormKind = "layer"
    """Of tokens, and of queries and keys where they have one. layer: without weights for tokens, with weights for queries and keys. rms:
    always with a weight."""
    mlp: MlpKind = "gelu"
    rotary: bool = False
    """Whether softmax attention rotates queries and keys by their row and column."""
    qk_norm: bool = False
    """Whether softmax attention normalises queries and keys, head by head."""
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()
    """By channel, of the VAE's latents z: the model works on (z - mean) / std. Empty: on 0.18215 z with 4 channels, else not known."""

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise UserError(f"{self.family!r} is no family.", hint=f"Families are {' and '.join(FAMILIES)}.")
        counts = {name: getattr(self, name) for name in ("depth", "width", "heads", "patch", "channels", "classes", "mlp_width")}
        if len(self.grid) != 2:
            raise UserError(f"A token grid of {list(self.grid)} has not two sides.", hint="It must be rows and columns.")
        counts |= {"rows of tokens": self.grid[0], "columns of tokens": self.grid[1]}
        for name, count in counts.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise UserError(f"{count!r} is no number of {name}.", hint="It must be a whole number of at least 1.")
        if self.mediators != math.isqrt(max(0, self.mediators)) ** 2:
            raise UserError(f"{self.mediators} mediators have no square grid, which the published form pools into.", hint="It is damaged.")
        if self.width % self.heads:
            raise UserError(f"Width {self.width} does not divide into {self.heads} heads.", hint="Pass the right --num-heads.")
        if self.norm not in ("layer", "rms") or self.mlp not in MLPS:
            raise UserError(f"A block of {self.norm!r} norms and a {self.mlp!r} MLP is not known.", hint="It is damaged.")
        means, deviations = len(self.latent_mean), len(self.latent_std)
        if {means, deviations} not in ({0}, {self.channels}):
            raise UserError(
                f"Latents of {self.channels} channels have {means} means and {deviations} deviations.",
                hint="Take the model's own statistics.",
            )
        if not all(0 < deviation < math.inf for deviation in self.latent_std):
            raise UserError("A deviation of latents is not above 0.", hint="It is damaged.")
        if self.mediators and (self.rotary or self.qk_norm):
            raise UserError("Attention in the published form has no rotary positions and no normalised queries.", hint="It is damaged.")
        if self.rotary and self.head_width % 4:
            raise UserError(
                f"Heads of width {self.head_width} do not divide into pairs for rows and for columns, which rotary positions need.",
                hint="Pass the right --num-heads.",
            )

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the model's input, in latent (or pixel) units."""
        return self.grid[0] * self.patch, self.grid[1] * self.patch

    @property
    def last_rows(self) -> int:
        """Values per token that the last layer emits."""
        return self.patch**2 * self.channels * (2 if self.learn_sigma else 1)

    @property
    def output_channels(self) -> int:
        """Channels of the forward's output: SiT drops the variance rows, DiT keeps them."""
        return self.channels * (2 if self.learn_sigma and FAMILIES[self.family].keeps_variance else 1)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the pictures, where the channels tell."""
        cell = CELLS.get(self.channels)
        return None if cell is None else (cell * self.input_size[0], cell * self.input_size[1])

    @property
    def name(self) -> str:
        """The published name (`DiT-XL/2`) where the sizes have one, else the sizes."""
        size = SIZE_OF_WIDTH_AND_DEPTH.get((self.width, self.depth), f"{self.depth}x{self.width}")
        return f"{FAMILIES[self.family].name}-{size}/{self.patch}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {name: list(getattr(self, name)) for name in ("grid", "latent_mean", "latent_std")}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Architecture:
        lists: dict[str, Any] = {name: tuple(fields[name]) for name in ("grid", "latent_mean", "latent_std") if name in fields}
        return cls(**(fields | lists))


def preset(name: str) -> Architecture:
    """The architecture of a published model by name and pixels, as `DiT-XL/2@256`."""
    try:
        model, image_size = name.split("@")
        prefix, size = model.split("-")
        letter, patch = size.split("/")
        family, facts = next((family, facts) for family, facts in FAMILIES.items() if facts.name.lower() == prefix.lower())
        width, depth = {letter.lower(): sizes for sizes, letter in SIZE_OF_WIDTH_AND_DEPTH.items()}[letter.lower()]
        side, rest = divmod(int(image_size), facts.cell * int(patch))
        if rest or side < 1:
            raise ValueError(f"{image_size} pixels are not a multiple of {facts.cell * int(patch)}")
    except (KeyError, StopIteration, ValueError, ZeroDivisionError) as error:
        raise UserError(f"No preset is called {name!r}.", hint="They look like DiT-XL/2@256 or SiT-S/4@512.") from error
    fields: dict[str, Any] = {
        "family": family,
        "depth": depth,
        "width": width,
        "heads": HEADS_OF_WIDTH[width],
        "patch": int(patch),
        "channels": 4,
        "grid": (side, side),
        "classes": 1000,
        "null_class": True,
        "learn_sigma": True,
        "mlp_width": int(facts.mlp_ratio * width),
    }
    return Architecture(**fields | facts.published)


def default_local_rank(width: int) -> int:
    """A quarter of the width up to 64, where the branch costs a few per cent of softmax attention."""
    return min(64, width // 4)


def default_projection_rank(width: int) -> int:
    """A quarter of the width up to 32: a fiftieth of copies of the projections of XL/2."""
    return min(32, width // 4)


def default_modulation_rank(width: int) -> int:
    """A quarter of the width up to 32: one product per sample, not per token, so that it costs next to nothing."""
    return min(32, width // 4)


def coarse_grid(grid: tuple[int, int]) -> tuple[int, int]:
    """The grid that position-dependent weights are stored on: the token grid, at most 16 a side."""
    return min(grid[0], COARSE_GRID), min(grid[1], COARSE_GRID)
