"""A mediator-attention DiT or SiT as diffusers loads it, its schedule inside, keyed by the timestep it is called with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from mediatorize.diffusion.driver import Driver
from mediatorize.diffusion.process import Process, process_of
from mediatorize.diffusion.switching import Switcher
from mediatorize.export.travelling.code import SavedWithCode
from mediatorize.model.architecture import Architecture
from mediatorize.model.block import Block
from mediatorize.model.levels import SOFTMAX, Level, MediatorSettings, holds, levels_per_layer
from mediatorize.model.memory import Memory
from mediatorize.model.schedule import RuleSchedule, Schedule, calls_at, schedule_from_json
from mediatorize.model.transformer import DiffusionTransformer
from mediatorize.version import VERSION

OneOrEach = Level | Sequence[Level]

DIFFUSERS_NULL_CLASS = 1000
"""The null class that diffusers' DiTPipeline sends, whatever the number of classes."""

CACHES = ("FirstBlockCacheConfig", "TaylorSeerCacheConfig", "MagCacheConfig")
"""The caches of diffusers that find their places in this model. The others look for attention classes or models of diffusers."""

TransformerBlockRegistry.register(Block, TransformerBlockMetadata(return_hidden_states_index=0))


class MediatorTransformer2DModel(SavedWithCode, DiffusionTransformer, ModelMixin, ConfigMixin, CacheMixin):  # type: ignore[misc, unused-ignore]
    """Called as diffusers' DiTTransformer2DModel is.

    Args:
        architecture: sizes and conventions of the model.
        mediators: what was added to its blocks.
        schedule: pieces of noise level (0 data, 1 noise), each with a level per layer; or a step-wise rule, which begins with few mediators
            and switches to more when the latents change less. A rule, and levels with a held rest, need `driver`, which remembers between
            calls; this folder's pipeline has one for every run. Without, softmax attention runs.
        level: one level for all layers at all times, in place of the schedule: "softmax" (the pretrained model) or one that was added.
            Without a schedule, `None` is softmax. It can be set at any time: `pipe.transformer.level = 4`.
        version: of mediatorize, which wrote the weights. This code reads those of its own version.
        sample_size, in_channels, out_channels: as diffusers' pipelines read them; they follow from the architecture.

    Raises:
        ValueError: the code and the config are of different versions.
    """

    __module__ = "mediator_transformer"
    _no_split_modules = ["Block"]  # type: ignore[assignment, unused-ignore]  # noqa: RUF012
    _repeated_blocks = ["Block"]  # type: ignore[assignment, unused-ignore]  # noqa: RUF012
    _skip_layerwise_casting_patterns = ("embed", "norm", "adaLN_modulation", "attn", "mediator")  # type: ignore[assignment, unused-ignore]
    """Beside what is small or sensitive, layers whose weights are read without calling them: mediators do that."""

    @register_to_config  # type: ignore[untyped-decorator, unused-ignore]
    def __init__(
        self,
        architecture: dict[str, Any],
        mediators: dict[str, Any] | None = None,
        schedule: dict[str, Any] | None = None,
        level: Level | None = None,
        version: str | None = None,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int | None = None,
        out_channels: int | None = None,
    ) -> None:
        if version != VERSION:
            raise ValueError(
                f"These weights were exported by mediatorize {version or 'of an older form'}, and this code by {VERSION}: "
                "take both from one export."
            )
        arch = Architecture.from_json(dict(architecture))
        super().__init__(arch, None if mediators is None else MediatorSettings.from_json(dict(mediators)))
        self.schedule = None if schedule is None else schedule_from_json(dict(schedule))
        self.level = level
        height, width = arch.input_size
        size = height if height == width else (height, width)
        self.register_to_config(sample_size=size, in_channels=arch.channels, out_channels=arch.output_channels)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **how: Any) -> Any:
        """diffusers' own, but weights that are missing, left over or of another shape are an error.

        Raises:
            ValueError: the weights are not those of the config.
        """
        told = how.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, **how, output_loading_info=True)
        model, found = loaded
        for what in ("missing", "unexpected", "mismatched"):
            if names := found[f"{what}_keys"]:
                listed = f"{len(names)} {what}, such as {names[0]}"
                raise ValueError(
                    f"{pretrained_model_name_or_path}: the weights are not of this config and code ({listed}): take all from one export."
                )
        return (model, found) if told else model

    @property
    def level(self) -> Level | None:
        """One level for all layers at all times; None: the schedule's, or softmax."""
        return self._level

    @level.setter
    def level(self, level: Level | None) -> None:
        if level is not None and level not in self.all_levels:
            raise ValueError(f"This model has no level {level!r}. It has {', '.join(map(repr, self.all_levels))}, or None: its schedule.")
        self._level = level

    @property
    def process(self) -> Process:
        """What its inputs and outputs mean."""
        return process_of(self.arch)

    @property
    def remembers(self) -> bool:
        """Whether its schedule has levels with a held rest, so that calls depend on one another."""
        return self.level is None and isinstance(self.schedule, Schedule) and any(map(holds, self.schedule.used))

    def levels_at(self, timestep: Tensor) -> Level | tuple[Level, ...]:
        """The level of every layer at a batch of equal timesteps, or of timesteps within one piece of the schedule."""
        if self.level is not None or not isinstance(self.schedule, Schedule):
            return SOFTMAX if self.level is None else self.level
        chosen = {self.schedule.at(noise) for noise in self.process.noise_level(timestep).tolist()}
        if len(chosen) > 1:
            raise ValueError("One call cannot mix timesteps at which the schedule differs: call once for each, or set `level`.")
        return chosen.pop()

    def driver(
        self, timesteps: Sequence[float], rows: Sequence[int], batch: int, calls_per_step: int = 1, model: Any = None
    ) -> Driver | Switcher:
        """Calls the model along one trajectory: (hidden_states, timestep, class_labels) -> output.

        Before every call, `look` must be shown the latents of the scheduler, in float32: a step-wise rule goes by their changes.

        Args:
            timesteps: of all calls to come, in order, in the model's own time.
            rows: of the same calls per sample: 2 where they are guided, conditional half first, else 1.
            batch: samples.
            calls_per_step: of the scheduler; the first call of a step gets the latents that the step begins with.
            model: what is called in place of this model, such as `torch.compile` of it.

        Raises:
            ValueError: another cache is on, and the schedule remembers.
        """
        model = self if model is None else model

        def call(x: Tensor, t: Tensor, y: Tensor, levels: OneOrEach, memory: Memory | None = None) -> Tensor:
            name = "cond_uncond" if len(x) > batch else "cond"
            with self.cache_context(name):
                return model(x, t, y, return_dict=False, levels=levels, memory=memory)[0]

        self._refuse_beside_memory(self._hooks_with_state())
        depth, noise_levels = self.arch.depth, [float(self.process.noise_level(torch.tensor(t))) for t in timesteps]
        schedule = self.level if self.level is not None else SOFTMAX if self.schedule is None else self.schedule
        if isinstance(schedule, RuleSchedule):
            return Switcher(schedule.rule, [call] * len(schedule.rule.levels), batch, calls_per_step)
        return Driver(call, calls_at(schedule, noise_levels, depth, self.settings), rows)

    def compile_repeated_blocks(self, **options: Any) -> None:
        """diffusers' own: one graph for each way that a block runs, shared by all blocks. Memory stays outside the graphs."""
        self.compile_blocks(**options)

    def enable_cache(self, config: Any) -> None:
        """diffusers' own, for the caches in `CACHES`.

        Raises:
            ValueError: the cache does not know this model, or the model's schedule remembers.
        """
        name = type(config).__name__
        if name not in CACHES:
            raise ValueError(f"{name} finds nothing to cache in this model: pass one of {', '.join(CACHES)}.")
        self._refuse_beside_memory([name])
        super().enable_cache(config)

    def enable_group_offload(self, onload_device: Any, *args: Any, **how: Any) -> None:
        """diffusers' own, whole blocks at a time.

        Raises:
            ValueError: it is asked for layer by layer.
        """
        kind = how.get("offload_type", args[1] if len(args) > 1 else "block_level")
        if kind != "block_level":
            raise ValueError(
                "Leaf by leaf this model cannot be offloaded: mediators read weights of layers that they do not call. "
                'Pass offload_type="block_level", num_blocks_per_group=1.'
            )
        super().enable_group_offload(onload_device, *args, **how)

    def _hooks_with_state(self) -> list[str]:
        """Names of diffusers' hooks on its modules that remember something from one call to the next."""
        registries: list[Any] = [module._diffusers_hook for module in self.modules() if hasattr(module, "_diffusers_hook")]
        return [name for registry in registries for name, hook in registry.hooks.items() if hook._is_stateful]

    def _refuse_beside_memory(self, caches: Sequence[str]) -> None:
        if caches and self.remembers:
            raise ValueError(
                f"{caches[0]}: this model's schedule itself holds what attention gave, which a second cache would skip. "
                'Remove the cache, or set a level in place of the schedule: pipe.transformer.level = "softmax".'
            )

    def _level_of_joined_blocks(self, levels: OneOrEach, memory: Memory | None) -> Level:
        """The level of all blocks where a tool such as cache-dit has joined them into one, which it calls with one level."""
        distinct = set(levels_per_layer(levels, self.arch.depth, self.settings))
        if len(distinct) > 1 or memory is not None:
            raise ValueError(
                "Another tool runs this model's blocks as one, and the schedule is of each: "
                'set a level in place of the schedule, such as pipe.transformer.level = "softmax".'
            )
        return distinct.pop()

    def forward(  # type: ignore[override, unused-ignore]
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor,
        return_dict: bool = True,
        levels: OneOrEach | None = None,
        memory: Memory | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The checkpoint's own prediction.

        Args:
            hidden_states: noisy latents (b, channels, height, width).
            timestep: (b,) or one for all. DiT: 0 to 999, 999 is noise. SiT: 0 to 1, 1 is data (REPA: 1 is noise).
            class_labels: (b,); the number of classes is the null class. 1000, which diffusers' pipelines send, is read as that.
            levels: one for all layers, or one per layer; None: `level`, or what the schedule's pieces say at the timestep.
            memory: what attention left at earlier calls, as a `driver` passes it.
        """
        arch = self.arch
        times = torch.as_tensor(timestep, device=hidden_states.device).float().expand(len(hidden_states))
        labels = class_labels
        if arch.null_class and arch.classes < DIFFUSERS_NULL_CLASS:
            labels = torch.where(labels == DIFFUSERS_NULL_CLASS, arch.classes, labels)
        chosen = self.levels_at(times) if levels is None else levels
        if len(self.blocks) != arch.depth:
            chosen = self._level_of_joined_blocks(chosen, memory)
        sample = super().forward(hidden_states, times, labels, levels=chosen, memory=memory)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
