"""The heaviest examples of a run: hard ones, and often label errors."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dask_isgd.core.batch import Prepare
from dask_isgd.display.text import number
from dask_isgd.extras import needs
from dask_isgd.storage import Dataset, WeightArray

if TYPE_CHECKING:
    import pandas as pd

_LEAST_SIDE = 4
_COLOURS = (1, 3, 4)


@dataclass(frozen=True)
class Hardest:
    """The k examples with the largest weights, the heaviest first; a notebook shows them as cards."""

    indices: NDArray[np.int64]
    """(k,) into the dataset."""
    weights: NDArray[np.float32]
    """(k,) gradient norms as scored."""
    ages: NDArray[np.float64]
    """(k,) steps since they were scored."""
    targets: NDArray[Any] | None = None
    """(k, ...), if the data is given."""
    predictions: NDArray[np.int64] | None = None
    """(k,) classes predicted by the latest checkpoint, if model and data are given."""
    images: NDArray[Any] | None = None
    """(k, H, W) or (k, H, W, colours), if the first input is an image."""
    class_names: Sequence[str] | None = None
    """Names of the classes, if the data has them."""

    def __len__(self) -> int:
        return len(self.indices)

    def doubted(self) -> Hardest:
        """Return those whose label differs from the model's prediction; none if there are no predictions."""
        if self.targets is None or self.predictions is None:
            return self._where(np.zeros(len(self), dtype=bool))
        return self._where(self.predictions != self.targets)

    def _where(self, chosen: NDArray[np.bool_]) -> Hardest:
        arrays = ("indices", "weights", "ages", "targets", "predictions", "images")
        found = {name: getattr(self, name) for name in arrays}
        return replace(self, **{name: values[chosen] for name, values in found.items() if values is not None})

    def to_dataframe(self) -> pd.DataFrame:
        """Return a table with one row per example."""
        import pandas as pd

        columns: dict[str, Any] = {"index": self.indices, "weight": self.weights, "age": self.ages}
        if self.targets is not None:
            columns["target"] = self.targets if self.targets.ndim == 1 else list(self.targets)
        if self.predictions is not None:
            columns["prediction"] = self.predictions
        return pd.DataFrame(columns)

    def __repr__(self) -> str:
        return f"<Hardest: {len(self)} examples>\n{self.to_dataframe().to_string(index=False)}"

    def name_of(self, label: Any) -> str:
        """Return the name of a class, or its number if it has none."""
        names = self.class_names or ()
        return names[int(label)] if np.issubdtype(type(label), np.integer) and 0 <= label < len(names) else str(label)

    def _repr_html_(self) -> str:
        cards = "".join(self._card(i) for i in range(len(self)))
        return f'<div style="display:flex;flex-wrap:wrap;gap:10px">{cards}</div>'

    def _card(self, i: int) -> str:
        lines = [f"<b>weight {number(float(self.weights[i]))}</b>", f"#{self.indices[i]}, age {self.ages[i]:,.0f}"]
        wrong = False
        if self.targets is not None and self.targets.ndim == 1:
            lines.append(f"label {self.name_of(self.targets[i])}")
            if self.predictions is not None:
                wrong = bool(self.predictions[i] != self.targets[i])
                lines.append(f"model {self.name_of(self.predictions[i])}")
        picture = ""
        if self.images is not None:
            picture = (
                f'<img src="data:image/png;base64,{base64.b64encode(png(self.images[i])).decode()}" alt="" '
                'style="height:96px;image-rendering:pixelated;display:block;margin:0 auto 4px">'
            )
        border = "#D55E00" if wrong else "rgba(128,128,128,.4)"
        text = "".join(f"<div>{line if line.startswith('<b>') else html.escape(line)}</div>" for line in lines)
        return (
            f'<div style="border:1px solid {border};border-radius:5px;padding:6px 8px;font-size:12px;'
            f'text-align:center;min-width:110px">{picture}{text}</div>'
        )


def heaviest(weights: WeightArray, k: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return indices and weights of the k heaviest scored examples, with one chunk in memory at a time."""
    indices, values = np.empty(0, np.int64), np.empty(0, np.float32)
    for chunk in range(weights.n_chunks):
        start, _ = weights.bounds(chunk)
        found = weights.read(chunk)
        known = np.flatnonzero(np.isfinite(found))
        best = known[np.argsort(-found[known], kind="stable")[:k]]
        indices, values = np.append(indices, start + best), np.append(values, found[best])
        order = np.argsort(-values, kind="stable")[:k]
        indices, values = indices[order], values[order]
    return indices, values


def hardest(weights: WeightArray, k: int, step: int, data: Dataset | None = None, model: Any = None) -> Hardest:
    """Return the k heaviest examples at a step; ``data`` adds targets and images, ``model`` adds predictions.

    ``model`` is an ``nn.Module`` in eval mode.
    """
    if k < 1:
        raise ValueError(f"hardest: got k={k}, wanted at least 1")
    indices, values = heaviest(weights, k)
    versions = weights.read_stamps()[:, 0]
    ages = np.maximum(0.0, step - versions[indices // weights.chunk_size])
    if data is None:
        return Hardest(indices, values, ages)
    rows = data.rows(indices)
    predictions = None
    if model is not None and len(indices) and rows.target.ndim == 1 and np.issubdtype(rows.target.dtype, np.integer):
        predictions = _classes(model, data, rows)
    names = data.attributes.get("class_names")
    return Hardest(indices, values, ages, rows.target, predictions, images(rows.inputs[0]), names)


def _classes(model: Any, data: Dataset, rows: Any) -> NDArray[np.int64] | None:
    import torch

    inputs, _ = Prepare(data, torch.device("cpu"))(rows.inputs, rows.target)
    with torch.no_grad():
        output = model(*inputs)
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        return None
    return np.asarray(output.argmax(1).numpy(), np.int64)


def images(inputs: NDArray[Any]) -> NDArray[Any] | None:
    """Return inputs (k, ...) as images (k, H, W) or (k, H, W, colours) of bytes; None if they are not images."""
    shape = inputs.shape[1:]
    if len(shape) == 3 and shape[0] in _COLOURS and shape[2] not in _COLOURS:
        inputs, shape = np.moveaxis(inputs, 1, -1), (*shape[1:], shape[0])
    if len(shape) == 3 and shape[2] == 1:
        inputs, shape = inputs[..., 0], shape[:2]
    fits = len(shape) == 2 or (len(shape) == 3 and shape[2] in _COLOURS)
    if not fits or min(shape[:2]) < _LEAST_SIDE or not len(inputs) or inputs.dtype.kind not in "fiub":
        return None
    values = np.nan_to_num(inputs.astype(np.float64))
    low, high = float(values.min()), float(values.max())
    scaled: NDArray[np.uint8] = (255 * (values - low) / max(high - low, 1e-12)).astype(np.uint8)
    return scaled


def png(image: NDArray[Any]) -> bytes:
    """Return an image (H, W) or (H, W, colours) of bytes as the content of a PNG file."""
    with needs("images", "an image of an example"):
        from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
