"""Architectures that people use, built from configurations with random weights: small sizes, nothing is downloaded.

Families of timm and transformers are left out where these libraries are not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Loss = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Family:
    """One family of architectures: a model, a batch of inputs and targets, and the loss of each example."""

    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Any, Tensor]]
    loss: Loss


def class_losses(output: Any, target: Tensor) -> Tensor:
    logits = output if isinstance(output, Tensor) else output.logits
    return functional.cross_entropy(logits, target, reduction="none")


def token_losses(output: Any, target: Tensor) -> Tensor:
    logits = output if isinstance(output, Tensor) else output.logits
    return functional.cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(1)


class RecurrentClassifier(nn.Module):
    """Tokens, a recurrent layer, and a linear layer of its last state."""

    def __init__(self, kind: type[nn.RNNBase], width: int, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, width)
        self.cells = kind(width, width, batch_first=True, **options)
        self.head = nn.Linear(width * (2 if options.get("bidirectional") else 1), 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.cells(self.table(tokens))[0].mean(1))


class Translator(nn.Module):
    """nn.Transformer: an encoder, and a decoder with cross-attention to it."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, width)
        options = {"dim_feedforward": 4 * width, "batch_first": True, "dropout": 0.0}
        self.body = nn.Transformer(width, 4, layers, layers, **options)
        self.head = nn.Linear(width, 1000)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.head(self.body(self.table(source), self.table(target), tgt_mask=mask, tgt_is_causal=True))


def torch_families(*, tiny: bool) -> dict[str, Family]:
    """Return the families that need torch only."""
    width, size, length = (16, 3, 6) if tiny else (128, 64, 64)

    def words() -> tuple[Any, Tensor]:
        return torch.randint(0, 1000, (size, length)), torch.randint(0, 10, (size,))

    def recurrent(kind: type[nn.RNNBase], **options: Any) -> Family:
        return Family(lambda: RecurrentClassifier(kind, width, **options), words, class_losses)

    def pair() -> tuple[Any, Tensor]:
        source, target = torch.randint(0, 1000, (2, 3 if tiny else 8, length))
        return (source, target), torch.randint(0, 1000, target.shape)

    def compiled() -> nn.Module:
        model = nn.Sequential(nn.Linear(width, 8 * width), nn.GELU(), nn.Linear(8 * width, 8 * width), nn.GELU())
        whole: nn.Module = torch.compile(model.append(nn.Linear(8 * width, 10)), backend="aot_eager")  # type: ignore[assignment]
        return whole

    def rows() -> tuple[Any, Tensor]:
        return torch.randn(4 * size, width), torch.randint(0, 10, (4 * size,))

    return {
        "LSTM": recurrent(nn.LSTM),
        "LSTM, 2 layers, both directions": recurrent(nn.LSTM, num_layers=2, bidirectional=True),
        "GRU": recurrent(nn.GRU),
        "compiled MLP": Family(compiled, rows, class_losses),
        "nn.Transformer": Family(lambda: Translator(width, 1 if tiny else 2), pair, token_losses),
    }


def timm_families(*, tiny: bool) -> dict[str, Family]:
    """Return the families of timm; ImportError without it."""
    importable_torchvision()
    from timm.layers import BatchNormAct2d, GroupNormAct
    from timm.models import convnext, efficientnet, nfnet, regnet, resnetv2, swin_transformer, vision_transformer

    depths = (1, 1, 1, 1) if tiny else (2, 2, 2, 1)
    widths = (16, 16, 16, 32) if tiny else (48, 64, 128, 256)
    side = 32 if tiny else 64
    swin = {"img_size": side, "patch_size": 2, "window_size": 4, "embed_dim": 24 if tiny else 48}
    heads = (2, 4) if tiny else (3, 6, 12)
    swin |= {"depths": depths[: len(heads)], "num_heads": heads}
    vit = {"img_size": side, "patch_size": 8, "embed_dim": 32 if tiny else 128, "depth": 4, "num_heads": 4}
    free = nfnet.NfCfg(depths, widths, stem_type="3x3", stem_chs=32, group_size=8, num_features=widths[-1])
    reg = regnet.RegNetCfg(depth=13, w0=24, wa=36.44, wm=2.49, group_size=8, se_ratio=0.25)

    def residual(norm: Any) -> nn.Module:
        return resnetv2.ResNetV2(depths, widths, num_classes=10, stem_type="fixed", stem_chs=32, norm_layer=norm)

    def images(make: Callable[[], nn.Module], size: int = 8) -> Family:
        size = 3 if tiny else size
        return Family(make, lambda: (torch.randn(size, 3, side, side), torch.randint(0, 10, (size,))), class_losses)

    return {
        "ScaledStdConv (NFNet)": images(lambda: nfnet.NormFreeNet(free, num_classes=10), 16),
        "Swin": images(lambda: swin_transformer.SwinTransformer(**swin, num_classes=10)),
        "ConvNeXt": images(lambda: convnext.ConvNeXt(num_classes=10, depths=depths, dims=widths, patch_size=2)),
        "BatchNormAct2d (RegNet)": images(lambda: regnet.RegNet(reg, num_classes=10)),
        "BatchNormAct2d (EfficientNet-Lite)": images(lambda: efficientnet.efficientnet_lite0(num_classes=10)),
        "BatchNormAct2d (ResNetV2)": images(lambda: residual(BatchNormAct2d), 16),
        "GroupNormAct and StdConv (BiT)": images(lambda: residual(lambda n, **k: GroupNormAct(n, 2, **k)), 16),
        "ViT": images(lambda: vision_transformer.VisionTransformer(**vit, num_classes=10)),
    }


