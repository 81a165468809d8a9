"""The named settings that `preset=` takes."""

from lora_da_core import LoraDAConfig, Preset, hookimpl

PAPER = Preset(
    name="paper",
    summary="the original program's settings: absolute damping 1e-6, all tokens, both factors divided by √1024",
    estimator=("kfac", {"output": "diagonal"}),
    config=LoraDAConfig(
        alpha=1.0,
        beta=0.03,
        scale="fixed",
        gamma=1024.0,
        token_mask="attention",
        damping=1e-6,
        damping_kind="absolute",
    ),
)

ROBUST = Preset(
    name="robust",
    summary="the default: relative damping, label tokens, a scale searched on the samples",
    estimator=("kfac", {"output": "diagonal"}),
    config=LoraDAConfig(),
)

LORA_ONE = Preset(
    name="lora_one",
    summary="LoRA-One (arXiv 2502.01235): the gradient's singular subspace, divided evenly; the scale is searched",
    estimator="identity",
    config=LoraDAConfig(beta=0.0, balance="even"),
)

SPECTRAL = Preset(
    name="spectral",
    summary="gradient flow's spectral start (arXiv 2503.06982): as lora_one, all singular values alike",
    estimator="identity",
    config=LoraDAConfig(beta=0.0, balance="even", spectrum="flat"),
)


@hookimpl
def lora_da_presets() -> list[Preset]:
    """Offers `paper`, `robust`, `lora_one` and `spectral`."""
    return [PAPER, ROBUST, LORA_ONE, SPECTRAL]
