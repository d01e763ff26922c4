"""How the norm of the gradient is bounded (stand-in until the study of defaults is merged)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_OVER, _AFTER = 101, 20


class Clip:
    def __init__(self, norm: float | None, median_factor: float | None, device: torch.device) -> None:
        self._norm, self._factor = norm, median_factor
        self._recent = torch.full((_OVER,), torch.nan, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)

    def __call__(self, norm: Tensor) -> Tensor | None:
        if self._norm is None and self._factor is None:
            return None
        bound = torch.full_like(norm, torch.inf if self._norm is None else self._norm)
        if self._factor is not None:
            median = self._recent.nanmedian() * self._factor
            bound = torch.where(self._count >= _AFTER, torch.minimum(bound, median), bound)
            finite = torch.isfinite(norm)
            self._recent = torch.where(finite, torch.cat([self._recent[1:], norm[None].float()]), self._recent)
            self._count = self._count + finite
        return torch.clamp(bound / norm, max=1.0).nan_to_num(1.0)

    def state(self) -> dict[str, Any]:
        return {"recent": [v for v in self._recent.tolist() if v == v], "count": int(self._count)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._recent.fill_(torch.nan)
        if state["recent"]:
            self._recent[-len(state["recent"]) :] = torch.tensor(state["recent"])
        self._count.fill_(state["count"])
