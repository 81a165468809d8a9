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


@hookimpl
def lora_da_presets() -> list[Preset]:
    """Offers `paper` and `robust`."""
    return [PAPER, ROBUST]