def transformers_families(*, tiny: bool) -> dict[str, Family]:
    """Return the families of Hugging Face's transformers; ImportError without it."""
    import transformers as hf

    width, layers, size, length = (16, 1, 3, 8) if tiny else (128, 2, 8, 64)
    sizes = {
        "vocab_size": 1000, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4,
        "intermediate_size": 4 * width, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    few = sizes | {"num_key_value_heads": 2}
    gemma = few | {"head_dim": width // 4}
    bart = {
        "vocab_size": 1000, "d_model": width, "encoder_layers": layers, "decoder_layers": layers,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 4 * width,
        "decoder_ffn_dim": 4 * width, "dropout": 0.0,
    }  # fmt: skip
    t5 = {"vocab_size": 1000, "d_model": width, "d_kv": width // 4, "d_ff": 4 * width, "num_layers": layers}
    t5 |= {"num_heads": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0}
    deberta = sizes | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 64}
    deberta |= {"position_buckets": 32, "norm_rel_ebd": "layer_norm", "share_att_key": True, "num_labels": 10}
    gpt2 = {"vocab_size": 1000, "n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": 64}
    swin = {"image_size": 32, "patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}

    def words(make: Callable[[], nn.Module], size: int = size) -> Family:
        def batch() -> tuple[Any, Tensor]:
            tokens, target = torch.randint(3, 1000, (2, size, length))
            return {"input_ids": tokens}, target

        return Family(make, batch, token_losses)

    def mixtral(experts: str) -> Family:
        config = hf.MixtralConfig(**few, num_local_experts=4, experts_implementation=experts)
        return words(lambda: hf.MixtralForCausalLM(config))

    def pairs(make: Callable[[], nn.Module]) -> Family:
        def batch() -> tuple[Any, Tensor]:
            source, before, target = torch.randint(3, 1000, (3, size, length))
            return {"input_ids": source, "decoder_input_ids": before}, target

        return Family(make, batch, token_losses)

    def classes() -> tuple[Any, Tensor]:
        return {"input_ids": torch.randint(3, 1000, (2 * size, length))}, torch.randint(0, 10, (2 * size,))

    def images() -> tuple[Any, Tensor]:
        return {"pixel_values": torch.randn(size, 3, 32, 32)}, torch.randint(0, 10, (size,))

    return {
        "Mixtral": mixtral("eager"),
        "Mixtral, grouped products": mixtral("grouped_mm"),
        "Mamba": words(lambda: hf.MambaForCausalLM(hf.MambaConfig(**sizes, state_size=8))),
        "DeBERTa": Family(
            lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**deberta)), classes, class_losses
        ),
        "BART": pairs(lambda: hf.BartForConditionalGeneration(hf.BartConfig(**bart))),
        "Gemma": words(lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**gemma))),
        "T5": pairs(lambda: hf.T5ForConditionalGeneration(hf.T5Config(**t5))),
        "Llama": words(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**few))),
        "GPT-2": words(lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2))),
        "BERT": Family(
            lambda: hf.BertForSequenceClassification(hf.BertConfig(**sizes, num_labels=10)), classes, class_losses
        ),
        "Swin (Hugging Face)": Family(
            lambda: hf.SwinForImageClassification(hf.SwinConfig(**swin, num_labels=10)), images, class_losses
        ),
    }


def importable_torchvision() -> None:
    """Let timm import a torchvision that was built for another torch: it lacks operators that nothing here uses."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


def families(*, tiny: bool) -> tuple[dict[str, Family], list[str]]:
    """Return the families by name, and the libraries that are not installed."""
    found, missing = torch_families(tiny=tiny), []
    for library, make in (("timm", timm_families), ("transformers", transformers_families)):
        try:
            found |= make(tiny=tiny)
        except ImportError as error:
            missing.append(f"{library}: {error}")
    return found, missing
