"""How what travels is saved again from where it was loaded: with its code, so that the copy loads too."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any


class SavedWithCode:
    """In front of diffusers' classes: `save_pretrained` writes the file that this code was loaded from beside the config.

    A class sets `__module__` to the name of that file, which diffusers writes into `model_index.json` and looks for when it loads.
    """

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **how: Any) -> None:
        """diffusers' own, which `save_pretrained` calls, and the code."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(__file__, folder / f"{type(self).__module__}.py")
        super().save_config(save_directory, push_to_hub, **how)  # type: ignore[misc]
