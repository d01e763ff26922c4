"""Runs in TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dask_isgd.callbacks.callback import Callback, require


class TensorBoard(Callback):
    """Writes event files to ``folder/run``: one scalar per column of the history, and the settings as text."""

    def __init__(self, folder: str | Path) -> None:
        require("tensorboard", "tensorboard")
        self._module = require("torch.utils.tensorboard", "tensorboard")
        self.folder = Path(folder)
        self._writer: Any = None

    def begin(self, run: str, settings: Mapping[str, Any]) -> None:
        self._writer = self._module.SummaryWriter(str(self.folder / run))
        self._writer.add_text("settings", f"```json\n{json.dumps(dict(settings), indent=1, default=str)}\n```")

    def report(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def end(self, status: str, summary: Mapping[str, Any]) -> None:
        self._writer.add_text("summary", f"```json\n{json.dumps(dict(summary), indent=1, default=str)}\n```")
        self._writer.close()
